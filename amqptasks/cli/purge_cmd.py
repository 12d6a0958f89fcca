"""``amqptasks purge``."""

from __future__ import annotations

import json

import click

from amqptasks.broker.admin import purge
from amqptasks.broker.counts import queue_counts
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_cli_settings
from amqptasks.errors import ConfigError

__all__ = ["purge_command"]


@click.command("purge", epilog="\b\nExamples:\n  amqptasks purge -Q email\n  amqptasks purge -Q email.dlq,media.dlq -f")
@click.option("-Q", "--queues", required=True, metavar="NAMES", help="Queues, separated by commas; also *.dlq queues.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("-j", "--json", "as_json", is_flag=True, help="One JSON object, for programs; needs --force.")
@click.pass_obj
def purge_command(obj: CliContext, queues: str, force: bool, as_json: bool) -> None:
    """Delete the messages that wait in queues, for good. What workers hold is not touched."""
    if as_json and not force:
        raise click.UsageError("--json cannot ask: give --force too")
    broker = load_cli_settings(obj).broker
    names = list(dict.fromkeys(one.strip() for one in queues.split(",") if one.strip()))
    counts = queue_counts(broker, names)
    missing = [name for name in names if counts[name] is None]
    if missing:
        raise ConfigError(f"there is no queue {missing[0]!r} in the broker")
    if not force:
        for name in names:
            waiting = counts[name]
            click.echo(f"  {name:<30} {waiting[0] if waiting else 0:>10} messages")
        click.confirm("Delete these messages? They cannot be brought back", abort=True)
    deleted = {name: purge(broker, name) for name in names}
    if as_json:
        click.echo(json.dumps(deleted))
        return
    for name, count in deleted.items():
        click.echo(f"{name}: {count} message{'' if count == 1 else 's'} deleted")

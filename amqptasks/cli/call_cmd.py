"""``amqptasks call``."""

from __future__ import annotations

import json
from typing import Any

import click

from amqptasks.app import AmqpTasks
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_app, load_cli_settings

__all__ = ["call_command"]


def _json(kind: type, what: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise click.UsageError(f"{what} must be a JSON {'list' if kind is list else 'object'}, not {text}")
    return value


@click.command("call", epilog="\b\nExample:\n  amqptasks call shop.charge --args '[1, \"9.99\"]' --countdown 30")
@click.argument("name")
@click.option("-a", "--args", "args", default="[]", metavar="JSON", help="Positional arguments, a JSON list.")
@click.option("-k", "--kwargs", "kwargs", default="{}", metavar="JSON", help="Named arguments, a JSON object.")
@click.option("--countdown", type=float, metavar="S", help="Seconds to wait before it runs.")
@click.option("--expires", type=float, metavar="S", help="Seconds after which it must not run any more.")
@click.option("--queue", metavar="QUEUE", help="The queue, before any route.")
@click.option("--priority", type=click.IntRange(0, 255), help="The message's priority.")
@click.pass_obj
def call_command(
    obj: CliContext,
    name: str,
    args: str,
    kwargs: str,
    countdown: float | None,
    expires: float | None,
    queue: str | None,
    priority: int | None,
) -> None:
    """Publish a call of task NAME, wait for the broker's confirm and print the task's id."""
    settings = load_cli_settings(obj)
    if settings.app is not None:
        app = load_app(obj)
    else:  # without an app the arguments go unchecked, and the worker judges them
        app = AmqpTasks("call")
        app.configure(config=obj.config, broker=obj.broker)
    result = app.send_task(
        name,
        _json(list, "--args", args),
        _json(dict, "--kwargs", kwargs),
        countdown=countdown,
        expires=expires,
        queue=queue,
        priority=priority,
    )
    app.close()
    click.echo(result.id)

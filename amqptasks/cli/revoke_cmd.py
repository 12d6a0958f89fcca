"""``amqptasks revoke``."""

from __future__ import annotations

import click

from amqptasks.app import AmqpTasks
from amqptasks.cli.context import CliContext

__all__ = ["revoke_command"]


@click.command(
    "revoke",
    epilog="\b\nExamples:\n  amqptasks revoke 1f7e…\n  amqptasks revoke 1f7e… 90ab… --terminate --signal SIGKILL",
)
@click.argument("task_ids", metavar="ID…", nargs=-1, required=True)
@click.option("--terminate", is_flag=True, help="End those that run now, too.")
@click.option("--signal", "signal_name", default="SIGTERM", show_default=True, help="Which signal ends them.")
@click.pass_obj
def revoke_command(obj: CliContext, task_ids: tuple[str, ...], terminate: bool, signal_name: str) -> None:
    """Have tasks not run any more, wherever they wait. No worker need be there: the broker keeps it."""
    app = AmqpTasks("revoke")
    app.configure(config=obj.config, broker=obj.broker)
    try:
        app.control.revoke(task_ids, terminate=terminate, signal=signal_name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    finally:
        app.close()
    click.echo(f"revoked: {', '.join(task_ids)}")

"""``amqptasks revoke``."""

from __future__ import annotations

import click

from amqptasks.app import AmqpTasks
from amqptasks.cli.context import CliContext
from amqptasks.config.quantities import parse_seconds

__all__ = ["revoke_command"]


@click.command(
    "revoke",
    epilog="\b\nExamples:\n  amqptasks revoke 1f7e…\n  amqptasks revoke 1f7e… 90ab… --terminate --signal SIGKILL\n"
    "  amqptasks revoke --stamp customer=acme --expires 2h",
)
@click.argument("task_ids", metavar="[ID…]", nargs=-1)
@click.option("--stamp", "stamps", metavar="NAME=VALUE", multiple=True, help="All tasks with this stamp; repeatable.")
@click.option("--expires", metavar="TIME", help="How long a stamp stays revoked (30s, 2h, 7d); like ids by default.")
@click.option("--terminate", is_flag=True, help="End those that run now, too.")
@click.option("--signal", "signal_name", default="SIGTERM", show_default=True, help="Which signal ends them.")
@click.pass_obj
def revoke_command(
    obj: CliContext,
    task_ids: tuple[str, ...],
    stamps: tuple[str, ...],
    expires: str | None,
    terminate: bool,
    signal_name: str,
) -> None:
    """Have tasks not run any more, wherever they wait. No worker need be there: the broker keeps it."""
    if not task_ids and not stamps:
        raise click.UsageError("name tasks by their ids, or by --stamp NAME=VALUE")
    if expires is not None and not stamps:
        raise click.UsageError("--expires is for --stamp: an id is remembered as long as `revoke.expires` says")
    app = AmqpTasks("revoke")
    app.configure(config=obj.config, broker=obj.broker)
    try:
        if stamps:
            seconds = None if expires is None else parse_seconds(expires)
            app.control.revoke_by_stamped_headers(list(stamps), terminate, signal_name, expires=seconds)
        if task_ids:
            app.control.revoke(task_ids, terminate=terminate, signal=signal_name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    finally:
        app.close()
    click.echo(f"revoked: {', '.join([*task_ids, *stamps])}")

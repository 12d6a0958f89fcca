"""``amqptasks call``."""

from __future__ import annotations

import click

from amqptasks.app import AmqpTasks
from amqptasks.cli.arguments import json_of
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_app, load_cli_settings
from amqptasks.cli.waiting import show_result, wait_for

__all__ = ["call_command"]


@click.command(
    "call",
    epilog="\b\nExample:\n  amqptasks call shop.charge --args '[1, \"9.99\"]' --countdown 30\n"
    "  amqptasks call report.month --args '[2026, 11]' --wait --timeout 60",
)
@click.argument("name")
@click.option("-a", "--args", "args", default="[]", metavar="JSON", help="Positional arguments, a JSON list.")
@click.option("-k", "--kwargs", "kwargs", default="{}", metavar="JSON", help="Named arguments, a JSON object.")
@click.option("--countdown", type=float, metavar="S", help="Seconds to wait before it runs.")
@click.option("--expires", type=float, metavar="S", help="Seconds after which it must not run any more.")
@click.option("--queue", metavar="QUEUE", help="The queue, before any route.")
@click.option("--priority", type=click.IntRange(0, 255), help="The message's priority.")
@click.option("--wait", is_flag=True, help="Wait for the result and print it, as JSON; exit with 1 when it has failed.")
@click.option("--timeout", type=float, metavar="S", help="With --wait: seconds to wait.")
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
    wait: bool,
    timeout: float | None,
) -> None:
    """Publish a call of task NAME, wait for the broker's confirm and print the task's id; or its result."""
    settings = load_cli_settings(obj)
    if settings.app is not None:
        app = load_app(obj)
    else:  # without an app the arguments go unchecked, and the worker judges them
        app = AmqpTasks("call")
        app.configure(config=obj.config, broker=obj.broker)
    result = app.send_task(
        name,
        json_of(list, "--args", args),
        json_of(dict, "--kwargs", kwargs),
        countdown=countdown,
        expires=expires,
        queue=queue,
        priority=priority,
        # Nobody is there for a reply.
        ignore_result=True if not wait and settings.result.backend.startswith("rpc://") else None,
    )
    good = True
    if wait:
        wait_for(result, timeout)
        good = show_result(result, as_json=False, traceback=obj.verbose)
    else:
        click.echo(result.id)
    app.close()
    if not good:
        raise SystemExit(1)

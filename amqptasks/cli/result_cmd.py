"""``amqptasks result``."""

from __future__ import annotations

import click

from amqptasks.app import AmqpTasks
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import load_app, load_cli_settings
from amqptasks.cli.waiting import show_result, wait_for
from amqptasks.errors import ConfigError

__all__ = ["result_command"]


@click.command("result", epilog="\b\nExample:\n  amqptasks result 1f7e… --timeout 30")
@click.argument("task_id", metavar="ID")
@click.option("--timeout", type=float, metavar="S", help="Wait so many seconds for it.")
@click.option("--traceback", is_flag=True, help="The traceback of a task that failed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def result_command(obj: CliContext, task_id: str, timeout: float | None, traceback: bool, as_json: bool) -> None:
    """Show the result of task ID, from a store that processes share. Exits with 1 when it has failed."""
    settings = load_cli_settings(obj)
    if settings.result.backend.startswith("rpc://"):
        raise ConfigError(
            "result.backend is rpc://: results go to the process that called. `amqptasks call NAME --wait` shows one; "
            "a store (redis://, postgresql://, …) shows them to every process"
        )
    if settings.app is not None:
        app = load_app(obj)
    else:
        app = AmqpTasks("result")
        app.configure(config=obj.config, broker=obj.broker)
    result = app.AsyncResult(task_id)
    if timeout is not None:
        wait_for(result, timeout)
    good = show_result(result, as_json=as_json, traceback=traceback)
    app.close()
    if not good:
        raise SystemExit(1)

"""The dead letters that the global flags mean."""

from __future__ import annotations

import click

from amqptasks.app import AmqpTasks
from amqptasks.cli.context import CliContext
from amqptasks.cli.settings import is_elsewhere, load_app, load_cli_settings
from amqptasks.deadletters import DeadLetters
from amqptasks.discovery import import_tasks
from amqptasks.errors import ConfigError

__all__ = ["open_box"]


def open_box(obj: CliContext, *, app: bool = False) -> DeadLetters:
    """The dead letters of the settings' queues; with `app`, of the app itself, which knows its tasks."""
    loaded = _loaded(obj, needed=app)
    click.get_current_context().call_on_close(loaded.close)
    box: DeadLetters = loaded.dead_letters
    return box


def _loaded(obj: CliContext, *, needed: bool) -> AmqpTasks:
    if needed or load_cli_settings(obj).app is not None:
        try:
            found = load_app(obj)
            import_tasks(found)
            return found
        except ConfigError as error:
            # Who looks at letters may have the settings alone.
            if needed or not is_elsewhere(obj, error):
                raise
            click.echo(f"Note: the settings alone are looked at: {error}", err=True)
    plain = AmqpTasks("dlq")
    plain.configure(config=obj.config, broker=obj.broker)
    return plain

"""The settings that follow from the global flags."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import click

from amqptasks.app import AmqpTasks
from amqptasks.cli.context import CliContext
from amqptasks.config import Settings, load_settings
from amqptasks.discovery import find_app, import_tasks
from amqptasks.errors import ConfigError
from amqptasks.topology import build_topology
from amqptasks.topology.build import exact_limits
from amqptasks.topology.entities import Topology

__all__ = ["is_elsewhere", "load_app", "load_cli_settings", "load_declared", "settings_now"]


def load_cli_settings(context: CliContext) -> Settings:
    """The effective settings; flags win. Raises `ConfigError`."""
    overrides: dict[str, Any] = {}
    if context.broker is not None:
        overrides["broker"] = {"url": context.broker}
    if context.app is not None:
        overrides["app"] = context.app
    return load_settings(context.config, overrides=overrides)


def load_app(context: CliContext) -> AmqpTasks:
    """The app that ``-A`` or the file's ``app:`` names, with the flags on top of its own configuration.

    Raises `ConfigError` when none is named, none is found, or its module raises.
    """
    name = context.app or load_cli_settings(context).app
    if name is None:
        raise ConfigError("which app? Give -A module:app, or `app:` in the YAML file")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as `python -m` does
    app = find_app(name)
    app.configure(config=context.config, broker=context.broker)
    return app


def is_elsewhere(context: CliContext, error: ConfigError) -> bool:
    """Whether the app's code is not on this machine and need not be: the file names it, and others have it.

    Code that is broken is broken.
    """
    return context.app is None and (error.__cause__ is None or isinstance(error.__cause__, ImportError))


def load_declared(context: CliContext) -> tuple[Settings, Topology]:
    """Settings and topology. Which tasks have a rate limit their code tells, where an app is named."""
    settings = load_cli_settings(context)
    if settings.app is None:
        return settings, build_topology(settings, exact_limits(settings))
    try:
        app = load_app(context)
        import_tasks(app)
    except ConfigError as error:
        if not is_elsewhere(context, error):
            raise
        click.echo(f"Note: rate limits that stand in the code are left out: {error}", err=True)
        return settings, build_topology(settings, exact_limits(settings))
    return settings, app.topology


def settings_now(app: AmqpTasks) -> Settings:
    """The app's settings as the file and the environment have them now. The app keeps those that it started with.

    Raises `ConfigError`.
    """
    config, overrides = app._config, app._overrides
    if isinstance(config, Mapping):
        return load_settings(data=config, overrides=overrides)
    return load_settings(config, overrides=overrides)

"""The settings that follow from the global flags."""

from __future__ import annotations

import os
import sys
from typing import Any

from amqptasks.app import AmqpTasks, find_app
from amqptasks.cli.context import CliContext
from amqptasks.config import Settings, load_settings
from amqptasks.errors import ConfigError

__all__ = ["load_app", "load_cli_settings"]


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

    Raises `ConfigError` when none is named, or none is found.
    """
    name = context.app or load_cli_settings(context).app
    if name is None:
        raise ConfigError("which app? Give -A module:app, or `app:` in the YAML file")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as `python -m` does
    app = find_app(name)
    app.configure(config=context.config, broker=context.broker)
    return app

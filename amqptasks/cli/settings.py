"""The settings that follow from the global flags."""

from __future__ import annotations

from typing import Any

from amqptasks.cli.context import CliContext
from amqptasks.config import Settings, load_settings

__all__ = ["load_cli_settings"]


def load_cli_settings(context: CliContext) -> Settings:
    """The effective settings; flags win. Raises `ConfigError`."""
    overrides: dict[str, Any] = {}
    if context.broker is not None:
        overrides["broker"] = {"url": context.broker}
    if context.app is not None:
        overrides["app"] = context.app
    return load_settings(context.config, overrides=overrides)

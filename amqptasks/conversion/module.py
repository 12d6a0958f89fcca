"""A module of Celery's settings, run as Python runs it."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from amqptasks.conversion.names import current_name
from amqptasks.errors import ConfigError

__all__ = ["read_module"]


def read_module(file: Path) -> dict[str, Any]:
    """Celery's settings in a Python file, by their names of today.

    Raises `ConfigError` with file and line when it cannot be run, or holds none.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    sys.path.insert(0, str(file.parent.absolute()))  # it may import what stands beside it
    try:
        found = runpy.run_path(str(file))
    except (Exception, SystemExit) as error:
        raise ConfigError(_why(file, error)) from None
    finally:
        sys.path.pop(0)
    settings: dict[str, Any] = {}
    for name, value in found.items():
        current = None if name.startswith("_") else current_name(name)
        if current is not None:
            settings[current] = value
    if not settings:
        raise ConfigError(
            f"{file}: no setting of Celery's stands in it. Name the file that app.config_from_object() reads"
        )
    return settings


def _why(file: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename or file}:{error.lineno}: {error.msg}"
    lines = [one.lineno for one in traceback.extract_tb(error.__traceback__) if one.filename == str(file)]
    place = f"{file}:{lines[-1]}" if lines else str(file)
    text = f"{place}: {type(error).__name__}: {error}"
    if isinstance(error, ImportError):
        text += ". Run this where your Celery application is installed"
    return text

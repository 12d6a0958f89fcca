"""Arguments of tasks on the command line."""

from __future__ import annotations

import json
from typing import Any

import click

__all__ = ["json_of"]


def json_of(kind: type, what: str, text: str) -> Any:
    """The value of a JSON text. Raises `click.UsageError` that names the flag when it is none, or of another kind."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise click.UsageError(f"{what} must be a JSON {'list' if kind is list else 'object'}, not {text}")
    return value

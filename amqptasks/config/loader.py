"""From a file, the environment and flags to `Settings`, or to one error that names every problem with its place."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from amqptasks.config.document import Document, Problem, parse_document
from amqptasks.config.environment import Environment, read_environment
from amqptasks.config.explain import explain, key_text
from amqptasks.config.models import Settings
from amqptasks.config.references import broken_references
from amqptasks.config.schema import Path, annotation_at, is_list, is_table, may_be_null
from amqptasks.errors import ConfigError

__all__ = ["find_config", "load_settings"]

_DEFAULT_FILES = ("config/amqptasks.yaml", "amqptasks.yaml")
_log = logging.getLogger("amqptasks.config")


def find_config(path: FilePath | str | None = None, environ: Mapping[str, str] | None = None) -> FilePath | None:
    """The file to read: `path`, ``$AMQPTASKS_CONFIG``, ``./config/amqptasks.yaml`` or ``./amqptasks.yaml``.

    Raises `ConfigError` when a file that was named is not there; None when none was and no default exists.
    """
    named = path or (os.environ if environ is None else environ).get("AMQPTASKS_CONFIG")
    if named:
        if not FilePath(named).is_file():
            by = "" if path else " ($AMQPTASKS_CONFIG)"
            raise ConfigError(f"{named}: no such configuration file{by}")
        return FilePath(named)
    return next((FilePath(name) for name in _DEFAULT_FILES if FilePath(name).is_file()), None)


def load_settings(
    path: FilePath | str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Settings:
    """The effective settings: `overrides` (flags) over the environment over the file over the defaults.

    A variable that names no setting but looks like one is logged as a warning.

    Args:
        path: the file; see `find_config`.
        environ: instead of the process's environment.
        overrides: nested, like the file.
        data: instead of a file.

    Raises:
        ConfigError: one line per problem, each with file and line, or the variable.
    """
    environ = os.environ if environ is None else environ
    overrides = overrides or {}
    document = _read(find_config(path, environ), environ) if data is None else Document("configuration", dict(data))
    lower = _without_nulls(document.data, ())
    environment = read_environment(environ, lower)
    for name, meant in environment.suspects.items():
        if name not in document.variables:
            _log.warning("%s names no setting and is not used; did you mean %s?", name, meant)
    merged = _merge(_merge(lower, environment.data, ()), overrides, ())
    problems = [*document.problems, *environment.problems]
    places = _Places(document, environment, overrides)
    settings: Settings | None = None
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        problems += [places.problem(at, what) for at, what in explain(error, merged)]
    problems += [places.problem(at, what) for at, what in broken_references(merged)]
    if settings is None or problems:
        raise ConfigError("\n".join(_lines(problems)))
    return settings


def _lines(problems: Iterable[Problem]) -> list[str]:
    return list(dict.fromkeys(str(problem) for problem in problems))


def _read(file: FilePath | None, environ: Mapping[str, str]) -> Document:
    if file is None:
        return Document("configuration")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: cannot be read: not UTF-8 text at byte {error.start}") from None
    return parse_document(str(file), text, environ)


def _without_nulls(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """``queues: {default:}`` is an empty queue, and ``broker:`` alone an empty section."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        annotation = annotation_at((*path, key))
        if value is None and not may_be_null(annotation) and is_table(annotation):
            result[key] = {}
        elif value is None and is_list(annotation):
            result[key] = []
        elif isinstance(value, Mapping) and is_table(annotation):
            result[key] = _without_nulls(value, (*path, key))
        else:
            result[key] = value
    return result


def _merge(low: Mapping[str, Any], high: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`high` over `low`, section by section. A list is replaced, unless `high` has single items of it by index."""
    result = dict(low)
    for key, value in high.items():
        below, here = result.get(key), (*path, key)
        if not isinstance(value, Mapping):
            result[key] = value
        elif is_list(annotation_at(here)):
            result[key] = _items(below, value, here)
        else:
            result[key] = _merge(below if isinstance(below, Mapping) else {}, value, here)
    return result


def _items(low: Any, high: Mapping[str, Any], path: Path) -> Any:
    """A list with the items that ``AMQPTASKS_ROUTES__0__QUEUE`` and its like set; as it is where no list comes out."""
    items: list[Any] = [low] if isinstance(low, str) else list(low or ())
    if not all(index.isdecimal() for index in high):
        return high
    for index in sorted(high, key=int):
        value, number = high[index], int(index)
        if number > len(items):
            return high
        below = items[number] if number < len(items) else None
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _merge(below, value, (*path, number))
        items[number : number + 1] = [value]
    return items


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a value came from: a flag, a variable, or a line of the file."""

    document: Document
    environment: Environment
    overrides: Mapping[str, Any]

    def problem(self, path: Path, what: str) -> Problem:
        where = self._where(path)
        return Problem(where, f"{key_text(path)}: {what}" if path else what)

    def _where(self, path: Path) -> str:
        value: Any = self.overrides
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                break
            value = value[key]
        else:
            return "flag or argument"
        if value is not self.overrides and not isinstance(value, Mapping):
            return "flag or argument"
        return self.environment.where(path) or self.document.where(path)

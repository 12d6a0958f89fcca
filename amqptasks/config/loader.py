"""From a file, the environment and flags to `Settings`, or to one error that names every problem with its place."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from amqptasks.config.document import Document, Path, Problem, parse_document
from amqptasks.config.environment import Environment, read_environment
from amqptasks.config.models import Settings
from amqptasks.errors import ConfigError

__all__ = ["find_config", "load_settings", "mask_url", "masked_dump", "settings_schema"]

_DEFAULT_FILES = ("config/amqptasks.yaml", "amqptasks.yaml")
_PASSWORD = re.compile(r"(?P<head>[a-z0-9+.-]+://[^:/@\s]*:)[^@\s]*(?=@)", re.IGNORECASE)
_MAX_QUEUE_NAME = 200


def find_config(path: FilePath | str | None = None, environ: Mapping[str, str] | None = None) -> FilePath | None:
    """The file to read: `path`, ``$AMQPTASKS_CONFIG``, ``./config/amqptasks.yaml`` or ``./amqptasks.yaml``.

    Raises `ConfigError` when a file that was named is not there; None when none was and no default exists.
    """
    named = path or (os.environ if environ is None else environ).get("AMQPTASKS_CONFIG")
    if named:
        if not FilePath(named).is_file():
            raise ConfigError(f"{named}: no such configuration file")
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

    Args:
        path: the file; see `find_config`.
        environ: instead of the process's environment.
        overrides: nested, like the file.
        data: instead of a file.

    Raises:
        ConfigError: one line per problem, each with file and line, or the variable.
    """
    environ = os.environ if environ is None else environ
    if data is None:
        document = _read(find_config(path, environ), environ)
    else:
        document = Document("configuration", dict(data))
    environment = read_environment(environ)
    problems = [*document.problems, *environment.problems]
    merged = _merge(_merge(_without_nulls(document.data), environment.data), overrides or {})
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        problems += [_explain(one, document, environment) for one in error.errors(include_url=False)]
        raise ConfigError("\n".join(str(problem) for problem in problems)) from None
    problems += [Problem(_where(loc, document, environment), what) for loc, what in _references(settings)]
    if problems:
        raise ConfigError("\n".join(str(problem) for problem in problems))
    return settings


def _read(file: FilePath | None, environ: Mapping[str, str]) -> Document:
    if file is None:
        return Document("configuration")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    return parse_document(str(file), text, environ)


def _without_nulls(data: Mapping[str, Any]) -> dict[str, Any]:
    """``queues: {default:}`` is an empty queue, and ``broker:`` alone an empty section."""
    result = {name: {} if value is None and name != "app" else value for name, value in data.items()}
    for section in ("exchanges", "queues", "tasks"):
        entries = result.get(section)
        if isinstance(entries, Mapping):
            result[section] = {name: {} if value is None else value for name, value in entries.items()}
    if result.get("routes") == {}:
        result["routes"] = ()
    if result.get("include") == {}:
        result["include"] = ()
    return result


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(low)
    for name, value in high.items():
        below = result.get(name)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[name] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return result


# -- errors ---------------------------------------------------------------------------------------------------------


def _where(path: Path, document: Document, environment: Environment) -> str:
    return environment.where(path) or document.where(path)


def _explain(error: Any, document: Document, environment: Environment) -> Problem:
    path: Path = tuple(error["loc"])
    name = ".".join(str(part) for part in path).replace(".[key]", "")
    where = _where(path, document, environment)
    if error["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        near = get_close_matches(str(path[-1]), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"keys here: {', '.join(known)}"
        return Problem(where, f"{name}: unknown key; {hint}")
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] in ("literal_error", "value_error") or isinstance(error["input"], Mapping | list | tuple):
        return Problem(where, f"{name}: {message}")
    return Problem(where, f"{name}: {message}, not {error['input']!r:.80}")


def _keys_at(path: Path) -> list[str]:
    model: type[BaseModel] | None = Settings
    for part in path:
        if model is None:
            return []
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            inside = (annotation, *get_args(annotation))
            model = next((one for one in inside if isinstance(one, type) and issubclass(one, BaseModel)), model)
    return list(model.model_fields) if model is not None else []


# -- what names what ------------------------------------------------------------------------------------------------


def _references(settings: Settings) -> Iterator[tuple[Path, str]]:
    """Names that point at nothing, and names that the topology could not bear."""
    for index, route in enumerate(settings.routes):
        if route.queue is not None and route.queue not in settings.queues:
            yield (
                ("routes", index, "queue"),
                _undeclared(f"routes[{index}].queue", "queue", route.queue, settings.queues),
            )
        if route.exchange is not None and route.exchange not in settings.exchanges:
            yield (
                ("routes", index, "exchange"),
                _undeclared(f"routes[{index}].exchange", "exchange", route.exchange, settings.exchanges),
            )
    for pattern, task in settings.tasks.items():
        if task.queue is not None and task.queue not in settings.queues:
            yield (
                ("tasks", pattern, "queue"),
                _undeclared(f"tasks.{pattern}.queue", "queue", task.queue, settings.queues),
            )
    for name, queue in settings.queues.items():
        for number, binding in enumerate(queue.bindings):
            if binding.exchange not in settings.exchanges:
                key = f"queues.{name}.bindings[{number}].exchange"
                yield (
                    ("queues", name, "bindings", number, "exchange"),
                    _undeclared(key, "exchange", binding.exchange, settings.exchanges),
                )
        problem = _bad_name(name, settings)
        if problem:
            yield ("queues", name), f"queues.{name}: {problem}"
    for name in settings.exchanges:
        problem = _bad_name(name, settings)
        if problem:
            yield ("exchanges", name), f"exchanges.{name}: {problem}"


def _undeclared(key: str, kind: str, name: str, declared: Mapping[str, Any]) -> str:
    near = get_close_matches(name, declared, 1)
    if near:
        return f"{key}: {kind} {name!r} is not declared; did you mean {near[0]!r}?"
    return f"{key}: {kind} {name!r} is not declared; declared: {', '.join(sorted(declared)) or 'none'}"


def _bad_name(name: str, settings: Settings) -> str | None:
    prefix = settings.topology.prefix
    if not name or len(name.encode()) > _MAX_QUEUE_NAME:
        return f"a name has 1 to {_MAX_QUEUE_NAME} bytes"
    if any(character < " " or character == "\x7f" for character in name):
        return "a name has no control characters"
    if name.startswith("amq."):
        return "names that begin with amq. belong to the broker"
    if name == prefix or name.startswith(f"{prefix}."):
        return f"names that begin with {prefix!r} belong to the topology (topology.prefix)"
    if name.endswith(".dlq"):
        return "names that end in .dlq belong to dead-letter queues"
    if any(word in ("*", "#") for word in name.split(".")):
        return "* and # as words are wildcards of topic exchanges"
    return None


# -- showing --------------------------------------------------------------------------------------------------------


def mask_url(url: str) -> str:
    """The URL with its password replaced: for logs, errors and screens."""
    return _PASSWORD.sub(r"\g<head>***", url)


def masked_dump(settings: Settings) -> dict[str, Any]:
    """The settings as plain values, without secrets."""
    data: dict[str, Any] = _mask(settings.model_dump(mode="json"))
    if settings.sentry.dsn is not None:
        data["sentry"]["dsn"] = "***"
    return data


def _mask(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _mask(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_mask(item) for item in value]
    return mask_url(value) if isinstance(value, str) else value


def settings_schema() -> dict[str, Any]:
    """The JSON Schema of the file, for editors."""
    return Settings.model_json_schema()

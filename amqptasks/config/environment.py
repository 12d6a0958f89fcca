"""Settings from environment variables: ``AMQPTASKS_BROKER__URL`` is the key ``broker.url``.

``…_FILE`` reads the value from a file, for secrets that are mounted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Any

from amqptasks.config.document import Problem
from amqptasks.config.models import Settings
from amqptasks.config.schema import Path, annotation_at, inside, is_list, is_table, keys_at

__all__ = ["PREFIX", "Environment", "read_environment"]

PREFIX = "AMQPTASKS_"
_DELIMITER = "__"
_FILE = "_FILE"
#: The file's name, and what tests, demo and logs are told; no settings.
_NOT_SETTINGS = ("AMQPTASKS_CONFIG", "AMQPTASKS_TEST_", "AMQPTASKS_DEMO_", "AMQPTASKS_LOG_")
#: How alike a name without ``__`` must be to be taken for a typo: Kubernetes sets AMQPTASKS_PORT and its like for a
#: service called amqptasks.
_TYPO = 0.8


@dataclass(slots=True)
class Environment:
    """What the environment says, and which variable said it."""

    data: dict[str, Any] = field(default_factory=dict)
    names: dict[Path, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    #: Variables that name no setting but look like one, with the name that was meant.
    suspects: dict[str, str] = field(default_factory=dict)

    def where(self, path: Path) -> str | None:
        """The variable that set this value; None where none did."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.names:
                return self.names[path[:length]]
        if is_list(annotation_at(path)):  # one of its items
            return next((name for one, name in self.names.items() if one[: len(path)] == path), None)
        return None


def read_environment(environ: Mapping[str, str], declared: Mapping[str, Any] | None = None) -> Environment:
    """The settings of the environment. Problems are collected, not raised. An empty variable counts as not set.

    Args:
        environ: the variables.
        declared: what the file says. A variable cannot spell every key: ``AMQPTASKS_QUEUES__HIGH_PRIORITY__…`` means
            the file's queue ``High-Priority``, where there is one.
    """
    result = Environment()
    values: dict[Path, str] = {}
    for name, value in sorted(environ.items()):
        if not name.startswith(PREFIX) or name.startswith(_NOT_SETTINGS) or not value:
            continue
        path = _path(name, declared or {})
        if annotation_at(path) is not None:
            text: str | None = value
        elif name.endswith(_FILE) and annotation_at(_path(name.removesuffix(_FILE), declared or {})) is not None:
            path = _path(name.removesuffix(_FILE), declared or {})
            text = _content(name, value, result)
        else:
            _misnamed(name, path, result)
            continue
        if path in result.names:
            result.problems.append(Problem(name, f"stands beside {result.names[path]}: set one of them"))
        elif text is not None and _decodes(name, path, text, result):
            values[path] = text
        result.names.setdefault(path, name)
    if values:
        variables = {PREFIX.lower() + _DELIMITER.join(map(str, path)): text for path, text in values.items()}
        result.data = _source()(variables)()
    return result


def _path(name: str, declared: Mapping[str, Any]) -> Path:
    """The keys that a variable names, as the file spells them."""
    path: Path = ()
    for part in name.removeprefix(PREFIX).split(_DELIMITER):
        known = keys_at(path) or list(declared)
        wanted = part.lower()
        key = next((one for one in known if str(one).lower().replace("-", "_") == wanted), wanted)
        path = (*path, int(part) if part.isdecimal() and is_list(annotation_at(path)) else key)
        below = declared.get(key)
        declared = below if isinstance(below, Mapping) else {}
    return path


def _content(name: str, file: str, result: Environment) -> str | None:
    try:
        return FilePath(file).read_text(encoding="utf-8").strip()
    except OSError as error:
        result.problems.append(Problem(name, f"{file} cannot be read: {error.strerror}"))
    except UnicodeDecodeError:
        result.problems.append(Problem(name, f"{file} cannot be read: it is not UTF-8 text"))
    return None


def _decodes(name: str, path: Path, text: str, result: Environment) -> bool:
    """Whether a list or table can be read; a plain word may stand for a list of one."""
    annotation = annotation_at(path)
    if _is_json(text) if is_list(annotation) else is_table(annotation):
        try:
            json.loads(text)
        except ValueError as error:
            key = ".".join(map(str, path))
            result.problems.append(Problem(name, f"{key}: not JSON, as a list or section must be here: {error}"))
            return False
    return True


def _is_json(text: str) -> bool:
    return text.lstrip()[:1] in ("[", "{")


def _misnamed(name: str, path: Path, result: Environment) -> None:
    """Note a variable that names no setting: a problem where it can only be ours, else a suspect."""
    if len(path) > 1:
        index = next(index for index in range(len(path)) if annotation_at(path[: index + 1]) is None)
        near = get_close_matches(str(path[index]), keys_at(path[:index]), 1)
        parts = [*path[:index], near[0], *path[index + 1 :]] if near else []
        hint = f"; did you mean {_variable(tuple(parts))}?" if near else ""
        result.problems.append(Problem(name, f"no setting has this name{hint}"))
        return
    known = {_variable(one).removeprefix(PREFIX): one for one in _scalars(Settings, ())}
    near = get_close_matches(name.removeprefix(PREFIX).removesuffix(_FILE), known, 1, _TYPO)
    if near:
        result.suspects[name] = PREFIX + near[0]


def _variable(path: Path) -> str:
    return PREFIX + _DELIMITER.join(map(str, path)).upper()


def _scalars(annotation: Any, path: Path) -> Iterator[Path]:
    """Every setting that has a fixed name."""
    for key in keys_at(path):
        below = inside(annotation, key)
        yield (*path, key)
        yield from _scalars(below, (*path, key))


@functools.cache
def _source() -> Any:
    """pydantic-settings' source of nested variables, that finds its way in our tables and lists.

    Imported and made when a variable is set: it takes 50 ms, half of what this package does.
    """
    from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict  # noqa: PLC0415 - slow

    class FromEnvironment(Settings, BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=PREFIX, env_nested_delimiter=_DELIMITER, frozen=True, extra="ignore", defer_build=True
        )

    class Source(EnvSettingsSource):
        def __init__(self, variables: Mapping[str, str]) -> None:
            self._variables = variables
            super().__init__(FromEnvironment)

        def _load_env_vars(self) -> Mapping[str, str | None]:
            return self._variables

        def next_field(self, field: Any, key: str, case_sensitive: bool | None = None) -> Any:
            return inside(getattr(field, "annotation", field), key)

        def decode_complex_value(self, field_name: str, field: Any, value: Any) -> Any:
            return _decoded(field_name, value)

        def _replace_field_names_case_insensitively(self, field: Any, field_values: dict[str, Any]) -> dict[str, Any]:
            return field_values  # they are spelled right already

    return Source


def _decoded(key: str, value: Any) -> Any:
    """A list or table: JSON, or words with commas between them."""
    if not isinstance(value, str):
        return value
    if _is_json(value):
        return json.loads(value)
    # A comma may stand in a password; the next node begins after it.
    words = value.replace(",amqp", "\0amqp").split("\0") if key == "url" else value.split(",")
    return [word.strip() for word in words if word.strip()]

"""Settings from environment variables: ``AMQPTASKS_BROKER__URL`` is the key ``broker.url``.

``…_FILE`` reads the value from a file, for secrets that are mounted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from amqptasks.config.document import Path, Problem
from amqptasks.config.models import Settings

__all__ = ["PREFIX", "Environment", "read_environment"]

PREFIX = "AMQPTASKS_"
_NOT_SETTINGS = ("AMQPTASKS_CONFIG", "AMQPTASKS_TEST_", "AMQPTASKS_DEMO_")


class _FromEnvironment(Settings, BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="ignore")


class _Source(EnvSettingsSource):
    """Reads a given mapping; a value of a list or table may be JSON, and need not be."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = {name.lower(): value for name, value in variables.items()}
        super().__init__(_FromEnvironment)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._variables

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            return json.loads(value)
        return value


class Environment:
    """What the environment says, and which variable said it."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.names: dict[Path, str] = {}
        self.problems: list[Problem] = []

    def where(self, path: Path) -> str | None:
        """The variable that set this value; None where none did."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.names:
                return self.names[path[:length]]
        return None


def read_environment(environ: Mapping[str, str]) -> Environment:
    """The settings of the environment. Problems are collected, not raised."""
    result = Environment()
    variables: dict[str, str] = {}
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name.startswith(_NOT_SETTINGS):
            continue
        if name.endswith("_FILE") and _path(name, result, quiet=True) is None:
            name = name.removesuffix("_FILE")  # noqa: PLW2901 - the variable that it stands for
            try:
                value = FilePath(value).read_text().strip()  # noqa: PLW2901
            except OSError as error:
                result.problems.append(Problem(f"{name}_FILE", f"cannot be read: {error.strerror}"))
                continue
        path = _path(name, result)
        if path is not None:
            variables[name] = value
            result.names[path] = name
    try:
        result.data = _Source(variables)()
    except ValueError as error:
        result.problems.append(Problem("environment", str(error.__cause__ or error)))
    return result


def _path(name: str, result: Environment, *, quiet: bool = False) -> Path | None:
    """The setting that a variable names; None for one that names none."""
    parts = name.removeprefix(PREFIX).lower().split("__")
    model: type[BaseModel] | None = Settings
    for index, part in enumerate(parts):
        if model is None:
            break
        if part not in model.model_fields:
            # A single word may be anybody's (Kubernetes sets AMQPTASKS_PORT for a service of that name).
            if not quiet and len(parts) > 1:
                near = get_close_matches(part, model.model_fields, 1)
                right = PREFIX + "__".join([*parts[:index], near[0], *parts[index + 1 :]]).upper() if near else ""
                hint = f"; did you mean {right}?" if near else ""
                result.problems.append(Problem(name, f"no setting has this name{hint}"))
            return None
        model = _model_of(model.model_fields[part].annotation)
    return tuple(parts)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    if getattr(annotation, "__origin__", None) in (tuple, list, dict, Mapping):
        return None
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)), None)

"""The options of a task: as the decorator takes them, checked once, with the settings file's on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from math import inf
from typing import Any, Literal, TypedDict

from amqptasks.config.quantities import parse_rate
from amqptasks.errors import ConfigError
from amqptasks.protocol.compression import mime_type
from amqptasks.protocol.serializers import serializer

__all__ = ["TaskOptions", "TaskOptionsArguments", "class_options", "task_options"]


class TaskOptionsArguments(TypedDict, total=False):
    """What `@app.task(…)` accepts. Times are seconds."""

    name: str
    queue: str
    priority: int
    autoretry_for: tuple[type[BaseException], ...]
    dont_autoretry_for: tuple[type[BaseException], ...]
    throws: tuple[type[BaseException], ...]
    max_retries: int | None
    default_retry_delay: float
    retry_backoff: bool | float
    retry_backoff_max: float
    retry_jitter: bool
    time_limit: float | None
    soft_time_limit: float | None
    rate_limit: str | float | None
    rate_limit_scope: Literal["cluster", "worker"]
    ignore_result: bool
    expires: float | timedelta | None
    serializer: str | None
    compression: str | None
    track_started: bool
    deduplicate: bool
    acks_late: bool


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Checked options of one task. Defaults are Celery's, but for acks: they are always late."""

    queue: str | None = None
    priority: int | None = None
    autoretry_for: tuple[type[BaseException], ...] = ()
    dont_autoretry_for: tuple[type[BaseException], ...] = ()
    throws: tuple[type[BaseException], ...] = ()
    #: None retries for ever.
    max_retries: int | None = 3
    default_retry_delay: float = 180.0
    #: True starts at 1 second and doubles; a number starts there.
    retry_backoff: bool | float = False
    retry_backoff_max: float = 600.0
    retry_jitter: bool = True
    time_limit: float | None = None
    soft_time_limit: float | None = None
    #: ``10/m``, or starts a second; 0 lifts a limit, None never had one.
    rate_limit: str | float | None = None
    #: Whether all workers share the limit, or each has its own.
    rate_limit_scope: Literal["cluster", "worker"] = "cluster"
    ignore_result: bool = False
    expires: float | timedelta | None = None
    serializer: str | None = None
    compression: str | None = None
    track_started: bool = False
    #: Whether a message that is delivered again does not run when the result store says that its task succeeded.
    deduplicate: bool = True
    acks_late: bool = True

    def merged(self, settings: Mapping[str, Any]) -> TaskOptions:
        """These options with those of the settings file on top. Raises `ConfigError` where the two do not fit."""
        if not settings:
            return self
        merged = replace(self, **settings)
        try:
            _check(merged)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"tasks: with the options of the code, {error}") from None
        return merged


_NAMES = [field.name for field in fields(TaskOptions)]


def task_options(task: str, given: Mapping[str, Any]) -> TaskOptions:
    """Check the options of `task`. Raises `ConfigError` naming the option and the nearest valid one."""
    for name in given:
        if name not in _NAMES:
            near = get_close_matches(name, _NAMES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f". Options: {', '.join(_NAMES)}"
            raise ConfigError(f"task {task}: option {name!r} is not known{hint}")
    options = TaskOptions(**given)
    try:
        _check(options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"task {task}: {error}") from None
    return options


def class_options(base: type) -> dict[str, Any]:
    """The options that a class of tasks sets as attributes."""
    return {name: getattr(base, name) for name in _NAMES if hasattr(base, name)}


def _check(options: TaskOptions) -> None:
    for name in ("autoretry_for", "dont_autoretry_for", "throws"):
        kinds = getattr(options, name)
        if not isinstance(kinds, tuple | list) or not all(
            isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds
        ):
            raise TypeError(f"{name} must be a tuple of exception classes, not {kinds!r}")
    for name in ("default_retry_delay", "retry_backoff_max", "time_limit", "soft_time_limit", "max_retries"):
        value = getattr(options, name)
        if value is not None and (not isinstance(value, int | float) or not 0 <= value < inf):
            raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
    if options.priority is not None and not 0 <= options.priority <= 255:
        raise ValueError(f"priority must be from 0 to 255, not {options.priority!r}")
    if options.time_limit and options.soft_time_limit and options.soft_time_limit >= options.time_limit:
        raise ValueError(f"soft_time_limit ({options.soft_time_limit}) must be below time_limit ({options.time_limit})")
    if not options.acks_late:
        raise ValueError("acks_late=False is not offered: a task is acknowledged when its outcome is durable")
    if options.rate_limit is not None:
        parse_rate(options.rate_limit)
    if options.rate_limit_scope not in ("cluster", "worker"):
        raise ValueError(f"rate_limit_scope must be cluster or worker, not {options.rate_limit_scope!r}")
    if options.serializer is not None:
        serializer(options.serializer)
    if options.compression is not None:
        mime_type(options.compression)

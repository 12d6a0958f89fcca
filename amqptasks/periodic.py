"""Periodic calls, as settings and code name them: ``schedule:`` in YAML, ``app.conf.beat_schedule``,
``app.add_periodic_task``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from amqptasks.canvas import Signature
from amqptasks.config import Settings
from amqptasks.config.explain import explain, key_text
from amqptasks.config.periodic import CatchUp, ScheduleOptions, ScheduleSettings
from amqptasks.errors import ConfigError
from amqptasks.schedules import Schedule, crontab, interval, schedule_of

__all__ = ["Conf", "Entry", "Hook", "Periodic", "added_entry", "checked_table", "entries_of"]

_KEYS = {"task", "schedule", "args", "kwargs", "options", "enabled", "catch_up", "relative"}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Entry:
    """A periodic call: which task, when, and how it is sent."""

    name: str
    task: str
    schedule: Schedule
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    #: Options of `apply_async`.
    options: Mapping[str, Any] = field(default_factory=dict)
    enabled: bool = True
    catch_up: CatchUp = "one"
    #: By a command, while beats ran; the broker keeps it.
    added: bool = False


class Conf:
    """``app.conf``: what Celery users write in code and a YAML file cannot hold. All other settings are in the file."""

    def __init__(self) -> None:
        #: name -> ``{"task": …, "schedule": crontab(…) or seconds, "args": …, "kwargs": …, "options": …}``; also
        #: ``enabled`` and ``catch_up``.
        self.beat_schedule: Mapping[str, Mapping[str, Any]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "beat_schedule":
            raise ConfigError(f"app.conf.{name}: only beat_schedule is set here; the rest is in the YAML file")
        super().__setattr__(name, value)


class Hook:
    """A moment in an app's life that functions can be connected to; they are called with the app as ``sender``."""

    def __init__(self) -> None:
        self._functions: list[Callable[..., Any]] = []

    def connect(self, function: F) -> F:
        """Call this function when it happens. A decorator."""
        self._functions.append(function)
        return function

    def send(self, sender: object) -> None:
        """It happens. Each function is called once, however often this is called."""
        functions, self._functions = self._functions, []
        for function in functions:
            function(sender=sender)


class Periodic:
    """The part of an app that knows its periodic calls."""

    @cached_property
    def conf(self) -> Conf:
        """Settings in code: ``app.conf.beat_schedule = {…}``."""
        return Conf()

    @cached_property
    def on_after_configure(self) -> Hook:
        """Connect functions that add periodic tasks; they are called before a beat reads the schedule."""
        return Hook()

    @cached_property
    def _periodic(self) -> dict[str, Entry]:
        return {}

    def add_periodic_task(
        self,
        schedule: Schedule | float | timedelta | str,
        sig: Signature,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
        *,
        catch_up: CatchUp = "one",
        **options: Any,
    ) -> str:
        """Have a beat send this signature whenever the schedule is due. Returns the entry's name.

        Args:
            schedule: `crontab`, seconds or a timedelta, or five fields.
            sig: the call, such as ``task.s(1)``.
            args: put in front of the signature's arguments.
            kwargs: added to them.
            name: shown in logs and commands; by default the call itself.
            catch_up: what becomes of runs missed while no beat ran: ``skip``, ``one``, ``all``.
            options: options of `apply_async`, such as ``queue``, ``priority``, ``expires``.

        Raises `ConfigError` for what is no schedule, or an option that does not exist.
        """
        if not isinstance(sig, Signature) or sig.subtask_type is not None:
            raise ConfigError(f"add_periodic_task: {sig!r} is not the signature of a task: write task.s(…)")
        made = sig.clone(args, kwargs, **options)
        found = name or repr(made)
        self._periodic[found] = _entry(
            found,
            {
                "task": made.task, "schedule": schedule, "args": made.args, "kwargs": made.kwargs,
                "options": made.options, "catch_up": catch_up,
            },
        )  # fmt: skip
        return found


def entries_of(app: Periodic, settings: Settings) -> list[Entry]:
    """Every periodic call, in the order of their names; the settings' win over those in the code.

    Raises `ConfigError` that names the entry.
    """
    app.on_after_configure.send(app)
    found = {name: _entry(name, table) for name, table in app.conf.beat_schedule.items()} | app._periodic
    found |= {name: _of_settings(name, one) for name, one in settings.schedule.items()}
    for name, one in found.items():
        found[name] = _in_zone(one, settings.timezone)
    return [found[name] for name in sorted(found)]


def checked_table(name: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """An entry that is to be added by command, as JSON. It has the keys that it has in the file.

    Raises `ConfigError` that names it.
    """
    try:
        checked = ScheduleSettings.model_validate(table)
    except ValidationError as error:
        path, text = explain(error, dict(table))[0]
        where = f"schedule {name!r}: {key_text(path)}" if path else f"schedule {name!r}"
        raise ConfigError(f"{where}: {text}") from None
    return checked.model_dump(mode="json", exclude_unset=True, exclude_none=True)


def added_entry(name: str, table: Mapping[str, Any], settings: Settings) -> Entry:
    """The entry of what `checked_table` gave. Raises `ConfigError`."""
    entry = _of_settings(name, ScheduleSettings.model_validate(checked_table(name, table)))
    return replace(_in_zone(entry, settings.timezone), added=True)


def _in_zone(entry: Entry, zone: str) -> Entry:
    return replace(entry, schedule=entry.schedule.in_zone(zone))


def _of_settings(name: str, one: ScheduleSettings) -> Entry:
    if one.cron is None:
        schedule: Schedule = interval(one.every or 0)
    else:
        schedule = crontab.from_string(one.cron, timezone=one.timezone)
    options = one.options.model_dump(exclude_unset=True, exclude_none=True)
    return Entry(name, one.task, schedule, one.args, one.kwargs, options, one.enabled, one.catch_up)


def _entry(name: str, table: Mapping[str, Any]) -> Entry:
    where = f"periodic task {name!r}"
    unknown = sorted(set(table) - _KEYS)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; keys: {', '.join(sorted(_KEYS))}")
    if not isinstance(table.get("task"), str):
        raise ConfigError(f"{where}: `task` is the name of a task, not {table.get('task')!r}")
    if table.get("catch_up", "one") not in get_args(CatchUp):
        raise ConfigError(f"{where}: catch_up is skip, one or all, not {table['catch_up']!r}")
    try:
        schedule = schedule_of(table.get("schedule"))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Entry(
        name,
        table["task"],
        schedule,
        tuple(table.get("args") or ()),
        dict(table.get("kwargs") or {}),
        _options(where, table.get("options") or {}),
        bool(table.get("enabled", True)),
        table.get("catch_up", "one"),
    )


def _options(where: str, options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: one.total_seconds() if isinstance(one, timedelta) else one for name, one in options.items()}
    try:
        checked = ScheduleOptions.model_validate(given)
    except ValidationError as error:
        keys = ", ".join(ScheduleOptions.model_fields)
        path, text = explain(error, given)[0]
        text = f"unknown option; options: {keys}" if text.startswith("unknown key") else text
        raise ConfigError(f"{where}: {key_text(path)}: {text}") from None
    return checked.model_dump(exclude_unset=True, exclude_none=True)

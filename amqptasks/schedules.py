"""When a periodic task is due: `crontab`, in Celery's keyword form or as five fields, and `interval`. Pure.

`cronsim` reads the fields and walks the calendar: it is well kept, small, without dependencies, and follows cron where
others differ (croniter lets ``*/2 * 1``'s days match either way). It walks local time without a zone; zones are applied
here, because its own rule skips times where a change of the clocks is no full hour, and steps back in the hour that
comes twice. The rule:

* A schedule that **names hours** (``0 3 * * *``, ``hour="*/2"``) runs once at each of its local times. Times in an hour
  that the clocks skip run once, together, at the first moment after it; in an hour that comes twice, the first counts.
* A schedule that runs in **every hour** (``*/5 * * * *``) follows the time that really passes: no pause in an hour that
  comes twice, and nothing to make up for in one that is skipped.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta, tzinfo
from difflib import get_close_matches
from typing import Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from cronsim import CronSim, CronSimError

from amqptasks.errors import ConfigError

__all__ = ["Field", "Schedule", "crontab", "interval", "schedule_of", "zone_named"]

#: A field of `crontab`: a number, a text such as ``"mon-fri"`` or ``"*/5"``, or several of them.
Field = int | str | Iterable[int | str]

_SECOND, _MINUTE, _DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(days=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SHORTEST = timedelta(milliseconds=10)
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
#: Name of the argument, lowest and highest value, names of values; in the order of cron's five fields.
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day_of_month", 1, 31, ()),
    ("month_of_year", 1, 12, _MONTHS),
    ("day_of_week", 0, 6, _DAYS),
)
_TERM = re.compile(r"(?P<first>\*|\w+)(?:-(?P<last>\w+))?(?:/(?P<step>\d+))?", re.ASCII)


class Schedule(ABC):
    """Moments at which something is due."""

    @abstractmethod
    def next_after(self, moment: datetime) -> datetime:
        """The first moment that is due after this one, in UTC. Both are aware of their zone."""

    @abstractmethod
    def in_zone(self, name: str) -> Schedule:
        """This schedule, in the time zone of this name unless it has one. Raises `ConfigError`."""


class crontab(Schedule):
    """Due at the minutes whose fields all match, as in Celery: day 0 is Sunday, and both days must match.

    Args:
        minute: 0 to 59.
        hour: 0 to 23.
        day_of_week: 0 (Sunday) to 6, or names; 7 is Sunday too.
        day_of_month: 1 to 31.
        month_of_year: 1 to 12, or names.
        timezone: such as ``"Europe/Berlin"``; that of the settings by default.

    Each is a number, a text of numbers, ranges and steps (``"*/15"``, ``"8-17/3"``, ``"mon-fri"``, ``"22-2"``), or a
    list. Raises `ConfigError` for what is none of these, or is never due.
    """

    __slots__ = ("_every_hour", "_expression", "_text", "_weekdays", "timezone")

    def __init__(
        self,
        minute: Field = "*",
        hour: Field = "*",
        day_of_week: Field = "*",
        day_of_month: Field = "*",
        month_of_year: Field = "*",
        *,
        timezone: str | None = None,
    ) -> None:
        given = (minute, hour, day_of_month, month_of_year, day_of_week)
        values = [_values(value, *spec) for value, spec in zip(given, _FIELDS, strict=True)]
        fields = [_listed(found, *spec[1:3]) for found, spec in zip(values, _FIELDS, strict=True)]
        both = fields[2] != "*" and fields[4] != "*"
        # cron takes either of the two days when both are given; Celery wants both. So one is left to `_next_local`.
        self._weekdays = frozenset(values[4]) if both else None
        names = zip((spec[0] for spec in _FIELDS), given, strict=True)
        self._text = f"crontab({', '.join(f'{name}={_shown(value)}' for name, value in names if value != '*')})"
        self._finish(" ".join([*fields[:4], "*" if both else fields[4]]), timezone)

    @classmethod
    def from_string(cls, text: str, *, timezone: str | None = None) -> Self:
        """Five fields as in a crontab: minute hour day month weekday. When both days are given, either may match, as
        cron has it. Raises `ConfigError`.
        """
        made = cls.__new__(cls)
        if len(text.split()) != 5:
            raise ConfigError(f"{text!r} has {len(text.split())} fields; cron has five: minute hour day month weekday")
        made._weekdays = None
        made._text = " ".join(text.split())
        made._finish(made._text, timezone)
        return made

    def _finish(self, expression: str, timezone: str | None) -> None:
        self._expression = expression
        self.timezone = timezone
        if timezone is not None:
            zone_named(timezone)
        try:
            self._every_hour = len(CronSim(expression, datetime(2000, 1, 1)).hours) == 24
            self._next_local(datetime(2000, 1, 1))
        except CronSimError as error:
            raise ConfigError(f"{self._text!r} is not a crontab: {str(error).lower()}") from None
        except StopIteration:
            raise ConfigError(f"{self._text!r} is never due") from None

    def __repr__(self) -> str:
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, crontab) and (self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[str, frozenset[int] | None, str | None]:
        return self._expression, self._weekdays, self.timezone

    @property
    def fields(self) -> str | None:
        """Five fields that say the same; None where both days must match, which fields cannot say."""
        return self._expression if self._weekdays is None else None

    def in_zone(self, name: str) -> crontab:
        """This schedule, in the time zone of this name unless it has one. Raises `ConfigError`."""
        if self.timezone is not None:
            return self
        zone_named(name)
        made = crontab.__new__(crontab)
        for slot in crontab.__slots__:
            setattr(made, slot, getattr(self, slot))
        made.timezone = name
        return made

    def next_after(self, moment: datetime) -> datetime:
        """The first moment that is due after this one, in UTC. Raises `ConfigError` when there is none in 50 years."""
        zone = zone_named(self.timezone or "UTC")
        try:
            return (self._next_real if self._every_hour else self._next_named)(moment.astimezone(UTC), zone)
        except StopIteration:
            raise ConfigError(f"{self._text!r} is never due after {moment}") from None

    def _next_local(self, local: datetime) -> datetime:
        """The next time on a clock that is never changed."""
        for found in CronSim(self._expression, local):
            if self._weekdays is None or found.isoweekday() % 7 in self._weekdays:
                return found
        raise StopIteration

    def _next_named(self, moment: datetime, zone: tzinfo) -> datetime:
        local = moment.astimezone(zone).replace(tzinfo=None, fold=0)
        while True:
            local = self._next_local(local)
            due = _instant(local, zone)
            if due > moment:  # else: a time of the hour that comes a second time, or of a skipped one that ran
                return due

    def _next_real(self, moment: datetime, zone: tzinfo) -> datetime:
        """Walk from one change of the clocks to the next; between two of them the zone is a fixed distance from UTC."""
        offset = _offset(moment, zone)
        while True:
            due = (self._next_local((moment + offset).replace(tzinfo=None)) - offset).replace(tzinfo=UTC)
            end = min(due, moment + _DAY)
            if _offset(end, zone) != offset:
                change = _change(moment, end, offset, zone)
                moment, offset = change - _SECOND, _offset(change, zone)
            elif due <= moment + _DAY:
                return due
            else:
                moment = max(end, due - _DAY)
                offset = _offset(moment, zone)


class interval(Schedule):
    """Due every so many seconds, on a grid that begins with 1970 (UTC): the same moments for each process and restart.

    Raises `ConfigError` for what is no time, or below 10 ms.
    """

    __slots__ = ("every",)

    def __init__(self, every: float | timedelta) -> None:
        if isinstance(every, bool) or not isinstance(every, int | float | timedelta):
            raise ConfigError(f"an interval is a number of seconds or a timedelta, not {every!r}")
        try:
            self.every = every if isinstance(every, timedelta) else timedelta(seconds=every)
        except (OverflowError, ValueError):
            raise ConfigError(f"an interval of {every} seconds is no time") from None
        if self.every < _SHORTEST:
            raise ConfigError(f"an interval of {self.every.total_seconds():g} seconds is too short: at least 0.01")

    def __repr__(self) -> str:
        return f"every {self.every.total_seconds():g} s"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, interval) and self.every == other.every

    def __hash__(self) -> int:
        return hash(self.every)

    def in_zone(self, name: str) -> interval:
        """Itself: an interval knows no zone."""
        return self

    def next_after(self, moment: datetime) -> datetime:
        """The first moment that is due after this one, in UTC."""
        return _EPOCH + ((moment - _EPOCH) // self.every + 1) * self.every


def schedule_of(value: object) -> Schedule:
    """A schedule, or what Celery users write for one: seconds, a timedelta, five fields. Raises `ConfigError`."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, str):
        return crontab.from_string(value)
    if isinstance(value, timedelta | int | float):
        return interval(value)
    raise ConfigError(f"a schedule is a crontab, an interval, seconds or a timedelta, not {value!r}")


def zone_named(name: str) -> tzinfo:
    """The time zone of this name. Raises `ConfigError`."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        near = get_close_matches(name, available_timezones(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ", such as Europe/Berlin"
        raise ConfigError(f"{name!r} is no time zone{hint}") from None


# -- fields -----------------------------------------------------------------------------------------------------------


def _values(value: Field, name: str, low: int, high: int, names: tuple[str, ...]) -> list[int]:
    """The numbers that a field names, in order."""
    terms: list[int | str] = [value] if isinstance(value, int | str) else list(value)
    found: set[int] = set()
    for term in terms:
        for part in str(term).split(","):
            found.update(_term(part.strip().lower(), name, low, high, names))
    if not found or isinstance(value, bool):
        raise ConfigError(f"crontab: {name}={_shown(value)} names nothing")
    return sorted(found)


def _term(text: str, name: str, low: int, high: int, names: tuple[str, ...]) -> Iterable[int]:
    match = _TERM.fullmatch(text)
    if match is None or (match["first"] == "*" and match["last"] is not None) or match["step"] == "0":
        raise ConfigError(f"crontab: {name}={text!r} is not a number, a range (a-b) or a step (*/n)")
    if match["first"] == "*":
        numbers = list(range(low, high + 1))
    else:
        first = _number(match["first"], name, low, high, names)
        last = first
        if match["last"] is not None:
            last = _number(match["last"], name, low, high, names)
            if name == "day_of_week" and match["last"] == "7":
                last = 7
        elif match["step"] is not None:
            last = high
        # A range may go over the end: 22-2, fri-mon.
        numbers = list(range(first, last + 1)) if first <= last else [*range(first, high + 1), *range(low, last + 1)]
    numbers = numbers[:: int(match["step"] or 1)]
    return (0 if name == "day_of_week" and number == 7 else number for number in numbers)


def _number(text: str, name: str, low: int, high: int, names: tuple[str, ...]) -> int:
    if text.isdecimal():
        number = int(text)
        if name == "day_of_week" and number == 7:
            return 0
        if low <= number <= high:
            return number
        raise ConfigError(f"crontab: {name}={text} is not between {low} and {high}")
    full = {"day_of_week": "day", "month_of_year": "month"}
    if text[:3] in names and len(text) >= 3:
        return names.index(text[:3]) + low
    hint = f", nor the name of a {full[name]}" if name in full else ""
    raise ConfigError(f"crontab: {name}={text!r} is no number between {low} and {high}{hint}")


def _listed(values: list[int], low: int, high: int) -> str:
    return "*" if len(values) == high - low + 1 else ",".join(map(str, values))


def _shown(value: Field) -> str:
    return repr(value) if isinstance(value, str | int) else repr(list(value))


# -- changes of the clocks --------------------------------------------------------------------------------------------


def _offset(moment: datetime, zone: tzinfo) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta()


def _instant(local: datetime, zone: tzinfo) -> datetime:
    """The moment at which clocks show this: the first of two, or the first after the gap in which it lies."""
    while True:
        found = local.replace(tzinfo=zone, fold=0).astimezone(UTC)
        if found.astimezone(zone).replace(tzinfo=None, fold=0) == local:
            return found
        local = local.replace(second=0) + _MINUTE


def _change(before: datetime, after: datetime, offset: timedelta, zone: tzinfo) -> datetime:
    """The first second after `before`, up to `after`, at which the zone has another offset than this."""
    start = before.replace(microsecond=0)
    low, high = 0, (after - start) // _SECOND
    while high - low > 1:
        middle = (low + high) // 2
        if _offset(start + middle * _SECOND, zone) == offset:
            low = middle
        else:
            high = middle
    return start + high * _SECOND

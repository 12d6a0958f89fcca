"""`beat_schedule`: periodic calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from amqptasks.config.periodic import ScheduleOptions
from amqptasks.conversion.routes import need_queue
from amqptasks.conversion.values import plain, seconds
from amqptasks.errors import ConfigError
from amqptasks.schedules import crontab

__all__ = ["add_schedule"]

Say = Callable[[str, str], None]
_KEY = "beat_schedule"
_FIELDS = ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")


def add_schedule(entries: Mapping[str, Any], document: dict[str, Any], lost: Say) -> None:
    """Write `schedule`."""
    written: dict[str, Any] = {}
    for name, entry in entries.items():
        when = _when(entry["schedule"])
        if isinstance(when, str):
            lost(_KEY, f"{name}: {when}")
            continue
        call: dict[str, Any] = {"task": entry["task"], **when}
        for key in ("args", "kwargs"):
            if entry.get(key):
                call[key] = plain(entry[key])
        options = _options(name, entry.get("options") or {}, lost)
        if options:
            call["options"] = options
            if "queue" in options:
                need_queue(document, options["queue"])
        if entry.get("relative"):
            lost(_KEY, f"{name}: relative; `every` counts from when the entry was first seen")
        written[name] = call
    if written:
        document["schedule"] = written


def _when(schedule: Any) -> dict[str, Any] | str:
    """`every` or `cron`; what is to be said where there is neither."""
    if isinstance(schedule, int | float | timedelta):
        return {"every": seconds(schedule)}
    if all(hasattr(schedule, f"_orig_{field}") for field in _FIELDS):  # crontab
        return _cron({field: getattr(schedule, f"_orig_{field}") for field in _FIELDS})
    every = getattr(schedule, "run_every", None)  # celery.schedules.schedule
    if isinstance(every, timedelta):
        return {"every": seconds(every)}
    return f"{type(schedule).__name__} has no counterpart; cron and every there are"


def _cron(given: dict[str, Any]) -> dict[str, Any] | str:
    try:
        fields = crontab(**given).fields
    except ConfigError as error:
        return str(error)
    if fields is None:
        return (
            "both days of a crontab must match in Celery, either in cron; amqptasks.schedules.crontab is like Celery's"
        )
    # As it was written, where cron understands that: names of three letters, no range over the end.
    written = " ".join(_field(given[field]) for field in _FIELDS)
    try:
        crontab.from_string(written)
    except ConfigError:
        written = fields
    return {"cron": written}


def _field(value: Any) -> str:
    if isinstance(value, str):
        return re.sub("[a-z]+", lambda found: found[0][:3], "".join(value.split()).lower())
    return str(value) if isinstance(value, int) else ",".join(str(one) for one in sorted(value))


def _options(name: str, options: Mapping[str, Any], lost: Say) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for key, value in options.items():
        if key in ScheduleOptions.model_fields:
            written[key] = plain(getattr(value, "name", value))
        else:
            lost(_KEY, f"{name}: the option {key} has no counterpart")
    return written

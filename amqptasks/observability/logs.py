"""Logging with structlog: readable lines on a console, one JSON object a line for collectors.

Lines about tasks keep Celery's words (``Task shop.charge[id] received`` … ``succeeded in 0.012s``), so that what
greps them goes on working. Every line that is written while a task runs carries its ``task``, ``task_id``, ``queue``
and ``attempt``, also the task's own.

Lines are gathered for a few milliseconds and written at once: a busy worker makes one system call for dozens.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, MutableMapping
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import structlog

from amqptasks import signals
from amqptasks.config import LoggingSettings
from amqptasks.events import Bus, TaskEvent, TaskFailed, TaskReceived, TaskRetrying, TaskRevoked, TaskSucceeded
from amqptasks.execution.failures import safe_repr
from amqptasks.request import current_request

__all__ = ["LineWriter", "configure_logging", "subscribe_logs"]

_FLUSH_SECONDS = 0.005
_FLUSH_LINES = 200
_COLOURS = {
    "debug": "\x1b[2m",
    "info": "\x1b[32m",
    "warning": "\x1b[33m",
    "error": "\x1b[31m",
    "critical": "\x1b[1;31m",
}
_RESET = "\x1b[0m"

EventDict = MutableMapping[str, Any]


class LineWriter:
    """Gathers lines and writes them to a descriptor in one call."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: list[str] = []
        self._written = 0.0
        self._pid = os.getpid()
        os.register_at_fork(after_in_child=self._drop)

    def _drop(self) -> None:
        self._lines = []  # the parent writes its own

    def write(self, line: str) -> None:
        """Add a line. It is written now when the last write is a few milliseconds ago."""
        self._lines.append(line)
        now = time.monotonic()
        if now - self._written > _FLUSH_SECONDS or len(self._lines) >= _FLUSH_LINES:
            self._written = now
            self.flush()

    def flush(self) -> None:
        """Write what is gathered."""
        if not self._lines:
            return
        lines, self._lines = self._lines, []  # in one step: other threads add lines
        data = "".join(lines).encode("utf-8", "backslashreplace")
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            return  # a closed or full log must not stop the work

    def msg(self, line: str) -> None:
        """structlog's name for a line of any level."""
        self.write(line)

    debug = info = warning = error = critical = exception = log = fatal = msg


class _Clock:
    """Local time as text, worked out once a millisecond at most."""

    def __init__(self) -> None:
        self._at = 0
        self._text = ""

    def __call__(self) -> str:
        now = time.time_ns() // 1_000_000
        if now != self._at:
            self._at = now
            self._text = datetime.fromtimestamp(now / 1000).astimezone().isoformat(timespec="milliseconds")
        return self._text


def _add_task(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Fields of the running task, read when a line is written: a task that logs nothing pays nothing."""
    if "task_id" not in event and (request := current_request()) is not None:
        event["task"] = request.task
        event["task_id"] = request.id
        event["attempt"] = request.retries + 1
    return event


def _format_exception(logger: Any, method: str, event: EventDict) -> EventDict:
    return structlog.processors.format_exc_info(logger, method, event) if "exc_info" in event else event


def _console(colours: bool) -> Callable[[Any, str, EventDict], str]:
    clock = _Clock()

    def render(_logger: Any, method: str, event: EventDict) -> str:
        text = event.pop("event", "")
        exception = event.pop("exception", None)
        level = event.pop("level", method)
        if "task_id" in event and str(event["task_id"]) in text:
            del event["task_id"]  # said in the text
            event.pop("task", None)
        extra = "".join(f" {key}={value}" for key, value in event.items() if value is not None)
        head = f"{_COLOURS.get(level, '')}{level:<8}{_RESET}" if colours else f"{level:<8}"
        line = f"{clock()} {head} {text}{extra}\n"
        return f"{line}{exception}\n" if exception else line

    return render


def _json() -> Callable[[Any, str, EventDict], str]:
    clock = _Clock()

    def render(_logger: Any, method: str, event: EventDict) -> str:
        record = {"timestamp": clock(), "level": event.pop("level", method), "pid": os.getpid(), **event}
        return orjson.dumps(record, default=safe_repr).decode() + "\n"

    return render


def configure_logging(
    settings: LoggingSettings, *, level: str | None = None, logfile: Path | None = None
) -> LineWriter:
    """Send structlog and the standard library's logging to stderr. Call it once, before any fork.

    Handlers of `setup_logging` do the second in our place, and get the lines of the first.

    Args:
        logfile: what stderr will become; its lines have no colours.
    """
    number = logging.getLevelNamesMapping()[(level or settings.level).upper()]
    writer = LineWriter(sys.stderr.fileno())
    colours = sys.stderr.isatty() and logfile is None and "NO_COLOR" not in os.environ
    named = {
        "loglevel": number,
        "logfile": None if logfile is None else str(logfile),
        "format": settings.format or "console",
        "colorize": colours,
    }
    theirs = bool(signals.setup_logging.receivers)
    renderer = _to_logging if theirs else _json() if settings.format == "json" else _console(colours)
    structlog.configure(
        processors=[_add_task, *([] if theirs else [_format_exception]), renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *names: logging.getLogger(*names[:1]) if theirs else writer,
        cache_logger_on_first_use=True,
    )
    if theirs:
        signals.setup_logging.send(sender=None, **named)
        return writer
    logging.basicConfig(level=number, handlers=[_StandardHandler()], force=True)
    # pika tells each step of every connection at INFO; what matters of it, the worker says in its own words.
    logging.getLogger("pika").setLevel(max(number, logging.CRITICAL))
    signals.after_setup_logger.send(sender=None, logger=logging.getLogger(), **named)
    signals.after_setup_task_logger.send(sender=None, logger=logging.getLogger("amqptasks.task"), **named)
    return writer


def _to_logging(_logger: Any, _method: str, event: EventDict) -> tuple[tuple[str], dict[str, Any]]:
    """A line of ours for a handler of the standard library: its fields stand in the record's `fields`."""
    text, failure = str(event.pop("event", "")), event.pop("exc_info", None)
    said = "".join(f" {key}={value}" for key, value in event.items() if value is not None and str(value) not in text)
    return (text + said,), {"exc_info": failure, "extra": {"fields": event}}


class _StandardHandler(logging.Handler):
    """The standard library's records as structlog lines."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info and record.exc_info[0] is not None:
            fields["exc_info"] = record.exc_info
        level = record.levelname.lower()
        method = getattr(structlog.get_logger(), level if level in _COLOURS else "info")
        method(record.getMessage(), **fields)


def _fields(event: TaskEvent) -> dict[str, Any]:
    return {"task": event.task, "task_id": event.task_id, "queue": event.queue, "attempt": event.attempt}


def subscribe_logs(bus: Bus, writer: LineWriter, settings: LoggingSettings, *, level: str | None = None) -> None:
    """Write a line for each thing that happens to a task, in Celery's words."""
    # Bound once: until then structlog assembles a logger for each line.
    log = structlog.get_logger("amqptasks.task").bind()
    bus.on_flush(writer.flush)

    def received(event: TaskReceived) -> None:
        log.info(
            f"Task {event.task}[{event.task_id}] received",
            **_fields(event),
        )

    def succeeded(event: TaskSucceeded) -> None:
        log.info(
            f"Task {event.task}[{event.task_id}] succeeded in {event.runtime:.6f}s: {safe_repr(event.result)}",
            **_fields(event),
            runtime=round(event.runtime, 6),
        )

    def retrying(event: TaskRetrying) -> None:
        log.info(
            f"Task {event.task}[{event.task_id}] retry: Retry in {event.delay:.3g}s: {event.exception}",
            **_fields(event),
            runtime=round(event.runtime, 6),
        )

    def failed(event: TaskFailed) -> None:
        say = log.warning if event.expected else log.error
        if event.traceback and event.exception is not None:
            what = f"raised unexpected: {safe_repr(event.exception)}"
        else:
            what = f"{event.reason}: {event.message}"
        say(
            f"Task {event.task}[{event.task_id}] failed: {what}",
            **_fields(event),
            runtime=round(event.runtime, 6),
            reason=str(event.reason),
            exception=event.traceback.rstrip() or None if not event.expected else None,
        )

    def revoked(event: TaskRevoked) -> None:
        how = "expired" if event.expired else "terminated" if event.terminated else "revoked"
        log.warning(
            f"Task {event.task}[{event.task_id}] {how}{': ' + event.message if event.expired else ''}",
            **_fields(event),
            reason="expired" if event.expired else "revoked",
        )

    number = logging.getLevelNamesMapping()[(level or settings.level).upper()]
    if number <= logging.INFO:
        # Below that level nobody builds these events at all.
        bus.subscribe(TaskReceived, received)
        bus.subscribe(TaskSucceeded, succeeded)
        bus.subscribe(TaskRetrying, retrying)
    bus.subscribe(TaskFailed, failed)
    bus.subscribe(TaskRevoked, revoked)

"""What a failure means: the dead letter's headers, the log's event, and the news to those who wait."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import structlog

from amqptasks.errors import (
    ChordError,
    DecodeError,
    MessageTooLarge,
    RemoteError,
    SignatureError,
    TaskRevoked,
    TimeLimitExceeded,
    UnknownTask,
    Unroutable,
    Unwritable,
    WorkerLost,
)
from amqptasks.events import Bus, TaskFailed
from amqptasks.execution.followups import FollowUps
from amqptasks.execution.hooks import internal_error
from amqptasks.execution.job import Job
from amqptasks.execution.reports import Reporter, result_meta
from amqptasks.message import Envelope
from amqptasks.outcome import Discarded, Failed, Outcome, Reason
from amqptasks.request import Request
from amqptasks.states import FAILURE, REVOKED

__all__ = ["Failures", "safe_repr", "trace_of", "verdict_error"]

#: A longer traceback loses its middle: it crosses to the leader and into a header.
_TRACEBACK_CHARACTERS = 16 * 1024
#: And an entry that is longer its end: an error's text of megabytes would push out where it was raised.
_ENTRY_CHARACTERS = 2 * 1024
#: What the leader decides, as the caller gets it.
_VERDICTS: Mapping[str, type[Exception]] = {
    one.__name__: one
    for one in (
        ChordError,
        DecodeError,
        MessageTooLarge,
        TimeLimitExceeded,
        UnknownTask,
        Unroutable,
        Unwritable,
        WorkerLost,
    )
}
_REVOKED = (Reason.EXPIRED, Reason.REVOKED)
#: Of a task that has ended, and whose result, or what follows it, no queue takes.
_UNSENT = frozenset({MessageTooLarge.__name__, Unroutable.__name__, Unwritable.__name__})
_log = structlog.get_logger("amqptasks.worker")


def verdict_error(job: Job) -> Exception:
    """What the leader decided of a job, as the exception that its caller gets."""
    assert job.verdict is not None
    reason, exception, message = job.verdict
    kind: type[Exception] = TaskRevoked if reason in _REVOKED else _VERDICTS.get(exception, RemoteError)
    return kind(message)


def safe_repr(value: object, limit: int = 256) -> str:
    """`repr`, cut, and safe against objects whose own `repr` raises."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


class Failures:
    """Builds the outcomes of one queue's tasks that failed."""

    def __init__(self, queue: str, bus: Bus, reporter: Reporter, follow: FollowUps) -> None:
        self._queue = queue
        self._bus = bus
        self._reporter = reporter
        self._follow = follow

    def failed(
        self,
        job: Job,
        request: Request,
        embed: Mapping[str, Any],
        error: BaseException,
        reason: Reason,
        *,
        runtime: float = 0.0,
        trace: TracebackType | None = None,
        expected: bool = True,
    ) -> Failed:
        """The outcome of a task that raised, or of a message that cannot run. `trace` begins in the task's code."""
        text = "" if trace is None else _format(error, trace)
        name = type(error).__qualname__
        if type(error).__module__ not in ("builtins", "__main__"):
            name = f"{type(error).__module__}.{name}"
        message = _safe_str(error)
        task, task_id = str(job.headers.get("task")), str(job.headers.get("id"))
        self._bus.emit(
            TaskFailed(task, task_id, self._queue, request.retries + 1, runtime, reason, message, text, error, expected)
        )
        return Failed(reason, name, message, text, self._news(job, request, embed, error, text, FAILURE))

    def disbelieved(self, job: Job, problem: str) -> Failed:
        """The outcome of a message whose signature is missing or wrong. Nobody hears of it: it names them itself."""
        task, task_id = str(job.headers.get("task"))[:200], str(job.headers.get("id"))[:200]
        error = SignatureError(problem)
        self._bus.emit(
            TaskFailed(task, task_id, self._queue, 1, 0.0, Reason.REJECTED, problem, "", error, expected=True)
        )
        return Failed(Reason.REJECTED, SignatureError.__name__, problem)

    def concluded(self, job: Job, request: Request, embed: Mapping[str, Any]) -> Outcome:
        """What the leader decided without running the task: say so to those who wait."""
        assert job.verdict is not None
        reason, exception, message = job.verdict
        messages: tuple[Envelope, ...] = ()
        known = self._reporter.ended(request.id or "")
        if known is None or exception in _UNSENT:
            state = REVOKED if reason in _REVOKED else FAILURE
            messages = self._news(job, request, embed, verdict_error(job), "", state, own=known is None)
        if exception == ChordError.__name__:
            return Discarded(messages)  # the part that failed stands in a dead-letter queue
        return Failed(Reason(reason), exception, message, messages=messages)

    def _news(
        self,
        job: Job,
        request: Request,
        embed: Mapping[str, Any],
        error: BaseException,
        trace: str,
        state: str,
        *,
        own: bool = True,
    ) -> tuple[Envelope, ...]:
        """To those who wait for what follows a task, and with `own` for the task."""
        messages: list[Envelope] = []
        if own and request.id and self._reporter.wanted(job.headers, job.reply_to):
            messages += self._reporter.final(result_meta(request, state, error, trace), job.reply_to)
        if any(embed.values()):
            try:
                messages += self._follow.failed(request, embed, error, trace, state)
            except Exception as problem:  # a message that names what is no signature
                _log.exception("What follows a failed task cannot be sent", task_id=request.id)
                internal_error(None, request, problem)
        return tuple(messages)


def _safe_str(error: BaseException) -> str:
    try:
        return str(error)[:2048]
    except Exception:
        return safe_repr(error)


def trace_of(error: BaseException) -> str:
    """An exception's traceback as text; nothing for one that was not raised."""
    return "" if error.__traceback__ is None else _format(error, error.__traceback__)


def _format(error: BaseException, trace: TracebackType) -> str:
    try:
        lines = traceback.format_exception(type(error), error, trace, limit=-50)
    except Exception:  # an exception whose own __str__ raises
        return f"{type(error).__qualname__} (its traceback could not be formatted)"
    text = "".join(one if len(one) <= _ENTRY_CHARACTERS else f"{one[:_ENTRY_CHARACTERS]}…\n" for one in lines)
    if len(text) > _TRACEBACK_CHARACTERS:
        half = _TRACEBACK_CHARACTERS // 2
        text = f"{text[:half]}\n…\n{text[-half:]}"
    return text

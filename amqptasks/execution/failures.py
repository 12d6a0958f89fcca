"""What a failure means: the dead letter's headers, the log's event, and the news to those who wait."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import structlog

from amqptasks.errors import ChordError, RemoteError, TaskRevoked, TimeLimitExceeded, UnknownTask, WorkerLost
from amqptasks.events import Bus, TaskFailed
from amqptasks.execution.followups import FollowUps
from amqptasks.execution.job import Job
from amqptasks.execution.reports import Reporter, result_meta
from amqptasks.message import Envelope
from amqptasks.outcome import Discarded, Failed, Outcome, Reason
from amqptasks.request import Request
from amqptasks.states import FAILURE, REVOKED

__all__ = ["Failures", "safe_repr"]

#: A longer traceback loses its middle: it crosses to the leader and into a header.
_TRACEBACK_CHARACTERS = 16 * 1024
#: What the leader decides, as the caller gets it.
_VERDICTS: Mapping[str, type[Exception]] = {
    one.__name__: one for one in (ChordError, TimeLimitExceeded, UnknownTask, WorkerLost)
}
_log = structlog.get_logger("amqptasks.worker")


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

    def concluded(self, job: Job, request: Request, embed: Mapping[str, Any]) -> Outcome:
        """What the leader decided without running the task: say so to those who wait."""
        assert job.verdict is not None
        reason, exception, message = job.verdict
        revoked = reason in (Reason.EXPIRED, Reason.REVOKED)
        kind = TaskRevoked if revoked else _VERDICTS.get(exception, RemoteError)
        messages: tuple[Envelope, ...] = ()
        if self._reporter.ended(request.id or "") is None:
            messages = self._news(job, request, embed, kind(message), "", REVOKED if revoked else FAILURE)
        if exception == ChordError.__name__:
            return Discarded(messages)  # the part that failed stands in a dead-letter queue
        return Failed(Reason(reason), exception, message, messages=messages)

    def _news(
        self, job: Job, request: Request, embed: Mapping[str, Any], error: BaseException, trace: str, state: str
    ) -> tuple[Envelope, ...]:
        messages: list[Envelope] = []
        if request.id and self._reporter.wanted(job.headers, job.reply_to):
            messages += self._reporter.final(result_meta(request, state, error, trace), job.reply_to)
        if any(embed.values()):
            try:
                messages += self._follow.failed(request, embed, error, trace, state)
            except Exception:  # a message that names what is no signature
                _log.exception("What follows a failed task cannot be sent", task_id=request.id)
        return tuple(messages)


def _safe_str(error: BaseException) -> str:
    try:
        return str(error)[:2048]
    except Exception:
        return safe_repr(error)


def _format(error: BaseException, trace: TracebackType) -> str:
    try:
        lines = traceback.format_exception(type(error), error, trace, limit=-50)
    except Exception:  # an exception whose own __str__ raises
        return f"{type(error).__qualname__} (its traceback could not be formatted)"
    text = "".join(lines)
    if len(text) > _TRACEBACK_CHARACTERS:
        half = _TRACEBACK_CHARACTERS // 2
        text = f"{text[:half]}\n…\n{text[-half:]}"
    return text

"""A user's own code around tasks: the hooks of `Task` subclasses and the handlers of the task signals.

The order is Celery's: `task_prerun`, `before_start`, the function, `on_success` (`on_failure`, `on_retry`), then the
signal of the same name, `after_return`, `task_postrun`. What raises here is logged and changes no outcome; only
`before_start` is part of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from amqptasks import signals
from amqptasks.errors import ChordError
from amqptasks.execution.job import Job
from amqptasks.outcome import Reason
from amqptasks.request import Request, reset_current, set_current
from amqptasks.signals import ExceptionInfo
from amqptasks.states import FAILURE, RETRY, SUCCESS
from amqptasks.task import Task

__all__ = [
    "Ended",
    "ReceivedMessage",
    "concluded",
    "ended",
    "internal_error",
    "never_ran",
    "received",
    "rejected",
    "started",
]

_log = structlog.get_logger("amqptasks.worker")


class Ended(Protocol):
    """A call that has ended, as hooks see it."""

    task: Task[..., Any]
    request: Request
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    job: Job
    #: A state of `amqptasks.states`, ``IGNORED`` or ``REJECTED``; its value, or what it raised.
    state: str
    value: Any


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """A message as it came, for `task_unknown` and `task_rejected`, with the names of kombu's."""

    body: bytes
    headers: Mapping[str, Any]
    content_type: str | None
    properties: Mapping[str, Any]
    delivery_info: Mapping[str, Any]


def _message(job: Job) -> ReceivedMessage:
    return ReceivedMessage(
        job.body,
        job.headers,
        job.content_type,
        {"correlation_id": job.correlation_id, "reply_to": job.reply_to, "priority": job.priority},
        {"exchange": job.exchange, "routing_key": job.routing_key, "redelivered": job.redelivered},
    )


def _safely(what: str, request: Request, call: Callable[[], object]) -> None:
    """Not even `SystemExit` of a handler ends the process that others' tasks run in."""
    try:
        call()
    except BaseException:
        _log.exception(f"{what} raised", task=request.task, task_id=request.id)


@contextmanager
def _current(request: Request) -> Iterator[None]:
    token = set_current(request)
    try:
        yield
    finally:
        reset_current(token)


def _send(signal: signals.Signal, running: Request, sender: Any, /, **named: Any) -> None:
    if signal.receivers:
        _safely(f"A handler of {signal.name}", running, lambda: signal.send(sender=sender, **named))


# -- a task that runs ---------------------------------------------------------------------------------------------


def received(call: Ended) -> None:
    """A message came whose task will run."""
    _send(signals.task_received, call.request, call.task, request=call.request)


def started(call: Ended) -> None:
    """The task is about to run."""
    request = call.request
    named = {"task_id": request.id, "task": call.task, "args": call.args, "kwargs": call.kwargs}
    _send(signals.task_prerun, request, call.task, **named)


def ended(call: Ended) -> None:
    """The task has ended, its result is stored or on its way to the leader; nothing is acknowledged yet."""
    task, request, state, value = call.task, call.request, call.state, call.value
    task_id, args, kwargs = request.id, call.args, call.kwargs
    if state == SUCCESS:
        if "on_success" in task.hooks:
            _safely("on_success", request, lambda: task.on_success(value, task_id, args, kwargs))
        _send(signals.task_success, request, task, result=value)
    elif state == FAILURE:
        _failed(task, request, value, args, kwargs)
    elif state == RETRY:
        info = ExceptionInfo(value)
        if "on_retry" in task.hooks:
            _safely("on_retry", request, lambda: task.on_retry(value.exc or value, task_id, args, kwargs, info))
        _send(signals.task_retry, request, task, request=request, reason=value, einfo=info)
    if state in (SUCCESS, FAILURE) and "after_return" in task.hooks:
        einfo = ExceptionInfo(value) if state == FAILURE else None
        _safely("after_return", request, lambda: task.after_return(state, value, task_id, args, kwargs, einfo))
    named = {"task_id": task_id, "task": task, "args": args, "kwargs": kwargs, "retval": value, "state": state}
    _send(signals.task_postrun, request, task, **named)


def _failed(task: Task[..., Any], request: Request, error: BaseException, args: Any, kwargs: Mapping[str, Any]) -> None:
    info = ExceptionInfo(error)
    if "on_failure" in task.hooks:
        _safely("on_failure", request, lambda: task.on_failure(error, request.id, args, kwargs, info))
    named = {"task_id": request.id, "exception": error, "args": args, "kwargs": kwargs}
    _send(signals.task_failure, request, task, **named, traceback=error.__traceback__, einfo=info)


# -- what does not run, or not to its end -------------------------------------------------------------------------


def never_ran(task: Task[..., Any], request: Request, error: BaseException) -> None:
    """The arguments do not fit."""
    with _current(request):
        _failed(task, request, error, request.args, request.kwargs)


def rejected(job: Job, error: BaseException) -> None:
    """The message is no task message that this worker can read."""
    _send(signals.task_rejected, Request(), None, message=_message(job), exc=error)


def concluded(task: Task[..., Any] | None, job: Job, request: Request, error: Exception) -> None:
    """What the leader decided: its own process runs no user code, so that it is said here."""
    assert job.verdict is not None
    reason, exception, _ = job.verdict
    with _current(request):
        if reason in (Reason.EXPIRED, Reason.REVOKED):
            signum, expired = job.signum, reason == Reason.EXPIRED
            named = {"request": request, "terminated": signum is not None, "signum": signum, "expired": expired}
            _send(signals.task_revoked, request, task, **named)
        elif reason == Reason.UNKNOWN_TASK:
            named = {"message": _message(job), "exc": error, "name": request.task, "id": request.id}
            _send(signals.task_unknown, request, None, **named)
        elif task is not None and exception != ChordError.__name__:
            # The body of a chord that failed never began: its part's own failure was told.
            _failed(task, request, error, request.args, request.kwargs)


def internal_error(task: Task[..., Any] | None, request: Request, error: BaseException) -> None:
    """Something went wrong outside of the task's own code."""
    _send(
        signals.task_internal_error,
        request,
        task,
        task_id=request.id,
        args=request.args,
        kwargs=request.kwargs,
        request=request,
        exception=error,
        traceback=error.__traceback__,
        einfo=ExceptionInfo(error),
    )

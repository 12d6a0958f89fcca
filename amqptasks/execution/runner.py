"""The pipeline around one call: decode, validate, run under the soft limit, classify what came of it."""

from __future__ import annotations

import asyncio
import inspect
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from amqptasks.client import seconds_until
from amqptasks.config import Settings
from amqptasks.errors import (
    DecodeError,
    Ignore,
    InvalidArguments,
    MaxRetriesExceeded,
    Reject,
    Retry,
    SerializationError,
    SoftTimeLimitExceeded,
)
from amqptasks.events import Bus, TaskFailed, TaskReceived, TaskRetrying, TaskSucceeded
from amqptasks.execution.job import Job, build_request
from amqptasks.execution.retry import backoff, failure_reason, wants_retry
from amqptasks.outcome import Discarded, Failed, GivenBack, Outcome, Reason, Retrying, Succeeded
from amqptasks.protocol.compression import compress
from amqptasks.protocol.serializers import accepted
from amqptasks.protocol.task import Body, decode_body, encode_arguments
from amqptasks.request import Request, reset_current, set_current
from amqptasks.task import Task

__all__ = ["Call", "Runner", "safe_repr"]

#: A longer traceback loses its middle: it crosses to the leader and into a header.
_TRACEBACK_CHARACTERS = 16 * 1024

SoftLimit = Callable[[float], AbstractContextManager[None]]


def safe_repr(value: object, limit: int = 256) -> str:
    """`repr`, cut, and safe against objects whose own `repr` raises."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(slots=True)
class Call:
    """One call that is ready to run."""

    task: Task[..., Any]
    request: Request
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    body: Body
    job: Job

    def start(self) -> Any:
        """Call the function: its value, or its coroutine."""
        task = self.task
        if task.bind:
            return task.function(task, *self.args, **self.kwargs)
        return task.function(*self.args, **self.kwargs)


class Runner:
    """Runs the tasks of one queue's messages. One per executor.

    `soft_limit` gives a context manager that raises `SoftTimeLimitExceeded` inside it after so many seconds; the pool
    knows how (a signal on the main thread).
    """

    def __init__(
        self,
        tasks: Mapping[str, Task[..., Any]],
        settings: Settings,
        *,
        queue: str,
        hostname: str,
        bus: Bus,
        soft_limit: SoftLimit,
    ) -> None:
        self._tasks = tasks
        self._settings = settings
        self._accept = accepted(settings.serialization.accept_content)
        self._max_body = settings.serialization.max_body
        self._queue = queue
        self._hostname = hostname
        self._bus = bus
        self._soft_limit = soft_limit
        self._runner: asyncio.Runner | None = None

    # -- sync -----------------------------------------------------------------------------------------------------

    def run(self, job: Job) -> tuple[Outcome, float]:
        """Run one job on this thread. Returns its outcome and its run time in seconds. Never raises."""
        call = self._prepare(job)
        if not isinstance(call, Call):
            return call, 0.0
        limit = self.soft_limit_of(call)
        guard = nullcontext() if limit is None else self._soft_limit(limit)
        token = set_current(call.request)
        started = time.perf_counter()
        try:
            with guard:
                value = call.start()
                if inspect.iscoroutine(value):
                    value = self._run_coroutine(value)
        except BaseException as error:
            outcome = self._classify(call, error, time.perf_counter() - started)
        else:
            outcome = self._succeeded(call, value, time.perf_counter() - started)
        finally:
            reset_current(token)
        return outcome, time.perf_counter() - started

    def _run_coroutine(self, value: Any) -> Any:
        # One loop for the life of the executor, so that clients which tasks keep stay usable.
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(value)

    # -- asyncio --------------------------------------------------------------------------------------------------

    async def run_async(self, job: Job) -> tuple[Outcome, float]:
        """Run one job on this event loop; a plain function goes to a thread. Never raises."""
        call = self._prepare(job)
        if not isinstance(call, Call):
            return call, 0.0
        soft, hard = self.soft_limit_of(call), self.hard_limit_of(call)
        set_current(call.request)  # this asyncio task's own context: nothing to reset
        started = time.perf_counter()
        try:
            async with asyncio.timeout(soft or hard):
                if inspect.iscoroutinefunction(call.task.function):
                    value = await call.start()
                else:
                    value = await asyncio.to_thread(call.start)
        except TimeoutError as error:
            ran = time.perf_counter() - started
            limit = soft or hard
            if limit is not None and ran >= limit:
                outcome = self._classify(call, SoftTimeLimitExceeded(f"{limit} s"), ran)
            else:
                outcome = self._classify(call, error, ran)
        except BaseException as error:
            outcome = self._classify(call, error, time.perf_counter() - started)
        else:
            outcome = self._succeeded(call, value, time.perf_counter() - started)
        return outcome, time.perf_counter() - started

    # -- parts ----------------------------------------------------------------------------------------------------

    def _prepare(self, job: Job) -> Call | Outcome:
        headers = job.headers
        try:
            body = decode_body(job.body, job.content_type, headers.get("compression"), self._accept, self._max_body)
            request = build_request(job, body, self._hostname)
            follow_ups = [key for key in ("callbacks", "errbacks", "chain", "chord") if body.embed.get(key)]
            if follow_ups:
                return self._refuse(
                    job,
                    Reason.REJECTED,
                    NotImplementedError(f"follow-ups ({', '.join(follow_ups)}) are not available in this version"),
                )
            task = self._tasks[headers["task"]]
            args, kwargs = task.validate(body.args, body.kwargs)
        except DecodeError as error:
            return self._refuse(job, Reason.UNDECODABLE, error)
        except InvalidArguments as error:
            return self._refuse(job, Reason.INVALID_ARGUMENTS, error)
        except Exception as error:  # whatever a hostile body provokes must not end the executor
            return self._refuse(job, Reason.UNDECODABLE, error)
        if self._bus.wants(TaskReceived):
            self._bus.emit(TaskReceived(task.name, request.id or "", self._queue, request.retries + 1))
        return Call(task, request, args, kwargs, body, job)

    def soft_limit_of(self, call: Call) -> float | None:
        """Seconds after which the task is asked to stop: the message's, the task's, or the worker's."""
        return call.request.timelimit[1] or call.task.options.soft_time_limit or self._settings.worker.soft_time_limit

    def hard_limit_of(self, call: Call) -> float | None:
        """Seconds after which the task is killed: the message's, the task's, or the worker's."""
        return call.request.timelimit[0] or call.task.options.time_limit or self._settings.worker.time_limit

    def _succeeded(self, call: Call, value: Any, runtime: float) -> Outcome:
        if self._bus.wants(TaskSucceeded):
            request = call.request
            self._bus.emit(
                TaskSucceeded(call.task.name, request.id or "", self._queue, request.retries + 1, runtime, value)
            )
        return Succeeded()

    def _classify(self, call: Call, error: BaseException, runtime: float) -> Outcome:
        options, retries = call.task.options, call.request.retries
        if isinstance(error, Ignore):
            return Discarded()
        if isinstance(error, Retry):
            return self._retrying(call, error, runtime)
        if isinstance(error, Reject):
            if error.requeue:
                return GivenBack()
            return self._failed(call, error, Reason.REJECTED, runtime)
        if wants_retry(options, error) and (options.max_retries is None or retries < options.max_retries):
            return self._retrying(call, Retry(None, error, backoff(options, retries)), runtime)
        if isinstance(error, SoftTimeLimitExceeded):
            return self._failed(call, error, Reason.TIME_LIMIT, runtime)
        reason = (
            Reason.RETRIES_EXHAUSTED
            if isinstance(error, MaxRetriesExceeded)
            else failure_reason(options.max_retries, retries)
        )
        return self._failed(call, error, reason, runtime)

    def _retrying(self, call: Call, retry: Retry, runtime: float) -> Outcome:
        try:
            body = self._changed_body(call, retry)
        except SerializationError as error:
            return self._failed(call, error, Reason.FAILED, runtime)
        cause = retry.exc
        delay = max(0.0, seconds_until(retry.when if retry.when is not None else call.task.options.default_retry_delay))
        outcome = Retrying(
            delay,
            exception=type(cause).__qualname__ if cause is not None else "Retry",
            message=safe_repr(cause) if cause is not None else str(retry),
            body=body,
            queue=retry.options.get("queue"),
            priority=retry.options.get("priority"),
        )
        request = call.request
        self._bus.emit(
            TaskRetrying(
                call.task.name, request.id or "", self._queue, request.retries + 1, runtime, delay, outcome.message
            )
        )
        return outcome

    def _changed_body(self, call: Call, retry: Retry) -> bytes | None:
        if retry.sig_args is None and retry.sig_kwargs is None:
            return None
        args = call.body.args if retry.sig_args is None else retry.sig_args
        kwargs = call.body.kwargs if retry.sig_kwargs is None else retry.sig_kwargs
        packer = self._accept[call.job.content_type or ""]
        body = encode_arguments(call.task.name, args, kwargs, call.body.embed, packer)
        compression = call.job.headers.get("compression")
        return compress(body, compression) if compression else body

    def _failed(self, call: Call, error: BaseException, reason: Reason, runtime: float) -> Outcome:
        expected = isinstance(error, call.task.options.throws)
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # what the task's author wants to see starts below this module
        text = "" if reason is Reason.REJECTED else _format(error, trace)
        request = call.request
        return self._report(
            call.task.name, request.id or "", request.retries, error, reason, runtime, text, expected=expected
        )

    def _refuse(self, job: Job, reason: Reason, error: BaseException) -> Outcome:
        headers = job.headers
        retries = headers.get("retries")
        return self._report(
            str(headers.get("task")),
            str(headers.get("id")),
            retries if isinstance(retries, int) else 0,
            error,
            reason,
            0.0,
            "",
            expected=True,
        )

    def _report(
        self,
        task: str,
        task_id: str,
        retries: int,
        error: BaseException,
        reason: Reason,
        runtime: float,
        text: str,
        *,
        expected: bool,
    ) -> Failed:
        name = type(error).__qualname__
        if type(error).__module__ not in ("builtins", "__main__"):
            name = f"{type(error).__module__}.{name}"
        message = _safe_str(error)
        self._bus.emit(
            TaskFailed(task, task_id, self._queue, retries + 1, runtime, reason, message, text, error, expected)
        )
        return Failed(reason, name, message, text)


def _safe_str(error: BaseException) -> str:
    try:
        return str(error)[:2048]
    except Exception:
        return safe_repr(error)


def _format(error: BaseException, trace: Any) -> str:
    try:
        lines = traceback.format_exception(type(error), error, trace, limit=-50)
    except Exception:  # an exception whose own __str__ raises
        return f"{type(error).__qualname__} (its traceback could not be formatted)"
    text = "".join(lines)
    if len(text) > _TRACEBACK_CHARACTERS:
        half = _TRACEBACK_CHARACTERS // 2
        text = f"{text[:half]}\n…\n{text[-half:]}"
    return text

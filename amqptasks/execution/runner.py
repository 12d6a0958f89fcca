"""The pipeline around one call: decode, validate, run under the soft limit, classify what came of it."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from amqptasks.calls import seconds_until
from amqptasks.config import Settings
from amqptasks.errors import (
    Ignore,
    InvalidArguments,
    MaxRetriesExceeded,
    Reject,
    Replaced,
    Retry,
    SerializationError,
    SoftTimeLimitExceeded,
)
from amqptasks.events import Bus, TaskReceived, TaskRetrying, TaskSucceeded
from amqptasks.execution.failures import Failures, safe_repr
from amqptasks.execution.followups import FollowUps
from amqptasks.execution.job import Job, build_request
from amqptasks.execution.reports import Reporter, result_meta
from amqptasks.execution.retry import backoff, failure_reason, wants_retry
from amqptasks.message import Envelope
from amqptasks.outcome import Discarded, GivenBack, Outcome, Reason, Retrying, Succeeded
from amqptasks.protocol.compression import compress
from amqptasks.protocol.results import ResultMeta
from amqptasks.protocol.serializers import accepted
from amqptasks.protocol.task import Body, decode_body, encode_arguments
from amqptasks.request import Request, reset_current, set_current
from amqptasks.states import RETRY, STARTED, SUCCESS
from amqptasks.task import Task

__all__ = ["Call", "Runner"]


_SUCCEEDED = Succeeded()
SoftLimit = Callable[[float], AbstractContextManager[None]]


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
    knows how (a signal on the main thread). `send_state` sends a message while the task of a delivery goes on;
    `ran` is called when its function has ended, and only its result is written.
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
        reporter: Reporter,
        follow: FollowUps,
        send_state: Callable[[int, Envelope], None],
        ran: Callable[[], None],
    ) -> None:
        self._ran = ran
        self._reporter = reporter
        self._follow = follow
        self._failures = Failures(queue, bus, reporter, follow)
        self._send_state = send_state
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
            self._ran()
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
            weakref.finalize(self, self._runner.close)
        return self._runner.run(value)

    # -- asyncio --------------------------------------------------------------------------------------------------

    async def run_async(self, job: Job) -> tuple[Outcome, float]:
        """Run one job on this event loop; a plain function goes to a thread. Never raises."""
        blocks = self._reporter.blocks
        call = await asyncio.to_thread(self._prepare, job) if blocks and job.redelivered else self._prepare(job)
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
            ran = time.perf_counter() - started
            if blocks:
                return await asyncio.to_thread(self._succeeded, call, value, ran), ran
            outcome = self._succeeded(call, value, ran)
        return outcome, time.perf_counter() - started

    # -- parts ----------------------------------------------------------------------------------------------------

    def _prepare(self, job: Job) -> Call | Outcome:
        headers = job.headers
        try:
            body = decode_body(job.body, job.content_type, headers.get("compression"), self._accept, self._max_body)
            request = build_request(job, body, self._hostname)
        except Exception as error:  # whatever a hostile body provokes must not end the executor
            return self._failures.failed(job, Request(id=_text(headers.get("id"))), {}, error, Reason.UNDECODABLE)
        if job.verdict is not None:
            return self._failures.concluded(job, request, body.embed)
        try:
            task = self._tasks[headers["task"]]
            args, kwargs = task.validate(body.args, body.kwargs)
        except InvalidArguments as error:
            return self._failures.failed(job, request, body.embed, error, Reason.INVALID_ARGUMENTS)
        except Exception as error:
            return self._failures.failed(job, request, body.embed, error, Reason.UNDECODABLE)
        call = Call(task, request, args, kwargs, body, job)
        if job.redelivered:
            known = self._reporter.ended(request.id or "")
            if known is not None and known.status == SUCCESS:
                # It has run, and what it returned is kept: what follows it may not have been sent.
                return self._succeeded(call, known.result, 0.0, known)
        if self._reporter.wanted(headers, job.reply_to):
            request.on_state = lambda state, meta: self._state(call, state, meta)
            if task.options.track_started:
                request.on_state(STARTED, {"hostname": self._hostname, "pid": os.getpid()})
        if self._bus.wants(TaskReceived):
            self._bus.emit(TaskReceived(task.name, request.id or "", self._queue, request.retries + 1))
        return call

    def _state(self, call: Call, state: str, meta: Any) -> None:
        message = self._reporter.state(ResultMeta(call.request.id or "", state, meta), call.job.reply_to)
        if message is not None:
            self._send_state(call.job.tag, message)

    def soft_limit_of(self, call: Call) -> float | None:
        """Seconds after which the task is asked to stop: the message's, the task's, or the worker's."""
        return call.request.timelimit[1] or call.task.options.soft_time_limit or self._settings.worker.soft_time_limit

    def hard_limit_of(self, call: Call) -> float | None:
        """Seconds after which the task is killed: the message's, the task's, or the worker's."""
        return call.request.timelimit[0] or call.task.options.time_limit or self._settings.worker.time_limit

    def _succeeded(self, call: Call, value: Any, runtime: float, known: ResultMeta | None = None) -> Outcome:
        request, embed, job = call.request, call.body.embed, call.job
        messages: list[Envelope] = []
        try:
            if any(embed.values()):
                messages += self._follow.succeeded(request, embed, value)
            if known is None and self._reporter.wanted(job.headers, job.reply_to):
                meta = result_meta(request, SUCCESS, value)
                messages += self._reporter.final(meta, job.reply_to)
        except Exception as error:  # what it returned, or what should follow, cannot be written
            return self._failures.failed(job, request, embed, error, Reason.FAILED, runtime=runtime, expected=False)
        if self._bus.wants(TaskSucceeded):
            self._bus.emit(
                TaskSucceeded(call.task.name, request.id or "", self._queue, request.retries + 1, runtime, value)
            )
        return Succeeded(tuple(messages)) if messages else _SUCCEEDED

    def _classify(self, call: Call, error: BaseException, runtime: float) -> Outcome:
        options, retries = call.task.options, call.request.retries
        if isinstance(error, Ignore):
            return Discarded(tuple(self._follow.ignored(call.request, call.body.embed)))
        if isinstance(error, Replaced):
            try:
                return Succeeded(tuple(self._follow.replaced(call.request, call.body.embed, error.signature)))
            except Exception as problem:
                return self._failed(call, problem, Reason.FAILED, runtime)
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
        if request.on_state is not None:
            request.on_state(RETRY, cause if cause is not None else retry)
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
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # what the task's author wants to see starts below this module
        return self._failures.failed(
            call.job,
            call.request,
            call.body.embed,
            error,
            reason,
            runtime=runtime,
            trace=None if reason is Reason.REJECTED else trace or error.__traceback__,
            expected=isinstance(error, call.task.options.throws),
        )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None

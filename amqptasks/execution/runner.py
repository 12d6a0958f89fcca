"""The pipeline around one call: decode, validate, run under the soft limit, classify what came of it."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import structlog

from amqptasks.claims import Claim
from amqptasks.config import Settings
from amqptasks.errors import (
    ConfigError,
    Ignore,
    InvalidArguments,
    MaxRetriesExceeded,
    MessageTooLarge,
    Reject,
    Replaced,
    Retry,
    SerializationError,
    SignatureError,
    SoftTimeLimitExceeded,
    StoreUnavailable,
)
from amqptasks.events import Bus, TaskReceived, TaskRetrying, TaskSucceeded
from amqptasks.execution import hooks
from amqptasks.execution.bodies import Bodies
from amqptasks.execution.coroutines import Coroutines, beside
from amqptasks.execution.failures import Failures, safe_repr, trace_of, verdict_error
from amqptasks.execution.followups import FollowUps
from amqptasks.execution.interrupts import Terminated, limited
from amqptasks.execution.job import Job, build_request
from amqptasks.execution.reports import Reporter, result_meta
from amqptasks.execution.retry import backoff, failure_reason, retry_plan, wants_retry
from amqptasks.message import Envelope
from amqptasks.outcome import Discarded, Failed, GivenBack, Outcome, Postponed, Reason, Retrying, Succeeded
from amqptasks.protocol.results import ResultMeta
from amqptasks.protocol.task import Body
from amqptasks.request import Request, reset_current, set_current
from amqptasks.signals import task_signals
from amqptasks.states import FAILURE, REJECTED, RETRY, STARTED, SUCCESS
from amqptasks.task import Task

__all__ = ["Call", "Runner", "SoftLimit"]

_SUCCEEDED = Succeeded()
#: Characters of a result that monitors are shown.
_SHOWN = 1024
_log = structlog.get_logger("amqptasks.worker")
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
    #: Whether its task has hooks, or a task signal has handlers.
    watched: bool = False
    #: Where its body was kept, if it did not come in the message.
    claim: Claim | None = None
    #: How it ended, for those who watch: a state, and its value or what it raised.
    state: str = "IGNORED"
    value: Any = None

    def start(self) -> Any:
        """Call the function: its value, or its coroutine."""
        task = self.task
        if "before_start" in task.hooks:
            task.before_start(self.request.id, self.args, self.kwargs)
        if task.bind:
            return task.function(task, *self.args, **self.kwargs)
        return task.function(*self.args, **self.kwargs)


class Runner:
    """Runs the tasks of one queue's messages. One per executor.

    `soft_limit` gives a context manager that raises `SoftTimeLimitExceeded` inside it after so many seconds; the pool
    knows how (`execution/interrupts.py`). `send_state` sends a message while the task of a delivery goes on;
    `coroutines`: whether async functions can run here.
    `ran` is called when its function has ended, and only its result is written; `again` when hooks run after that,
    so that a delivery whose hooks end the process is to blame. `describe`: whether outcomes say what monitors show, as
    text.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task[..., Any]],
        settings: Settings,
        *,
        queue: str,
        hostname: str,
        bus: Bus,
        bodies: Bodies,
        soft_limit: SoftLimit,
        reporter: Reporter,
        follow: FollowUps,
        send_state: Callable[[int, Envelope], None],
        ran: Callable[[], None],
        again: Callable[[int], None] = lambda _tag: None,
        coroutines: bool = True,
        describe: Callable[[], bool] = lambda: False,
    ) -> None:
        self._describe = describe
        self._ran = ran
        self._again = again
        self._bodies = bodies
        #: Whether what surrounds a task may wait for a server or a disk, and must not do so on an event loop.
        self._blocks = reporter.blocks or bodies.blocks
        self._reporter = reporter
        self._follow = follow
        self._failures = Failures(queue, bus, reporter, follow)
        self._send_state = send_state
        self._tasks = tasks
        self._settings = settings
        self._queue = queue
        self._hostname = hostname
        self._bus = bus
        self._soft_limit = soft_limit
        self._coroutines = Coroutines(coroutines)
        follow.call_errback = self._coroutines.call_errback
        follow.run_coroutine = self._coroutines.run_errback

    # -- sync -----------------------------------------------------------------------------------------------------

    def run(self, job: Job) -> tuple[Outcome, float]:
        """Run one job on this thread. Returns its outcome and its run time in seconds.

        Raises `Terminated` when the pool ends the task, and nothing else.
        """
        call = self._prepare(job)
        if not isinstance(call, Call):
            return call, 0.0
        limit = self.soft_limit_of(call)
        guard = nullcontext() if limit is None else self._soft_limit(limit)
        token = set_current(call.request)
        started = time.perf_counter()
        try:
            if call.watched:
                hooks.started(call)
            try:
                with guard:
                    value = call.start()
                if inspect.iscoroutine(value):
                    value = self._coroutines.run(value, limit)
                self._ran()
            except Terminated:
                raise
            except BaseException as error:
                outcome = self._classify(call, error, time.perf_counter() - started)
            else:
                outcome = self._succeeded(call, value, time.perf_counter() - started)
            if call.claim is not None:
                outcome = self._released(call, outcome)
            if call.watched:
                self._again(job.tag)
                hooks.ended(call)
                self._ran()
        finally:
            reset_current(token)
        return outcome, time.perf_counter() - started

    # -- asyncio --------------------------------------------------------------------------------------------------

    async def run_async(self, job: Job) -> tuple[Outcome, float]:
        """Run one job of an async function on this event loop.

        Raises `asyncio.CancelledError` when this asyncio task was cancelled, and nothing else.
        """
        self._coroutines.loop = asyncio.get_running_loop()
        call = await beside(blocks := self._blocks, self._prepare, job)
        if not isinstance(call, Call):
            if self._coroutines.planned:
                await self._coroutines.finish()
            return call, 0.0
        soft = self.soft_limit_of(call)
        set_current(call.request)  # this asyncio task's own context: nothing to reset
        started = time.perf_counter()
        if call.watched:
            hooks.started(call)
        try:
            value = await (call.start() if soft is None else limited(call.start(), soft))
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            outcome = await beside(blocks, self._classify, call, error, time.perf_counter() - started)
        else:
            outcome = await beside(blocks, self._succeeded, call, value, time.perf_counter() - started)
        if call.claim is not None:
            outcome = self._released(call, outcome)
        if self._coroutines.planned:
            await self._coroutines.finish()
        if call.watched:
            hooks.ended(call)
        return outcome, time.perf_counter() - started

    # -- parts ----------------------------------------------------------------------------------------------------

    def _prepare(self, job: Job) -> Call | Outcome:
        headers = job.headers
        problem = self._bodies.problem(job)
        if problem is not None:
            hooks.rejected(job, SignatureError(problem))
            return self._failures.disbelieved(job, problem)
        if job.verdict is not None and job.verdict[0] == Reason.UNDECODABLE:
            hooks.rejected(job, verdict_error(job))
            return Failed(Reason.UNDECODABLE, *job.verdict[1:])
        try:
            body, claim = self._bodies.read(job)
            request = build_request(job, body, self._hostname)
        except StoreUnavailable:
            if job.verdict is None:
                return Postponed(self._bodies.wait)
            # Decided already, and it must not come back as if it were not; what follows it cannot be read.
            return self._failures.concluded(job, Request(id=_text(headers.get("id"))), {})
        except Exception as error:  # whatever a hostile body provokes must not end the executor
            hooks.rejected(job, error)
            return self._failures.failed(job, Request(id=_text(headers.get("id"))), {}, error, Reason.UNDECODABLE)
        if job.verdict is not None:
            concluded = self._failures.concluded(job, request, body.embed)
            hooks.concluded(self._tasks.get(headers["task"]), job, request, verdict_error(job))
            return concluded
        try:
            task = self._tasks[headers["task"]]
            args, kwargs = task.validate(body.args, body.kwargs)
        except InvalidArguments as error:
            failed = self._failures.failed(job, request, body.embed, error, Reason.INVALID_ARGUMENTS)
            hooks.never_ran(task, request, error)
            return failed
        except Exception as error:
            hooks.rejected(job, error)
            return self._failures.failed(job, request, body.embed, error, Reason.UNDECODABLE)
        call = Call(task, request, args, kwargs, body, job, claim=claim)
        if claim is not None:
            self._again(job.tag)  # its time limits begin when its body is there
        if job.redelivered and task.options.deduplicate:
            known = self._reporter.ended(request.id or "")
            if known is not None and known.status == SUCCESS:
                # It has run, and what it returned is kept: what follows it may not have been sent.
                return self._released(call, self._succeeded(call, known.result, 0.0, known))
        if self._reporter.wanted(headers, job.reply_to):
            request.on_state = lambda state, meta: self._state(call, state, meta)
            if task.options.track_started:
                request.on_state(STARTED, {"hostname": self._hostname, "pid": os.getpid()})
        if self._bus.wants(TaskReceived):
            self._bus.emit(TaskReceived(task.name, request.id or "", self._queue, request.retries + 1))
        call.watched = task_signals.connected or bool(task.hooks)
        if call.watched:
            hooks.received(call)
        return call

    def _state(self, call: Call, state: str, meta: Any) -> None:
        message = self._reporter.state(ResultMeta(call.request.id or "", state, meta), call.job.reply_to)
        if message is not None:
            self._send_state(call.job.tag, message)

    def _released(self, call: Call, outcome: Outcome) -> Outcome:
        """The outcome; where no message stands for the call's body any more, with the message that deletes it."""
        if call.claim is None:
            return outcome
        if isinstance(outcome, Succeeded | Discarded) or (isinstance(outcome, Retrying) and outcome.body is not None):
            try:
                return replace(outcome, messages=(*outcome.messages, self._follow.forget(call.claim, self._queue)))
            except Exception as error:  # who may not sign, a handler that raises: the body stays, and the task has run
                _log.error("A large body cannot be deleted", key=call.claim.key, error=str(error))
        return outcome

    def soft_limit_of(self, call: Call) -> float | None:
        """Seconds after which the task is asked to stop: the message's, the task's, or the worker's."""
        return call.request.timelimit[1] or call.task.options.soft_time_limit or self._settings.worker.soft_time_limit

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
            call.state, call.value = FAILURE, error
            return self._failures.failed(job, request, embed, error, Reason.FAILED, runtime=runtime, expected=False)
        call.state, call.value = SUCCESS, value
        if self._bus.wants(TaskSucceeded):
            self._bus.emit(
                TaskSucceeded(call.task.name, request.id or "", self._queue, request.retries + 1, runtime, value)
            )
        if self._describe():
            return Succeeded(tuple(messages), safe_repr(value, _SHOWN))
        return Succeeded(tuple(messages)) if messages else _SUCCEEDED

    def _classify(self, call: Call, error: BaseException, runtime: float) -> Outcome:
        try:
            return self._outcome_of(call, error, runtime)
        except Exception as problem:
            hooks.internal_error(call.task, call.request, problem)
            return self._failed(call, problem, Reason.FAILED, runtime)

    def _outcome_of(self, call: Call, error: BaseException, runtime: float) -> Outcome:
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
                call.state, call.value = REJECTED, error
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
            delay, queue, priority = retry_plan(retry, call.task.options, self._settings.topology.prefix)
            body, headers = self._changed_body(call, retry)
        except (SerializationError, MessageTooLarge, ConfigError) as error:
            return self._failed(call, error, Reason.FAILED, runtime)
        cause = retry.exc
        outcome = Retrying(
            delay,
            exception=type(cause).__qualname__ if cause is not None else "Retry",
            message=safe_repr(cause) if cause is not None else str(retry),
            body=body,
            queue=queue,
            priority=priority,
            headers=headers,
            traceback=trace_of(cause if cause is not None else retry) if self._describe() else "",
        )
        call.state, call.value = RETRY, retry
        request = call.request
        if request.on_state is not None:
            request.on_state(RETRY, cause if cause is not None else retry)
        self._bus.emit(
            TaskRetrying(
                call.task.name, request.id or "", self._queue, request.retries + 1, runtime, delay, outcome.message
            )
        )
        return outcome

    def _changed_body(self, call: Call, retry: Retry) -> tuple[bytes | None, dict[str, str] | None]:
        """The body with other arguments, and its signature."""
        if retry.sig_args is None and retry.sig_kwargs is None:
            return None, None
        args = call.body.args if retry.sig_args is None else retry.sig_args
        kwargs = call.body.kwargs if retry.sig_kwargs is None else retry.sig_kwargs
        return self._bodies.changed(call.job, call.body, call.claim, args, kwargs)

    def _failed(self, call: Call, error: BaseException, reason: Reason, runtime: float) -> Outcome:
        call.state, call.value = (REJECTED if reason is Reason.REJECTED else FAILURE), error
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


def _is_cancelled() -> bool:
    """Whether somebody cancelled the running asyncio task; a task may also raise `CancelledError` by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None

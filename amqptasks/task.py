"""The task: a function that can also be called through the broker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Generic, NoReturn, ParamSpec, Protocol, Self, TypeVar

from amqptasks.canvas import Sender, Signature, chunks, starmap, xmap
from amqptasks.client import Client
from amqptasks.errors import MaxRetriesExceeded, Replaced, Retry
from amqptasks.options import TaskOptions
from amqptasks.request import Request, current_request
from amqptasks.results import AsyncResult
from amqptasks.signals import ExceptionInfo
from amqptasks.validation import ArgumentValidator, return_converter

__all__ = ["Task", "TaskHost"]

P = ParamSpec("P")
R = TypeVar("R")
_HOOKS = ("before_start", "on_success", "on_failure", "on_retry", "after_return")


class TaskHost(Sender, Protocol):
    """What a task needs of its app. A shared task asks for the current app each time."""

    @property
    def client(self) -> Client:
        """Publishes calls."""

    def effective_options(self, task: Task[..., Any]) -> TaskOptions:
        """The task's options with the settings on top."""


class Task(Generic[P, R]):
    """A decorated function. Calling it runs it here; `delay` and `apply_async` publish it.

    `self` in a bound task (``bind=True``) is this object; `request` tells of the message that runs.

    A subclass (``@app.task(base=…)``, `app.register_task`) may set options as class attributes, and have hooks run
    around its tasks. There is one object of it per task and process; its `__init__` takes no arguments.
    """

    #: Which hooks its class defines.
    hooks: frozenset[str] = frozenset()

    def made_of(
        self,
        function: Callable[..., R],
        *,
        name: str,
        options: TaskOptions,
        bind: bool,
        host: Callable[[], TaskHost],
    ) -> Self:
        """Become the task of this function."""
        self.name = name
        self.hooks = frozenset(hook for hook in _HOOKS if getattr(type(self), hook) is not getattr(Task, hook))
        self.bind = bind
        self.function = function
        self.validate = ArgumentValidator(name, function, skip=1 if bind else 0)
        self._declared = options
        self._host = host
        self._options: TaskOptions | None = None
        self.__name__ = getattr(function, "__name__", name)
        self.__qualname__ = getattr(function, "__qualname__", name)
        self.__module__ = function.__module__
        self.__doc__ = function.__doc__
        self.__wrapped__ = function
        return self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function in this process, without the broker."""
        if self.bind:
            return self.function(self, *args, **kwargs)
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    @property
    def options(self) -> TaskOptions:
        """The decorator's options with the settings file's on top."""
        if self._options is None:
            self._options = self._host().effective_options(self)
        return self._options

    @property
    def declared_options(self) -> TaskOptions:
        """The decorator's options alone."""
        return self._declared

    @cached_property
    def convert(self) -> Callable[[Any], Any] | None:
        """Makes the value that the task is annotated to return of its JSON; None when that is the value."""
        return return_converter(self.function)

    @property
    def request(self) -> Request:
        """The message that runs now; an empty request outside of a worker."""
        return current_request() or Request()

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Publish a call and return after the broker's confirm.

        Raises:
            InvalidArguments: the arguments do not fit the annotations.
            SerializationError: an argument cannot be serialized.
            Unroutable, Nacked, BrokerBlocked, PublishTimeout, PublishError: the broker did not take it.
        """
        return self._host().client.send(self, args, kwargs)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """`delay` for asyncio: never blocks the loop."""
        return await self._host().client.asend(self, args, kwargs)

    def apply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[R]:
        """Publish a call with options, and return after the broker's confirm.

        Options:
            countdown: seconds to wait before it runs; the message waits in the broker.
            eta: the datetime before which it must not run.
            expires: seconds, or a datetime, after which it is dead-lettered instead of run.
            queue, exchange, routing_key, priority: where it goes, before any route.
            task_id, headers, serializer, compression, shadow, ignore_result.
            stamped_headers: names of further options that are stamps, as with Celery (`Signature.stamp`).
            time_limit, soft_time_limit: seconds.
            retry, retry_policy: whether and how often a publish that failed is tried again
                (``max_retries, interval_start, interval_step, interval_max``).
            mandatory: False lets the broker drop it when no queue is bound.

        Raises: what `delay` raises, and `TypeError` for an unknown option.
        """
        return self._host().client.send(self, args, kwargs or {}, **options)

    async def aapply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[R]:
        """`apply_async` for asyncio: never blocks the loop."""
        return await self._host().client.asend(self, args, kwargs or {}, **options)

    def s(self, *args: Any, **kwargs: Any) -> Signature:
        """A signature: the call, not yet sent."""
        return Signature(self.name, args, kwargs, sender=self._host())

    def si(self, *args: Any, **kwargs: Any) -> Signature:
        """An immutable signature: it takes no argument from a task before it."""
        return Signature(self.name, args, kwargs, immutable=True, sender=self._host())

    def map(self, it: Iterable[Any]) -> xmap:
        """A signature of one task that calls this one for each item, and returns the list of what it returned."""
        return xmap(self.s(), it)

    def starmap(self, it: Iterable[Any]) -> starmap:
        """`map` for tuples of arguments."""
        return starmap(self.s(), it)

    def chunks(self, it: Iterable[Any], n: int) -> chunks:
        """A group of `starmap`s of `n` tuples of arguments each."""
        return chunks(self.s(), it, n)

    def subtask(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> Signature:
        """A signature with options; Celery's other name of it is `signature`."""
        return Signature(self.name, args, kwargs, options, sender=self._host())

    signature = subtask

    # -- hooks, for subclasses; Celery's, and called in its order -------------------------------------------------

    def before_start(self, task_id: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Right before the function, in its thread and under its time limits. What it raises, the task has raised."""

    def on_success(self, retval: Any, task_id: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The task returned `retval`."""

    def on_failure(
        self,
        exc: BaseException,
        task_id: str | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        einfo: ExceptionInfo,
    ) -> None:
        """The task failed for good. Also when its process was killed: another one calls this then."""

    def on_retry(
        self,
        exc: BaseException,
        task_id: str | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        einfo: ExceptionInfo,
    ) -> None:
        """The task will run again, because of `exc`."""

    def after_return(
        self,
        status: str,
        retval: Any,
        task_id: str | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        einfo: ExceptionInfo | None,
    ) -> None:
        """The task succeeded or failed: after `on_success` or `on_failure`."""

    def update_state(self, *, state: str, meta: Any = None) -> None:
        """Tell who waits for the result how far this task is. Best effort; outside of a worker nothing happens.

        Args:
            state: ``PROGRESS`` or another word of your own.
            meta: what `AsyncResult.info` shows: a value that JSON carries.

        Raises:
            SerializationError: `meta` cannot be serialized.
        """
        request = self.request
        if request.on_state is not None:
            request.on_state(state, meta)

    def send_event(
        self, type_: str, /, retry: bool = True, retry_policy: Mapping[str, Any] | None = None, **fields: Any
    ) -> None:
        """Tell monitors something of this task, whether the worker's own events are on or off. Outside of a worker
        nothing happens.

        Args:
            type_: such as ``task-progress``; the event's routing key is this with dots for dashes.
            retry, retry_policy: Celery's; events are sent once, and dropped where the broker does not take them.
            fields: what the event tells, besides ``uuid``, the task's id. What JSON does not know is shown as text.

        Raises:
            ValueError: the type is no name, or the event is larger than 64 KiB.
        """
        request = self.request
        if not request.called_directly and Request.on_event is not None:
            Request.on_event(request, type_, fields)

    def replace(self, sig: Signature) -> NoReturn:
        """End this task, and have `sig` run in its place: with its id, callbacks, and whatever follows it."""
        raise Replaced(sig)

    def retry(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        exc: BaseException | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> NoReturn:
        """Run this task again later: publish it to the delay ladder, then acknowledge this delivery.

        Args:
            args, kwargs: replace the arguments; the same by default.
            exc: why. It is raised instead when the retries are used up.
            countdown, eta: when; `default_retry_delay` by default.
            max_retries: for this call; the task's by default.
            options: ``queue``, ``priority``.

        Raises:
            Retry: always, but for
            exc, or MaxRetriesExceeded: when the retries are used up, or outside of a worker.
        """
        request = self.request
        if request.called_directly:
            raise exc or Retry("called outside of a worker")
        limit = self.options.max_retries if max_retries is None else max_retries
        if limit is not None and request.retries >= limit:
            if exc is not None:
                raise exc
            raise MaxRetriesExceeded(f"task {self.name}[{request.id}] was retried {request.retries} times")
        delay: float | datetime = self.options.default_retry_delay if countdown is None else countdown
        again = Retry(
            None,
            exc,
            eta if eta is not None else delay,
            args=None if args is None else tuple(args),
            kwargs=None if kwargs is None else dict(kwargs),
            options=options,
        )
        # The cause stays readable in logs: "raise … from exc" without asking the user to write it.
        raise again from exc

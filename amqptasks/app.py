"""The app: registry of tasks and composition root. Nothing is connected or read before it is needed."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import threading
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, Unpack, overload

from amqptasks.broker.admin import declare
from amqptasks.broker.aio import AioPublisher
from amqptasks.broker.publisher import Publisher, ReplyTo
from amqptasks.broker.sent_events import SentEvents
from amqptasks.builtin import builtin_tasks
from amqptasks.calls import Callee, Calls, NamedCallee
from amqptasks.canvas import Signature
from amqptasks.client import Client
from amqptasks.config import Settings, load_settings
from amqptasks.config.quantities import parse_rate
from amqptasks.control import Control
from amqptasks.errors import ConfigError
from amqptasks.making import class_task, make_task
from amqptasks.message import Envelope
from amqptasks.options import TaskOptions, TaskOptionsArguments
from amqptasks.periodic import Periodic
from amqptasks.results import AsyncResult as Handle
from amqptasks.results import GroupResult as GroupHandle
from amqptasks.results.access import NoResults, Results, StoredResults
from amqptasks.results.async_result import use_results_of
from amqptasks.results.inbox import ReplyInbox
from amqptasks.results.store import ResultStore
from amqptasks.results.stores import open_store
from amqptasks.routing import Router
from amqptasks.task import Task
from amqptasks.topology import Topology, build_topology

__all__ = ["AmqpTasks", "current_app", "shared_task"]

P = ParamSpec("P")
R = TypeVar("R")
AnyTask = Task[..., Any]

#: Tasks of `shared_task`: every app has them.
_shared: dict[str, AnyTask] = {}
_last_app: AmqpTasks | None = None
_NONE: Mapping[str, Any] = {}


class AmqpTasks(Periodic):
    """The tasks of one application and the way to the broker.

    Args:
        name: shown in logs, and the prefix of tasks that are defined in ``__main__``.
        config: path of the YAML file, or its content as a mapping. By default ``$AMQPTASKS_CONFIG``,
            ``./config/amqptasks.yaml`` or ``./amqptasks.yaml``, where there is one.
        broker: AMQP URL or several nodes; wins over file and environment.
        backend: result store; wins over file and environment.
        include: modules that define tasks; the worker imports them.
    """

    def __init__(
        self,
        name: str,
        *,
        config: str | Path | Mapping[str, Any] | None = None,
        broker: str | Sequence[str] | None = None,
        backend: str | None = None,
        include: Iterable[str] = (),
    ) -> None:
        global _last_app  # noqa: PLW0603 - `shared_task` finds the app that was made last, as Celery users expect
        self.name = name
        self._config = config
        self._overrides: dict[str, Any] = {}
        if broker is not None:
            self._overrides["broker"] = {"url": broker}
        if backend is not None:
            self._overrides["result"] = {"backend": backend}
        self._include = list(include)
        self._own: dict[str, AnyTask] = {}
        #: Every task by name: the app's own, and those of `shared_task`.
        self.tasks: Mapping[str, AnyTask] = ChainMap(self._own, _shared, self._builtin())
        self._lock = threading.RLock()
        _last_app = self

    def __repr__(self) -> str:
        return f"<AmqpTasks {self.name}>"

    # -- settings -------------------------------------------------------------------------------------------------

    @cached_property
    def settings(self) -> Settings:
        """The effective settings. Raises `ConfigError`."""
        with self._lock:
            if isinstance(self._config, Mapping):
                return load_settings(data=self._config, overrides=self._overrides)
            return load_settings(self._config, overrides=self._overrides)

    def configure(
        self,
        *,
        config: str | Path | None = None,
        broker: str | None = None,
        worker: Mapping[str, object] | None = None,
    ) -> None:
        """Read another file, or use another broker, as the command line's flags say. Before the first call only."""
        if config is not None:
            self._config = config
        if broker is not None:
            self._overrides["broker"] = {"url": broker}
        if worker:
            self._overrides["worker"] = dict(worker)
        for name in ("settings", "router", "topology", "results", "result_store", "calls", "control", "_eager"):
            self.__dict__.pop(name, None)

    @cached_property
    def router(self) -> Router:
        """Resolves the route of a call."""
        return Router(self.settings)

    @cached_property
    def topology(self) -> Topology:
        """What the settings declare in the broker."""
        return build_topology(self.settings, {name: scope for name, (_, scope) in self.rate_limits().items()})

    def declare(self) -> None:
        """Declare exchanges, queues and bindings. Idempotent. Raises `TopologyConflict`, `BrokerError`."""
        declare(self.topology, self.settings.broker, passive=not self.settings.topology.declare)

    # -- tasks ----------------------------------------------------------------------------------------------------

    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self, *, bind: Literal[True], base: type[AnyTask] = ..., **options: Unpack[TaskOptionsArguments]
    ) -> Callable[[Callable[Concatenate[Any, P], R]], Task[P, R]]: ...
    @overload
    def task(
        self, *, bind: Literal[False] = False, base: type[AnyTask] = ..., **options: Unpack[TaskOptionsArguments]
    ) -> Callable[[Callable[P, R]], Task[P, R]]: ...
    def task(
        self, *function: Callable[..., Any], bind: bool = False, base: type[AnyTask] = Task, **options: Any
    ) -> Any:
        """Make a function a task: ``@app.task`` or ``@app.task(bind=True, queue="email", …)``.

        `base` is a subclass of `Task` with hooks and options of its own. Raises `ConfigError` for an option that does
        not exist or does not fit.
        """

        def decorate(wrapped: Callable[..., Any]) -> AnyTask:
            return self._add(make_task(wrapped, self.name, bind, base, options, lambda: self))

        return decorate(*function) if function else decorate

    def register_task(self, task: type[AnyTask] | AnyTask) -> AnyTask:
        """Add a task that is a class: a subclass of `Task` with a `run` method. Raises `ConfigError`."""
        return self._add(class_task(task, self.name, lambda: self))

    def _add(self, made: AnyTask) -> AnyTask:
        other = self._own.get(made.name)
        # The same function again is a module that is reloaded; another one would take its messages.
        if other is not None and (other.__module__, other.__qualname__) != (made.__module__, made.__qualname__):
            raise ConfigError(f"task {made.name!r} is defined twice: {other.function!r} and {made.function!r}")
        self._own[made.name] = made
        return made

    def effective_options(self, task: AnyTask) -> TaskOptions:
        """The task's options with the file's ``tasks:`` section on top; later patterns win."""
        return task.declared_options.merged(self._options_of(task.name))

    def _options_of(self, name: str) -> dict[str, Any]:
        """What the settings say of a task."""
        found: dict[str, Any] = {}
        for pattern, extra in self.settings.tasks.items():
            if fnmatchcase(name, pattern):
                found.update(extra.model_dump(exclude_unset=True))
        return found

    def rate_limits(self) -> dict[str, tuple[float, str]]:
        """Task -> (starts a second, scope) of those that have a rate limit, or had one: 0 lifts it."""
        return {
            name: (parse_rate(task.options.rate_limit), task.options.rate_limit_scope)
            for name, task in self.tasks.items()
            if task.options.rate_limit is not None
        }

    def import_tasks(self) -> None:
        """Import the modules of ``include``, here and in the settings. Raises `ConfigError` naming the module."""
        for module in (*self._include, *self.settings.include):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
                    raise ConfigError(f"include: module {module!r} does not exist") from None
                raise
        self._check_queues()
        self.__dict__.pop("topology", None)  # which may have been asked for when some tasks were not known

    def autodiscover_tasks(self, packages: Iterable[str], related_name: str = "tasks") -> None:
        """Have the worker import ``<package>.<related_name>`` of each package, where it exists."""
        for package in packages:
            if importlib.util.find_spec(f"{package}.{related_name}") is not None:
                self._include.append(f"{package}.{related_name}")

    def _check_queues(self) -> None:
        declared = self.settings.queues
        for task in self.tasks.values():
            queue = task.options.queue
            if queue is not None and queue not in declared:
                raise ConfigError(
                    f"task {task.name}: queue {queue!r} is not declared; queues: {', '.join(sorted(declared))}"
                )

    # -- calls ----------------------------------------------------------------------------------------------------

    @cached_property
    def calls(self) -> Calls:
        """Makes the messages of calls."""
        return Calls(self.settings, self.router, self._callee)

    @cached_property
    def client(self) -> Client:
        """Publishes calls; opens its connection at the first one."""
        with self._lock:
            settings = self.settings
            common: dict[str, Any] = {"declare": self.declare, "knows_route": self.topology.routes, "name": self.name}
            common["keys"] = self.calls.keys
            results = self.results
            inbox = results if isinstance(results, ReplyInbox) else None
            replies = None
            if inbox is not None:
                replies = ReplyTo(inbox.take, inbox.gone, inbox.give_up, settings.result.expires)
            publisher = Publisher(settings.broker, **common, replies_to=replies)
            return Client(
                self.calls,
                publisher,
                AioPublisher(settings.broker, **common),
                results=results,
                inbox=inbox,
                eager=self._run_eagerly if settings.testing.always_eager else None,
                sent_events=SentEvents(publisher) if settings.events.send_sent else None,
            )

    def _run_eagerly(self, envelopes: Sequence[Envelope]) -> None:
        self._eager.run(envelopes)

    @cached_property
    def _eager(self) -> Any:
        store = self.result_store if self.settings.testing.store_eager_result else None
        # What runs tasks: only who asks for it pays for it.
        eager = importlib.import_module("amqptasks.eager")
        return eager.Eager(self.settings, self.calls, self.tasks, self.results, store)

    @cached_property
    def control(self) -> Control:
        """Words to the workers: `revoke`."""
        settings = self.settings
        return Control(self.client, settings.topology.prefix, expires=settings.revoke.expires)

    # -- results --------------------------------------------------------------------------------------------------

    @cached_property
    def results(self) -> Results:
        """Where callers of this process find results. Raises `ConfigError`."""
        made: Results
        if self.settings.testing.always_eager or self.settings.result.backend.startswith("rpc://"):
            made = ReplyInbox()
        else:
            made = NoResults() if self.result_store is None else StoredResults(self.result_store)
        made.revoker = lambda: self.control
        return made

    @cached_property
    def result_store(self) -> ResultStore | None:
        """The store that all processes share; None where results are replies, or are not kept."""
        result = self.settings.result
        if result.backend == "none" or result.backend.startswith("rpc://"):
            return None
        return open_store(result.backend, expires=result.expires or None)

    def AsyncResult(self, task_id: str) -> Handle[Any]:
        """The handle of a task by its id."""
        return Handle(task_id, self.results)

    def GroupResult(self, group_id: str) -> GroupHandle | None:
        """The handle of a group that `GroupResult.save` kept, or None."""
        return GroupHandle.restore(group_id, self.results)

    def send_task(
        self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Handle[Any]:
        """Publish a call by name, for a task whose code is not importable here. Options as in `Task.apply_async`."""
        return self.client.send(self._callee(name), args, kwargs or {}, **options)

    async def asend_task(
        self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Handle[Any]:
        """`send_task` for asyncio."""
        return await self.client.asend(self._callee(name), args, kwargs or {}, **options)

    def send_many(self, signatures: Iterable[Signature]) -> list[Handle[Any]]:
        """Publish many signatures with one pipelined wait for all confirms, in order.

        Raises the first `PublishError`, with all of them in its ``failed`` attribute as ``(index, error)``.
        """
        calls = [(self._callee(one.task), one.args, one.kwargs, one.options) for one in signatures]
        return self.client.send_many(calls)

    def signature(
        self, task: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Signature:
        """A signature of the task named `task`, that this app sends."""
        return Signature(task, tuple(args), kwargs or {}, options, sender=self)

    def apply_signature(self, signature: Signature, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = _NONE) -> Any:
        """Publish a signature of any kind. Returns the handle of its end: an `AsyncResult` or a `GroupResult`."""
        return self.client.apply(signature, args, kwargs)

    async def aapply_signature(
        self, signature: Signature, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = _NONE
    ) -> Any:
        """`apply_signature` for asyncio."""
        return await self.client.aapply(signature, args, kwargs)

    @cached_property
    def dead_letters(self) -> Any:
        """The dead letters of the app's queues: `amqptasks.deadletters.DeadLetters`."""
        # For operators: a program that only publishes does not import it.
        return importlib.import_module("amqptasks.deadletters").DeadLetters(self, self.client.publish_many)

    def close(self) -> None:
        """Close the connections of this process, if they were opened."""
        if "client" in self.__dict__:
            self.client.close()
        if "results" in self.__dict__:
            self.results.close()

    async def aclose(self) -> None:
        """Close the connection of this event loop and those of this process, if they were opened.

        An asyncio server may end by a signal without Python's exit handlers: have its shutdown call this.
        """
        if "client" in self.__dict__:
            await self.client.aclose()
        await asyncio.to_thread(self.close)

    def _task_named(self, name: str) -> AnyTask | None:
        return self.tasks.get(name)

    def _builtin(self) -> dict[str, AnyTask]:
        made: dict[str, AnyTask] = {}
        for name, function in builtin_tasks(self._task_named, lambda: self.calls.claims).items():
            made[name] = Task[..., Any]().made_of(
                function, name=name, options=TaskOptions(max_retries=0), bind=False, host=lambda: self
            )
        return made

    def _callee(self, name: str) -> Callee:
        return self.tasks.get(name) or NamedCallee(name, TaskOptions().merged(self._options_of(name)))


def current_app() -> AmqpTasks:
    """The app that was made last in this process. Raises `ConfigError` when there is none."""
    if _last_app is None:
        raise ConfigError("no app: create AmqpTasks(…) and import its module before a shared task is called")
    return _last_app


@overload
def shared_task(function: Callable[P, R], /) -> Task[P, R]: ...
@overload
def shared_task(
    *, bind: Literal[True], base: type[AnyTask] = ..., **options: Unpack[TaskOptionsArguments]
) -> Callable[[Callable[Concatenate[Any, P], R]], Task[P, R]]: ...
@overload
def shared_task(
    *, bind: Literal[False] = False, base: type[AnyTask] = ..., **options: Unpack[TaskOptionsArguments]
) -> Callable[[Callable[P, R]], Task[P, R]]: ...
def shared_task(*function: Callable[..., Any], bind: bool = False, base: type[AnyTask] = Task, **options: Any) -> Any:
    """Make a function a task of whichever app there is: for libraries and reusable packages."""

    def decorate(wrapped: Callable[..., Any]) -> AnyTask:
        made = make_task(wrapped, "shared", bind, base, options, current_app)
        _shared[made.name] = made
        return made

    return decorate(*function) if function else decorate


use_results_of(lambda: current_app().results)

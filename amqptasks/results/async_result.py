"""The handles of what was sent: `AsyncResult` of a task, `ResultSet` and `GroupResult` of several."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from amqptasks.errors import ConfigError, ResultUnavailable
from amqptasks.protocol import jsontypes
from amqptasks.protocol.results import ResultMeta
from amqptasks.results.access import Results, revoker_of
from amqptasks.results.ancestry import lineage, members, written
from amqptasks.results.raising import check_place, late, raise_remote
from amqptasks.results.waiting import wait_async, wait_blocking
from amqptasks.states import EXCEPTION_STATES, SUCCESS

__all__ = ["AsyncResult", "Expected", "GroupResult", "ResultSet", "from_handle", "use_results_of"]

R = TypeVar("R")

_default: Callable[[], Results] | None = None


def use_results_of(default: Callable[[], Results]) -> None:
    """Where `AsyncResult(id)` looks when it is made by hand."""
    global _default  # noqa: PLW0603 - the app is above this module, and sets it once
    _default = default


def _default_results() -> Results:
    if _default is None:
        raise ConfigError("no app: create AmqpTasks(…) before AsyncResult(id)")
    return _default()


class AsyncResult(Generic[R]):
    """The handle of a published task.

    From `delay()` it comes only after the broker's confirm: holding one means that the broker holds the message.

    Args:
        id: the task's id.
        results: where its result comes from; the app that was made last, by default.
    """

    __slots__ = ("_convert", "_ignored", "_results", "_token", "id", "parent")

    def __init__(
        self,
        id: str,
        results: Results | None = None,
        *,
        parent: AsyncResult[Any] | GroupResult | None = None,
        convert: Callable[[Any], Any] | None = None,
        ignored: bool = False,
    ) -> None:
        #: The task's id, the message's `correlation_id`.
        self.id = id
        #: The handle of what ran before it in a chain or chord.
        self.parent = parent
        self._results = _default_results() if results is None else results
        self._convert = convert
        self._ignored = ignored
        self._token = self._results.track(id)

    @property
    def task_id(self) -> str:
        """The same as `id`."""
        return self.id

    # -- waiting --------------------------------------------------------------------------------------------------

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float | None = None,
        *,
        disable_sync_subtasks: bool = True,
    ) -> R:
        """Wait for the task and return its value.

        Args:
            timeout: seconds; None waits for as long as it takes.
            propagate: False returns the exception of a task that failed, instead of raising it.
            interval: Celery's, and not needed: the result tells, or its store knows how often to look.
            disable_sync_subtasks: False allows waiting inside a task, which can block all executors for ever.

        Raises:
            ResultTimeout: not ready in time; the task may still run.
            ResultUnavailable: there is no result to be had.
            StoreUnavailable: the result store cannot be used.
            the task's exception: when it failed; `RemoteError` under its name when its class is not imported here.
        """
        check_place(disable_sync_subtasks)
        wait_blocking(self.id, self._listen, self._is_gone, timeout)
        value: R = self._value(self._meta(), propagate)
        return value

    async def aget(self, timeout: float | None = None, propagate: bool = True) -> R:  # noqa: ASYNC109 - as `get`
        """`get` for asyncio: never blocks the loop."""
        value: R = self._value(await wait_async(self.id, self._listen, self._meta, self._is_gone, timeout), propagate)
        return value

    def _is_gone(self) -> bool:
        return getattr(self._token, "lost", None) is not None

    def _listen(self, told: Callable[[ResultMeta], None]) -> Callable[[], None]:
        self._check()
        return self._results.listen([self.id], told)

    def _meta(self) -> ResultMeta:
        self._check()
        return self._results.meta(self.id)

    def _check(self) -> None:
        if self._ignored:
            raise ResultUnavailable(f"task {self.id} was sent with ignore_result: it keeps no result")

    def _value(self, meta: ResultMeta, propagate: bool) -> Any:
        if meta.status in EXCEPTION_STATES:
            if propagate:
                raise_remote(meta)
            return meta.result
        return self._converted(meta.result) if meta.status == SUCCESS else meta.result

    def _converted(self, value: Any) -> Any:
        return value if self._convert is None else self._convert(value)

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """The state now. Raises `ResultUnavailable`, `StoreUnavailable`."""
        return str(self._meta().status)

    status = state

    @property
    def result(self) -> Any:
        """The value; the exception of a task that failed; what `update_state` said; None while nothing is known."""
        return self._value(self._meta(), propagate=False)

    info = result

    @property
    def traceback(self) -> str | None:
        """The traceback of a task that failed, where it ran."""
        return self._meta().traceback

    @property
    def date_done(self) -> str | None:
        """When it ended: ISO 8601, UTC."""
        return self._meta().date_done

    @property
    def children(self) -> list[AsyncResult[Any] | GroupResult]:
        """The handles of tasks that this task sent, and of those that followed it."""
        return [from_handle(one, self._results) for one in self._meta().children]

    def ready(self) -> bool:
        """Whether it ended."""
        return self._meta().ready

    def successful(self) -> bool:
        """Whether it ended well."""
        return self._meta().status == SUCCESS

    def failed(self) -> bool:
        """Whether it failed for good."""
        return self._meta().status == "FAILURE"

    def forget(self) -> None:
        """Drop the result, and what came before it in a chain."""
        for one in lineage(self):
            self._results.forget([one.id] if isinstance(one, AsyncResult) else [part.id for part in one.results])

    def revoke(self, terminate: bool = False, signal: str | int = "SIGTERM") -> None:
        """Have it not run any more, wherever its message waits; with `terminate`, end it where it runs, too.

        Returns after the broker's confirm; a worker that meets it makes it ``REVOKED``. Raises as `Control.revoke`.
        """
        revoker_of(self._results).revoke(self.id, terminate, signal)

    async def arevoke(self, terminate: bool = False, signal: str | int = "SIGTERM") -> None:
        """`revoke` for asyncio."""
        await revoker_of(self._results).arevoke(self.id, terminate, signal)

    def as_tuple(self) -> tuple[Any, Any]:
        """Celery's form of a handle: ``((id, parent), None)``."""
        return (self.id, written(self.parent)), None

    def __repr__(self) -> str:
        return f"<AsyncResult {self.id}>"

    def __str__(self) -> str:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncResult) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)


class ResultSet:
    """Several handles as one."""

    def __init__(self, results: Iterable[AsyncResult[Any] | GroupResult]) -> None:
        self.results = list(results)

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[AsyncResult[Any] | GroupResult]:
        return iter(self.results)

    def __getitem__(self, index: int) -> AsyncResult[Any] | GroupResult:
        return self.results[index]

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float | None = None,
        *,
        disable_sync_subtasks: bool = True,
    ) -> list[Any]:
        """Wait for all and return their values in order. As `AsyncResult.get`; `timeout` is for all of them."""
        end = None if timeout is None else time.monotonic() + timeout
        values = []
        for one in self.results:
            left = None if end is None else max(0.0, end - time.monotonic())
            values.append(one.get(left, propagate, disable_sync_subtasks=disable_sync_subtasks))
        return values

    join = get

    async def aget(self, timeout: float | None = None, propagate: bool = True) -> list[Any]:  # noqa: ASYNC109 - as `get`
        """`get` for asyncio."""
        end = None if timeout is None else time.monotonic() + timeout
        values = []
        for one in self.results:
            left = None if end is None else max(0.0, end - time.monotonic())
            values.append(await one.aget(left, propagate))
        return values

    def iter(
        self, timeout: float | None = None, *, propagate: bool = True
    ) -> Iterator[tuple[AsyncResult[Any] | GroupResult, Any]]:
        """(handle, value) of each as it ends. Raises as `get`."""
        check_place(True)
        end = None if timeout is None else time.monotonic() + timeout
        single = {one.id: one for one in self.results if isinstance(one, AsyncResult)}
        news: queue.SimpleQueue[str] = queue.SimpleQueue()
        stop = None
        if single:
            for task in single.values():
                task._check()
            first = next(iter(single.values()))

            def told(meta: ResultMeta) -> None:
                if meta.ready or single[meta.task_id]._is_gone():
                    news.put(meta.task_id)

            stop = first._results.listen(single, told)
        try:
            left = dict(single)
            while left:
                try:
                    found = left.pop(news.get(timeout=None if end is None else max(0.0, end - time.monotonic())), None)
                except queue.Empty:
                    raise late(list(left), timeout) from None
                if found is not None:
                    yield found, found.get(0, propagate=propagate)
        finally:
            if stop is not None:
                stop()
        for one in self.results:
            if not isinstance(one, AsyncResult):
                yield one, one.get(None if end is None else max(0.0, end - time.monotonic()), propagate=propagate)

    def completed_count(self) -> int:
        """How many ended well."""
        return sum(one.successful() for one in self.results)

    def ready(self) -> bool:
        """Whether all ended."""
        return all(one.ready() for one in self.results)

    def successful(self) -> bool:
        """Whether all ended well."""
        return all(one.successful() for one in self.results)

    def failed(self) -> bool:
        """Whether one of them failed."""
        return any(one.failed() for one in self.results)

    def waiting(self) -> bool:
        """Whether one of them has not ended."""
        return not self.ready()

    def revoke(self, terminate: bool = False, signal: str | int = "SIGTERM") -> None:
        """`AsyncResult.revoke` of all, in one go."""
        found = list(self._tasks())
        if found:
            revoker_of(found[0]._results).revoke([one.id for one in found], terminate, signal)

    def _tasks(self) -> Iterator[AsyncResult[Any]]:
        for one in self.results:
            yield from one._tasks() if isinstance(one, ResultSet) else (one,)

    async def arevoke(self, terminate: bool = False, signal: str | int = "SIGTERM") -> None:
        """`revoke` for asyncio."""
        await asyncio.to_thread(self.revoke, terminate, signal)

    def forget(self) -> None:
        """Drop all results."""
        for one in self.results:
            one.forget()


class GroupResult(ResultSet):
    """The handle of a group."""

    def __init__(
        self,
        id: str,
        results: Iterable[AsyncResult[Any] | GroupResult],
        parent: AsyncResult[Any] | GroupResult | None = None,
        access: Results | None = None,
    ) -> None:
        super().__init__(results)
        self.id, self.parent = id, parent
        self._access = access or next((one._results for one in self.results if isinstance(one, AsyncResult)), None)

    def save(self) -> None:
        """Keep this handle in the result store, for `restore` in another process. Raises `ResultUnavailable`."""
        table = {"result": self.as_tuple()}
        (self._access or _default_results()).save_group(self.id, jsontypes.dumps(table))

    @classmethod
    def restore(cls, id: str, access: Results | None = None) -> GroupResult | None:
        """The handle that `save` kept, or None."""
        access = access or _default_results()
        found = access.load_group(id)
        if found is None:
            return None
        made = from_handle(jsontypes.loads(found)["result"], access)
        assert isinstance(made, GroupResult)
        return made

    def delete(self) -> None:
        """Drop what `save` kept."""
        (self._access or _default_results()).delete_group(self.id)

    def as_tuple(self) -> tuple[Any, Any]:
        """Celery's form of a handle: ``((id, parent), [children])``."""
        return (self.id, written(self.parent)), [one.as_tuple() for one in self.results]

    def __repr__(self) -> str:
        return f"<GroupResult {self.id} of {len(self.results)}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupResult) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)


class Expected(NamedTuple):
    """What a caller knows of a task's result before it comes."""

    #: Makes the value of its JSON.
    convert: Callable[[Any], Any] | None = None
    ignored: bool = False


_ANYTHING = Expected()


def from_handle(
    handle: Any, results: Results, expected: Mapping[str, Expected] = MappingProxyType({})
) -> AsyncResult[Any] | GroupResult:
    """The object of a handle in Celery's tuple form. `expected`: what is known of the tasks of these ids."""
    made: AsyncResult[Any] | GroupResult | None = None
    for id, children in reversed(members(handle)):
        if children is None:
            known = expected.get(id, _ANYTHING)
            made = AsyncResult(id, results, parent=made, convert=known.convert, ignored=known.ignored)
        else:
            made = GroupResult(id, [from_handle(one, results, expected) for one in children], made, results)
    assert made is not None
    return made

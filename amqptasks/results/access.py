"""How callers reach results, whatever keeps them: one small interface, and its two plain implementations."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from amqptasks.errors import ConfigError, DecodeError, ResultUnavailable
from amqptasks.protocol.results import ResultMeta, decode_result
from amqptasks.results.store import ResultStore

__all__ = ["Listener", "NoResults", "Results", "Revoker", "StoredResults", "revoker_of", "tell"]

logger = logging.getLogger(__name__)

#: A look at a store that is away ends by itself after so long at most, or nearly.
_END_SECONDS = 20.0
#: Called with each change of a result, from any thread.
Listener = Callable[[ResultMeta], None]


class Revoker(Protocol):
    """Has tasks not run any more."""

    def revoke(self, task_id: str | Iterable[str], terminate: bool = False, signal: str | int = "SIGTERM") -> None:
        """Revoke them, and return when that is durable."""

    async def arevoke(
        self, task_id: str | Iterable[str], terminate: bool = False, signal: str | int = "SIGTERM"
    ) -> None:
        """`revoke` for asyncio."""


class Results(Protocol):
    """Where results come from. Thread-safe."""

    #: Who revokes the tasks of these results; the app sets it.
    revoker: Callable[[], Revoker] | None

    def track(self, task_id: str) -> Any:
        """Something that a handle keeps for as long as it may ask for the result."""

    def meta(self, task_id: str) -> ResultMeta:
        """What is known now; ``PENDING`` when nothing is. Raises `ResultUnavailable`, `StoreUnavailable`."""

    def listen(self, task_ids: Iterable[str], listener: Listener) -> Callable[[], None]:
        """Tell `listener` what is known, and each change, until the returned function is called. Raises as `meta`."""

    def forget(self, task_ids: Iterable[str]) -> None:
        """Drop these results."""

    def save_group(self, group_id: str, encoded: bytes) -> None:
        """Keep a group's handle for other processes. Raises `ResultUnavailable` where that cannot be."""

    def load_group(self, group_id: str) -> bytes | None:
        """The handle that `save_group` kept."""

    def delete_group(self, group_id: str) -> None:
        """Drop it."""

    def close(self) -> None:
        """Close connections."""


def tell(listener: Listener, meta: ResultMeta) -> None:
    """Call a listener. One that raises ends neither the thread that tells nor the others' waiting."""
    try:
        listener(meta)
    except Exception:
        logger.exception("A listener of the result of %s raised", meta.task_id)


def revoker_of(results: Results) -> Revoker:
    """Who revokes the tasks of these results. Raises `ConfigError` where there is no app."""
    if results.revoker is None:
        raise ConfigError("no app: create AmqpTasks(…) before a task is revoked")
    return results.revoker()


class NoResults:
    """No store is set: whoever asks is told at once."""

    revoker: Callable[[], Revoker] | None = None
    _TEXT = "result.backend is none: no task keeps a result. Set it to rpc:// or to a store"

    def track(self, task_id: str) -> Any:
        """Nothing to keep."""
        return None

    def meta(self, task_id: str) -> ResultMeta:
        """Raises `ResultUnavailable`."""
        raise ResultUnavailable(self._TEXT)

    def listen(self, task_ids: Iterable[str], listener: Listener) -> Callable[[], None]:
        """Raises `ResultUnavailable`."""
        raise ResultUnavailable(self._TEXT)

    def forget(self, task_ids: Iterable[str]) -> None:
        """Nothing to drop."""

    def save_group(self, group_id: str, encoded: bytes) -> None:
        """Raises `ResultUnavailable`."""
        raise ResultUnavailable(self._TEXT)

    def load_group(self, group_id: str) -> bytes | None:
        """Raises `ResultUnavailable`."""
        raise ResultUnavailable(self._TEXT)

    def delete_group(self, group_id: str) -> None:
        """Nothing to drop."""

    def close(self) -> None:
        """Nothing to close."""


class StoredResults:
    """Results in a store that all processes share."""

    revoker: Callable[[], Revoker] | None = None

    def __init__(self, store: ResultStore) -> None:
        self._store = store
        self._poller = _Poller(store)

    def track(self, task_id: str) -> Any:
        """Nothing to keep: the store does."""
        return None

    def meta(self, task_id: str) -> ResultMeta:
        """What the store has."""
        found = self._store.get([task_id]).get(task_id)
        return ResultMeta(task_id) if found is None else decode_result(found)

    def listen(self, task_ids: Iterable[str], listener: Listener) -> Callable[[], None]:
        """By the store's own news, or by looking again."""
        ids = list(task_ids)

        def told(_task_id: str, encoded: bytes) -> None:
            try:
                meta = decode_result(encoded)
            except DecodeError:
                return  # not a result: whoever waits goes on waiting
            tell(listener, meta)

        if self._store.poll_seconds:
            return self._poller.listen(ids, told)
        # First the news, then a look: what changes in between is told twice, never missed.
        stop = self._store.listen(ids, told)
        try:
            for task_id, encoded in self._store.get(ids).items():
                told(task_id, encoded)
        except BaseException:
            stop()
            raise
        return stop

    def forget(self, task_ids: Iterable[str]) -> None:
        """Delete them from the store."""
        self._store.delete(list(task_ids))

    def save_group(self, group_id: str, encoded: bytes) -> None:
        """Keep it in the store."""
        self._store.put_group(group_id, encoded)

    def load_group(self, group_id: str) -> bytes | None:
        """Read it from the store."""
        return self._store.get_group(group_id)

    def delete_group(self, group_id: str) -> None:
        """Delete it from the store."""
        self._store.delete_group(group_id)

    def close(self) -> None:
        """Close the store's connections. Who waits hears nothing more."""
        self._poller.close()
        self._store.close()


class _Poller:
    """One thread that looks for all results that are waited for. It ends when nobody waits."""

    _BATCH = 500

    def __init__(self, store: ResultStore) -> None:
        self._store = store
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[set[str], Callable[[str, bytes], None], dict[str, bytes]]] = {}
        self._number = 0
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()

    def listen(self, ids: list[str], told: Callable[[str, bytes], None]) -> Callable[[], None]:
        if self._pid != os.getpid():
            self._reset()  # who waits in the parent does not wait here, and its lock may be held
        seen = {}
        for start in range(0, len(ids), self._BATCH):
            seen.update(self._store.get(ids[start : start + self._BATCH]))
        for task_id, encoded in seen.items():
            told(task_id, encoded)
        with self._lock:
            self._number = number = self._number + 1
            self._waiting[number] = (set(ids), told, seen)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, args=(self._ending,), name="amqptasks-results", daemon=True
                )
                self._thread.start()

        def stop() -> None:
            with self._lock:
                self._waiting.pop(number, None)

        return stop

    def close(self) -> None:
        """End the thread. What it looked for when the store is closed would leave a connection open."""
        if self._pid != os.getpid():
            return
        with self._lock:
            thread, self._thread = self._thread, None
            self._waiting.clear()
            self._ending.set()
            self._ending = threading.Event()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_END_SECONDS)

    def _run(self, ending: threading.Event) -> None:
        pause = self._store.poll_seconds / 10
        while not ending.wait(pause):
            pause = min(self._store.poll_seconds, pause * 1.5)
            with self._lock:
                if ending.is_set():
                    return
                if not self._waiting:
                    self._thread = None
                    return
                waiting = list(self._waiting.values())
            wanted = sorted(set().union(*(ids for ids, _, _ in waiting)))
            try:
                found = {}
                for start in range(0, len(wanted), self._BATCH):
                    found.update(self._store.get(wanted[start : start + self._BATCH]))
            except Exception:  # noqa: S112 - the store is away: who waits has a deadline of his own, and it may come back
                continue
            for ids, told, seen in waiting:
                for task_id in ids & found.keys():
                    if seen.get(task_id) != found[task_id]:
                        seen[task_id] = found[task_id]
                        told(task_id, found[task_id])

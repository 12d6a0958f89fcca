"""Telling who waits: results and states, as replies over AMQP or into the store.

A reply is a message that the leader publishes before the ack. A store is written here, in the process that ran the
task, before the outcome is reported: so nothing is acknowledged whose result was promised and not kept.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from amqptasks.errors import DecodeError, SerializationError, StoreUnavailable
from amqptasks.message import Envelope
from amqptasks.protocol.results import ResultMeta, decode_result, encode_result
from amqptasks.request import Request
from amqptasks.results.store import ResultStore

__all__ = ["Reporter", "persist", "reply", "result_meta", "running_loop"]

_RETRY_FIRST, _RETRY_MAX = 0.2, 10.0
_log = structlog.get_logger("amqptasks.worker")


class Reporter:
    """Results of the tasks of one executor.

    Args:
        replies: whether results are replies (``rpc://``).
        store: where results are kept; None with replies, and where they are not kept.
    """

    def __init__(self, *, replies: bool, store: ResultStore | None) -> None:
        self._replies = replies
        self._store = store
        self._states = _States(self._write_state)

    @property
    def blocks(self) -> bool:
        """Whether a result is written by a call that waits for a server."""
        return self._store is not None

    def wanted(self, headers: dict[str, Any], reply_to: str | None) -> bool:
        """Whether anybody gets this task's result."""
        if headers.get("ignore_result"):
            return False
        return bool(reply_to) if self._replies else self._store is not None

    def final(self, meta: ResultMeta, reply_to: str | None, encoded: bytes | None = None) -> Sequence[Envelope]:
        """The messages that carry a result that will not change; into a store it is written at once.

        A store that is away is tried for as long as it takes: the task need not run again for it.
        """
        encoded = encode_result(meta) if encoded is None else encoded
        if self._replies:
            return (reply(meta.task_id, encoded, reply_to),) if reply_to else ()
        store = self._store
        if store is not None:
            persist("A result", lambda: store.put(meta.task_id, encoded, ready=meta.ready), meta.task_id)
        return ()

    def state(self, meta: ResultMeta, reply_to: str | None) -> Envelope | None:
        """A state on the way, once and best effort. Returns the message to send, if one is to be sent."""
        encoded = encode_result(meta)
        if self._replies:
            return reply(meta.task_id, encoded, reply_to) if reply_to else None
        if self._store is not None:
            if running_loop() is None:
                self._write_state(meta.task_id, encoded)
            else:
                self._states.put(meta.task_id, encoded)
        return None

    def _write_state(self, task_id: str, encoded: bytes) -> None:
        assert self._store is not None
        try:
            self._store.put(task_id, encoded, ready=False)
        except StoreUnavailable as error:
            _log.warning("A task's state cannot be stored", task_id=task_id, error=str(error))

    def ended(self, task_id: str) -> ResultMeta | None:
        """What the store knows of a task that has ended; None where it has not, or cannot be told."""
        if self._store is None:
            return None
        try:
            found = self._store.get([task_id]).get(task_id)
            meta = None if found is None else decode_result(found)
        except (StoreUnavailable, DecodeError):  # away, or what is there is no result
            return None
        return meta if meta is not None and meta.ready else None

    def chord_part(self, group_id: str, index: int, member: bytes) -> list[bytes] | None:
        """Count a part of a chord that Celery's own client started, in the store. Raises `SerializationError` where
        the store does not count."""
        count = getattr(self._store, "add_chord_part", None)
        if count is None:
            raise SerializationError(
                "the message is a part of a chord that Celery counts in its result backend: set result.backend to the "
                "same redis:// URL here, or start the chord with amqptasks"
            )
        found: list[list[bytes] | None] = []
        persist("A result", lambda: found.append(count(group_id, index, member)), group_id)
        return found[0]


class _States:
    """States of coroutines, written by a thread beside the event loop: of each task the last one."""

    def __init__(self, write: Callable[[str, bytes], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._waiting: dict[str, bytes] = {}
        self._running = False

    def put(self, task_id: str, encoded: bytes) -> None:
        with self._lock:
            self._waiting[task_id] = encoded
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="amqptasks-states", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                task_id = next(iter(self._waiting), None)
                if task_id is None:
                    self._running = False
                    return
                encoded = self._waiting.pop(task_id)
            try:
                self._write(task_id, encoded)
            except Exception:
                _log.exception("A task's state cannot be stored", task_id=task_id)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs on this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def result_meta(request: Request, state: str, result: Any, trace: str | None = None) -> ResultMeta:
    """The result of the task of this request."""
    return ResultMeta(
        request.id or "",
        state,
        result,
        trace or None,
        list(request.children),
        parent_id=request.parent_id,
        group_id=request.group,
    )


def reply(task_id: str, encoded: bytes, reply_to: str | None) -> Envelope:
    """The message of a result. Not mandatory: a caller that is gone needs no answer."""
    return Envelope("", reply_to or "", encoded, message_id=task_id, correlation_id=task_id, mandatory=False)


def persist(what: str, write: Callable[[], None], task_id: str | None) -> None:
    """Write to a store, for as long as it takes: a task that has run need not run again because a store is away."""
    pause = _RETRY_FIRST
    while True:
        try:
            write()
        except StoreUnavailable as error:
            _log.error(f"{what} cannot be stored; trying again", task_id=task_id, error=str(error), seconds=pause)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _RETRY_MAX)
        else:
            return

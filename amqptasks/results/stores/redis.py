"""Results in Redis, under Celery's keys: ``celery.result.AsyncResult`` reads ours, and ours reads Celery's.

``celery-task-meta-<id>`` holds the JSON and is the channel on which it is published (Celery 5.7, redis backend). So
waiting is push: one connection and one thread per process listen, while somebody waits.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import redis

from amqptasks.errors import StoreUnavailable
from amqptasks.results.store import ResultStore, StoredCallback

__all__ = ["RedisStore"]

_TASK, _GROUP = "celery-task-meta-", "celery-taskset-meta-"
_TIMEOUT = 5.0
_IDLE_SECONDS = 30.0
_BATCH = 500

#: Replace nothing that is ready. The states are those of `states.READY_STATES`.
_PUT_UNLESS_READY = """
local old = redis.call('GET', KEYS[1])
if old then
  local ok, meta = pcall(cjson.decode, old)
  if ok and type(meta) == 'table' then
    local status = meta['status']
    if status == 'SUCCESS' or status == 'FAILURE' or status == 'REVOKED' then return 0 end
  end
end
redis.call('SET', KEYS[1], ARGV[1])
if tonumber(ARGV[2]) > 0 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
redis.call('PUBLISH', KEYS[1], ARGV[1])
return 1
"""

#: One member per index; all of them once they are complete.
_ADD_PART = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], ARGV[1], ARGV[1])
redis.call('ZADD', KEYS[1], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
local size = redis.call('GET', KEYS[2])
if not size then return false end
if redis.call('ZCARD', KEYS[1]) < tonumber(size) + tonumber(redis.call('GET', KEYS[3]) or 0) then return false end
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""


class RedisStore(ResultStore):
    """`ResultStore` on redis-py. ``redis://``, ``rediss://`` and ``redis+socket://`` URLs."""

    def __init__(self, url: str, *, expires: float | None) -> None:
        super().__init__(url, expires=expires)
        parts = urlsplit(url)
        self._where = parts.path if parts.scheme == "redis+socket" else f"{parts.hostname}:{parts.port or 6379}"
        self._milliseconds = int(expires * 1000) if expires else 0
        address = "unix" + url[len("redis+socket") :] if parts.scheme == "redis+socket" else url
        self._client = redis.Redis.from_url(
            address, socket_timeout=_TIMEOUT, socket_connect_timeout=_TIMEOUT, health_check_interval=30
        )
        self._put_unless_ready = self._client.register_script(_PUT_UNLESS_READY)
        self._add_part = self._client.register_script(_ADD_PART)
        self._news = _News(self)

    def _run(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except redis.RedisError as error:
            raise self.unavailable(error) from error

    def unavailable(self, error: Exception) -> StoreUnavailable:
        """The error of this store, which names no password."""
        kind = "refused the password" if isinstance(error, redis.AuthenticationError) else f"cannot be used: {error}"
        return StoreUnavailable(f"Redis at {self._where} {kind}")

    def put(self, task_id: str, encoded: bytes, *, ready: bool) -> None:
        """SET and PUBLISH in one step."""
        key = _TASK + task_id
        if not ready:
            self._run(lambda: self._put_unless_ready(keys=[key], args=[encoded, self._milliseconds]))
            return

        def write() -> None:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.set(key, encoded, px=self._milliseconds or None)
                pipe.publish(key, encoded)
                pipe.execute()

        self._run(write)

    def get(self, task_ids: Sequence[str]) -> dict[str, bytes]:
        """MGET."""
        found: dict[str, bytes] = {}
        for start in range(0, len(task_ids), _BATCH):
            some = task_ids[start : start + _BATCH]
            keys = [_TASK + one for one in some]
            values = self._run(partial(self._client.mget, keys))
            found.update({one: value for one, value in zip(some, values, strict=True) if value is not None})
        return found

    def delete(self, task_ids: Sequence[str]) -> None:
        """DEL."""
        if task_ids:
            self._run(lambda: self._client.delete(*(_TASK + one for one in task_ids)))

    def put_group(self, group_id: str, encoded: bytes) -> None:
        """SET."""
        self._run(lambda: self._client.set(_GROUP + group_id, encoded, px=self._milliseconds or None))

    def get_group(self, group_id: str) -> bytes | None:
        """GET."""
        found: bytes | None = self._run(lambda: self._client.get(_GROUP + group_id))
        return found

    def delete_group(self, group_id: str) -> None:
        """DEL."""
        self._run(lambda: self._client.delete(_GROUP + group_id))

    def add_chord_part(self, group_id: str, index: int, member: bytes) -> list[bytes] | None:
        """Count a part of a chord that Celery's client started.

        Celery keeps the parts as members ``[1, task_id, state, result]`` (JSON) of the sorted set
        ``celery-taskset-meta-<group>.j``, the number of parts in ``….s`` and what was added later in ``….t``.

        Returns all parts in order when this one, or one that is delivered again, makes them complete; else None.
        """
        key = _GROUP + group_id
        lifetime = self._milliseconds or 86_400_000
        found = self._run(
            lambda: self._add_part(keys=[f"{key}.j", f"{key}.s", f"{key}.t"], args=[index, member, lifetime])
        )
        return None if found is None else list(found)

    def listen(self, task_ids: Iterable[str], callback: StoredCallback) -> Callable[[], None]:
        """Subscribe to these results."""
        return self._news.listen(list(task_ids), callback)

    def close(self) -> None:
        """Close all connections."""
        self._news.close()
        self._client.close()


class _News:
    """The subscriptions of one process."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._listeners: dict[str, list[StoredCallback]] = {}
        self._confirmed: dict[str, threading.Event] = {}
        self._pubsub: Any = None
        self._idle_since = time.monotonic()

    def listen(self, ids: list[str], callback: StoredCallback) -> Callable[[], None]:
        if self._pid != os.getpid():
            self._reset()  # the parent's connection and thread are not ours
        with self._lock:
            new = [one for one in ids if one not in self._listeners]
            for one in ids:
                self._listeners.setdefault(one, []).append(callback)
                self._confirmed.setdefault(one, threading.Event())
            waiting = [self._confirmed[one] for one in ids]
            try:
                self._subscribe(new)
            except redis.RedisError as error:
                self._forget(ids, callback)
                raise self._store.unavailable(error) from error
        until = time.monotonic() + _TIMEOUT
        for event in waiting:
            # Before the broker of news has confirmed, what is published is not heard.
            if not event.wait(max(0.0, until - time.monotonic())):
                self._forget(ids, callback)
                raise self._store.unavailable(redis.TimeoutError("no answer to SUBSCRIBE"))
        return lambda: self._forget(ids, callback)

    def _subscribe(self, ids: list[str]) -> None:
        if self._pubsub is None:
            # redis-py has no types there.
            self._pubsub = self._store._client.pubsub()  # type: ignore[no-untyped-call]
            ids = list(self._listeners)
            self._pubsub.subscribe(*(_TASK + one for one in ids))
            threading.Thread(target=self._run, args=(self._pubsub,), name="amqptasks-results", daemon=True).start()
        elif ids:
            self._pubsub.subscribe(*(_TASK + one for one in ids))

    def _forget(self, ids: list[str], callback: StoredCallback) -> None:
        with self._lock:
            gone = []
            for one in ids:
                callbacks = self._listeners.get(one, [])
                if callback in callbacks:
                    callbacks.remove(callback)
                if not callbacks and self._listeners.pop(one, None) is not None:
                    self._confirmed.pop(one, None)
                    gone.append(_TASK + one)
            self._idle_since = time.monotonic()
            if gone and self._pubsub is not None:
                try:
                    self._pubsub.unsubscribe(*gone)
                except redis.RedisError:
                    return  # the thread connects anew, with what is left

    def _run(self, pubsub: Any) -> None:
        pause = 0.05
        while pubsub is self._pubsub:
            try:
                message = pubsub.get_message(timeout=1.0)
                pause = 0.05
            except (redis.RedisError, OSError, ValueError, AttributeError):
                if pubsub is not self._pubsub:
                    return
                time.sleep(pause)
                pause = min(pause * 2, 2.0)
                self._look_again()
                continue
            if message is not None:
                self._handle(message)
            elif not self._listeners and time.monotonic() - self._idle_since > _IDLE_SECONDS:
                with self._lock:
                    if not self._listeners and pubsub is self._pubsub:
                        self._pubsub = None
                pubsub.close()
                return

    def _handle(self, message: dict[str, Any]) -> None:
        task_id = message["channel"].decode().removeprefix(_TASK)
        with self._lock:
            callbacks = list(self._listeners.get(task_id, ()))
            event = self._confirmed.get(task_id)
        if message["type"] == "subscribe" and event is not None:
            event.set()
        elif message["type"] == "message":
            for callback in callbacks:
                callback(task_id, message["data"])

    def _look_again(self) -> None:
        """After a lost connection redis-py subscribes again by itself; what was published meanwhile is looked up."""
        with self._lock:
            ids = list(self._listeners)
        try:
            found = self._store.get(ids) if ids else {}
        except StoreUnavailable:
            return
        for task_id, encoded in found.items():
            for callback in list(self._listeners.get(task_id, ())):
                callback(task_id, encoded)

    def close(self) -> None:
        with self._lock:
            pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None and self._pid == os.getpid():
            pubsub.close()

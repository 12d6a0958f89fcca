"""Results in Redis, under Celery's keys: ``celery.result.AsyncResult`` reads ours, and ours reads Celery's.

``celery-task-meta-<id>`` holds the JSON and is the channel on which it is published (Celery 5.7, redis backend). So
waiting is push: one connection and one thread per process listen, while somebody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from amqptasks.errors import StoreUnavailable
from amqptasks.results.store import ResultStore, StoredCallback
from amqptasks.results.stores.redis_news import News

__all__ = ["RedisStore"]

_TASK, _GROUP = "celery-task-meta-", "celery-taskset-meta-"
_TIMEOUT = 5.0
_BATCH = 500
#: Who finds the connection lost tries so many times more, for 0.6 s in all.
_AGAIN = 4
_PAUSE_FIRST, _PAUSE_MAX = 0.02, 0.5

#: Replace nothing that does not give way (`store.gives_way`). The states are those of `states.READY_STATES`.
_PUT = """
local old = redis.call('GET', KEYS[1])
if old then
  local ok, meta = pcall(cjson.decode, old)
  if ok and type(meta) == 'table' then
    local status = meta['status']
    if status == 'SUCCESS' then return 0 end
    if ARGV[3] == '0' and (status == 'FAILURE' or status == 'REVOKED') then return 0 end
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
        limits = {"socket_timeout": _TIMEOUT, "socket_connect_timeout": _TIMEOUT}
        # Here and not in the client, which would try to connect so often for each time that it tries a command.
        self._again = Retry(
            ExponentialBackoff(cap=_PAUSE_MAX, base=_PAUSE_FIRST), _AGAIN, supported_errors=(redis.ConnectionError,)
        )
        once = Retry(NoBackoff(), 0)
        self._client = redis.Redis.from_url(address, **limits, health_check_interval=30, retry=once)
        self._put_script = self._client.register_script(_PUT)
        self._add_part = self._client.register_script(_ADD_PART)
        self._news = News(
            _TASK,
            connect=lambda: redis.Redis.from_url(address, **limits, retry=once),
            look=self.get,
            unavailable=self.unavailable,
        )

    def _run(self, work: Callable[[], Any]) -> Any:
        """`work`, which may run again: a connection is lost in the moment in which it is used, or as it is made."""
        try:
            return self._again.call_with_retry(work, lambda _: None, lambda error: not _is_refused(error))
        except redis.RedisError as error:
            raise self.unavailable(error) from error

    def unavailable(self, error: Exception) -> StoreUnavailable:
        """The error of this store, which names no password."""
        kind = "refused the password" if _is_refused(error) else f"cannot be used: {error}"
        return StoreUnavailable(f"Redis at {self._where} {kind}")

    def put(self, task_id: str, encoded: bytes, *, ready: bool) -> None:
        """SET and PUBLISH in one step."""
        self._run(lambda: self._put_script(keys=[_TASK + task_id], args=[encoded, self._milliseconds, int(ready)]))

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


def _is_refused(error: Exception) -> bool:
    return isinstance(error, redis.AuthenticationError)

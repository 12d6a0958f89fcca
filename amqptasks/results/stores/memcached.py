"""Results in memcached. It may drop what it keeps when its memory is full: for results that can be missed."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from pymemcache.client.base import PooledClient
from pymemcache.client.hash import HashClient
from pymemcache.exceptions import MemcacheError, MemcacheServerError, MemcacheUnexpectedCloseError

from amqptasks.errors import SerializationError, StoreUnavailable
from amqptasks.results.store import ResultStore, gives_way

__all__ = ["MemcachedStore"]

T = TypeVar("T")
_TIMEOUT = 5.0
_TASK, _GROUP = "celery-task-meta-", "celery-taskset-meta-"
#: A longer time is taken for a date (memcached's protocol.txt, "Expiration times").
_LONGEST_RELATIVE = 30 * 86400
_TRIES = 20
_LEFT = (ConnectionResetError, BrokenPipeError, MemcacheUnexpectedCloseError)


class MemcachedStore(ResultStore):
    """`ResultStore` on pymemcache. ``memcached://host:11211`` or several hosts with commas."""

    poll_seconds: ClassVar[float] = 0.2

    def __init__(self, url: str, *, expires: float | None) -> None:
        super().__init__(url, expires=expires)
        hosts = urlsplit(url).netloc.rpartition("@")[2] or "127.0.0.1"
        self._servers = servers = [
            (host, int(port or 11211)) for host, _, port in (one.partition(":") for one in hosts.split(","))
        ]
        self._where = ", ".join(f"{host}:{port}" for host, port in servers)
        self._open()

    def _open(self) -> None:
        options: dict[str, Any] = {"connect_timeout": _TIMEOUT, "timeout": _TIMEOUT, "no_delay": True}
        self._pid = os.getpid()
        self._client: Any = (
            PooledClient(self._servers[0], **options)
            if len(self._servers) == 1
            else HashClient(self._servers, use_pooling=True, retry_attempts=1, dead_timeout=5, **options)
        )

    def _run(self, work: Callable[[Any], T]) -> T:
        if self._pid != os.getpid():
            self._open()  # the connections that were open before the fork are the parent's
        tries = _TRIES
        while True:
            try:
                return work(self._client)
            except _LEFT as error:
                # The pool has connections that the server left while nobody used them. Each try costs it one.
                tries -= 1
                if not tries:
                    raise self._unavailable(error) from error
            except MemcacheServerError as error:
                if b"too large" in b"".join(one if isinstance(one, bytes) else str(one).encode() for one in error.args):
                    raise SerializationError(
                        "the result is larger than memcached's item limit (-I, 1 MiB by default): return less, or use "
                        "another result store"
                    ) from None
                raise self._unavailable(error) from error
            except (MemcacheError, OSError) as error:
                raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"memcached at {self._where} cannot be used: {error}")

    @property
    def _lifetime(self) -> int:
        if not self.expires:
            return 0
        # memcached's clock has whole seconds: one more, so that nothing is gone before its time.
        seconds = math.ceil(self.expires) + 1
        return int(time.time()) + seconds if seconds > _LONGEST_RELATIVE else seconds

    def put(self, task_id: str, encoded: bytes, *, ready: bool) -> None:
        """add; or, where there is one already, compare and swap."""
        key = _key(_TASK, task_id)
        for _ in range(_TRIES):
            if self._run(lambda client: client.add(key, encoded, expire=self._lifetime, noreply=False)):
                return
            found, token = self._run(lambda client: client.gets(key))
            if found is not None:
                if not gives_way(found, ready=ready):
                    return
                # mypy cannot infer a lambda that has a default.
                done = self._run(
                    lambda client, token=token: client.cas(key, encoded, token, self._lifetime, noreply=False)  # type: ignore[misc]  # mypy cannot infer a default
                )
                if done:
                    return
        if ready:
            raise StoreUnavailable(f"memcached at {self._where}: others write the result of {task_id} at the same time")

    def get(self, task_ids: Sequence[str]) -> dict[str, bytes]:
        """get_many."""
        keys = {_key(_TASK, one): one for one in task_ids}
        found = self._run(lambda client: client.get_many(list(keys))) if keys else {}
        return {keys[key if isinstance(key, str) else key.decode()]: bytes(value) for key, value in found.items()}

    def delete(self, task_ids: Sequence[str]) -> None:
        """delete_many."""
        if task_ids:
            self._run(lambda client: client.delete_many([_key(_TASK, one) for one in task_ids], noreply=False))

    def put_group(self, group_id: str, encoded: bytes) -> None:
        """set."""
        self._run(lambda client: client.set(_key(_GROUP, group_id), encoded, expire=self._lifetime, noreply=False))

    def get_group(self, group_id: str) -> bytes | None:
        """get."""
        found = self._run(lambda client: client.get(_key(_GROUP, group_id)))
        return None if found is None else bytes(found)

    def delete_group(self, group_id: str) -> None:
        """delete."""
        self._run(lambda client: client.delete(_key(_GROUP, group_id), noreply=False))

    def close(self) -> None:
        """Close all connections."""
        if self._pid == os.getpid():
            self._client.close()


def _key(prefix: str, name: str) -> str:
    """memcached's keys have at most 250 bytes, no blanks and no control characters."""
    key = prefix + name
    if len(key) <= 250 and key.isascii() and key.isprintable() and " " not in key:
        return key
    return prefix + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()

"""What a result store is: one small interface, a file per store.

Stores are used by callers (`AsyncResult`) and by the processes that run tasks. They keep what `protocol.results`
encodes, as bytes, and know nothing else of tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from amqptasks.errors import DecodeError
from amqptasks.protocol import jsontypes
from amqptasks.states import READY_STATES, SUCCESS

__all__ = ["ResultStore", "StoredCallback", "gives_way"]

#: Called with a task's id and its encoded result, from any thread.
StoredCallback = Callable[[str, bytes], None]


def gives_way(old: bytes, *, ready: bool) -> bool:
    """Whether a stored result is replaced by another one, which is ready or not."""
    try:
        status = jsontypes.loads(old)["status"]
    except (DecodeError, LookupError, TypeError):
        return True
    return status not in READY_STATES or (ready and status != SUCCESS)


class ResultStore(ABC):
    """A place for results that every process can reach. Thread-safe, and safe after `os.fork`.

    Connects at the first use. Every method raises `StoreUnavailable` when the server cannot be used; it names host
    and port, never a password.

    Args:
        url: as in ``result.backend``.
        expires: seconds for which results are kept; None keeps them.
    """

    #: Seconds between two looks at a result that somebody waits for; 0 for stores that tell by themselves (`listen`).
    poll_seconds: ClassVar[float] = 0.0

    def __init__(self, url: str, *, expires: float | None) -> None:
        self.url = url
        self.expires = expires

    @abstractmethod
    def put(self, task_id: str, encoded: bytes, *, ready: bool) -> None:
        """Keep this as the task's result, in place of an earlier one, and tell who listens.

        ``SUCCESS`` is never replaced: what a duplicate comes to changes nothing, as with Celery. Another result that
        is ready is replaced by one that is ready (a dead letter was sent again), and not by one that is not
        (``ready`` False: a progress or a retry). See `gives_way`.
        """

    @abstractmethod
    def get(self, task_ids: Sequence[str]) -> dict[str, bytes]:
        """The results of these tasks, of those that have one."""

    @abstractmethod
    def delete(self, task_ids: Sequence[str]) -> None:
        """Forget them."""

    @abstractmethod
    def put_group(self, group_id: str, encoded: bytes) -> None:
        """Keep a group's handle (`GroupResult.save`)."""

    @abstractmethod
    def get_group(self, group_id: str) -> bytes | None:
        """The handle that `put_group` kept, or None."""

    @abstractmethod
    def delete_group(self, group_id: str) -> None:
        """Forget it."""

    def listen(self, task_ids: Iterable[str], callback: StoredCallback) -> Callable[[], None]:
        """Have `callback` called at each change of these results, from another thread, until the returned function is
        called. Only stores with `poll_seconds` 0 do this; a result that stands already is not told."""
        raise NotImplementedError

    def expire(self) -> int:
        """Delete what is older than `expires`, in small batches, where the store does not do it by itself. Returns how
        many were deleted."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Close connections. The next use opens others."""

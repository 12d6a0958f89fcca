"""What a result store is: one small interface, a file per store.

Stores are used by callers (`AsyncResult`) and by the processes that run tasks. They keep what `protocol.results`
encodes, as bytes, and know nothing else of tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

__all__ = ["ResultStore", "StoredCallback"]

#: Called with a task's id and its encoded result, from any thread.
StoredCallback = Callable[[str, bytes], None]


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

        A result that is ready is never replaced by one that is not (``ready`` False: a progress or a retry).
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

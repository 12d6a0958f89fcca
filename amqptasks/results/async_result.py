"""The handle that `delay()` returns."""

from __future__ import annotations

from typing import Generic, NoReturn, TypeVar

__all__ = ["AsyncResult"]

R = TypeVar("R")

_NOT_YET = (
    "this version stores no results: `get`, `state` and their kin are not available. Let the task write its outcome "
    "where the caller reads it; a task that fails stands in its queue's dead-letter queue."
)


class AsyncResult(Generic[R]):
    """The handle of a published task.

    It exists only after the broker's confirm: holding one means that the broker holds the message.
    """

    __slots__ = ("id",)

    def __init__(self, id: str) -> None:
        #: The task's id, the message's `correlation_id`.
        self.id = id

    @property
    def task_id(self) -> str:
        """The same as `id`."""
        return self.id

    def get(self, timeout: float | None = None) -> NoReturn:
        """Not available in this version. Raises `NotImplementedError` at once rather than waiting."""
        raise NotImplementedError(_NOT_YET)

    @property
    def state(self) -> NoReturn:
        """Not available in this version. Raises `NotImplementedError`."""
        raise NotImplementedError(_NOT_YET)

    def __repr__(self) -> str:
        return f"<AsyncResult {self.id}>"

    def __str__(self) -> str:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncResult) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

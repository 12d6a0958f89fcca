"""What waiting for a result raises."""

from __future__ import annotations

from amqptasks.errors import RemoteError, ResultTimeout
from amqptasks.protocol.results import ResultMeta
from amqptasks.request import current_request

__all__ = ["RemoteTraceback", "check_place", "late", "raise_remote"]


class RemoteTraceback(Exception):
    """The traceback of the task, where it ran; shown as the cause of the exception that `get` raises."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def check_place(disabled: bool) -> None:
    """Raise `RuntimeError` where waiting could block all executors: inside a task."""
    request = current_request()
    if disabled and request is not None and not request.called_directly:
        raise RuntimeError(
            "a task waits for another one's result: its executor is blocked, and when all are, for ever. Use a chain, "
            "a chord or link; or pass disable_sync_subtasks=False"
        )


def late(ids: list[str], timeout: float | None) -> ResultTimeout:
    """The error of those who waited in vain."""
    which = f"task {ids[0]} has" if len(ids) == 1 else f"{len(ids)} tasks have"
    return ResultTimeout(f"{which} no result after {timeout:g} s" if timeout is not None else f"{which} no result")


def raise_remote(meta: ResultMeta) -> None:
    """Raise the task's exception."""
    error = meta.result if isinstance(meta.result, BaseException) else RemoteError(meta.result)
    raise error.with_traceback(None) from (RemoteTraceback(meta.traceback) if meta.traceback else None)

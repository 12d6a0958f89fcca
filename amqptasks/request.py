"""The request: what a running task knows of its own message (``self.request``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar

__all__ = ["Request", "current_request"]


@dataclass(slots=True)
class Request:
    """One execution of a task, with Celery's names. `called_directly` is true outside of a worker."""

    id: str | None = None
    task: str | None = None
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    retries: int = 0
    eta: datetime | None = None
    expires: datetime | None = None
    root_id: str | None = None
    parent_id: str | None = None
    group: str | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    origin: str | None = None
    hostname: str | None = None
    #: exchange, routing_key, priority, redelivered
    delivery_info: Mapping[str, Any] = field(default_factory=dict)
    #: All headers of the message, with those that the caller added.
    headers: Mapping[str, Any] = field(default_factory=dict)
    #: (hard, soft) seconds
    timelimit: tuple[float | None, float | None] = (None, None)
    ignore_result: bool = False
    group_index: int | None = None
    #: Handles of what this task sent, in Celery's tuple form.
    children: list[Any] = field(default_factory=list)
    #: Tells the caller of a state that is not final (`Task.update_state`).
    on_state: Callable[[str, Any], None] | None = None
    called_directly: bool = True
    #: Sends an event of a running task to monitors: request, type, fields. Set once in each executor.
    on_event: ClassVar[Callable[[Request, str, Mapping[str, Any]], None] | None] = None

    @property
    def stamped_headers(self) -> list[str]:
        """The names of the message's stamps."""
        return list(self.headers.get("stamped_headers") or ())

    @property
    def stamps(self) -> dict[str, Any]:
        """The message's stamps by name (`Signature.stamp`)."""
        found = self.headers.get("stamps") or {}
        return {name: found.get(name) for name in self.stamped_headers}


_current: ContextVar[Request | None] = ContextVar("amqptasks_request", default=None)


def current_request() -> Request | None:
    """The request of the task that runs in this thread or asyncio task; None outside of a task."""
    return _current.get()


set_current = _current.set
reset_current = _current.reset

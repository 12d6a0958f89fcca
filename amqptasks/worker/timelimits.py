"""How long tasks may run, by message, command, task and worker; and what becomes of those that were killed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amqptasks.execution.job import header_limits, header_retries
from amqptasks.execution.retry import retry_of_killed
from amqptasks.outcome import Failed, Reason, Retrying
from amqptasks.task import Task
from amqptasks.worker.delivery import Delivery

__all__ = ["TimeLimits"]


class TimeLimits:
    """The limits of a queue's tasks, in seconds. Belongs to the leader's loop.

    Args:
        default: the worker's hard limit.
    """

    def __init__(self, tasks: Mapping[str, Task[..., Any]], default: float | None) -> None:
        self._tasks = tasks
        self._default = default
        self._changed: dict[str, tuple[float | None, float | None]] = {}

    def change(self, task: str, hard: float | None, soft: float | None) -> None:
        """Set the limits of a task for messages that come from now on."""
        self._changed[task] = (hard, soft)

    def mark(self, delivery: Delivery) -> None:
        """Give a message that has no limits of its own those that were set for its task.

        Beside the message, whose headers may be signed.
        """
        if self._changed:
            limits = self._changed.get(str(delivery.headers["task"]))
            if limits is not None and header_limits(delivery.headers) == (None, None):
                delivery.limits = limits

    def retry(self, delivery: Delivery, failed: Failed) -> Retrying | None:
        """What becomes of a task that its hard limit killed, where it is one to be run again."""
        if failed.reason is not Reason.TIME_LIMIT or delivery.verdict is not None:
            return None
        options = self._tasks[str(delivery.headers["task"])].options
        return retry_of_killed(options, header_retries(delivery.headers), failed.message)

    def hard(self, delivery: Delivery) -> float | None:
        """When the leader kills a delivery's task."""
        headers = delivery.headers
        if delivery.verdict is not None:
            return None
        limits = delivery.limits or header_limits(headers)
        return limits[0] or self._tasks[str(headers["task"])].options.time_limit or self._default

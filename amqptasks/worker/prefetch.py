"""How many messages a group may hold unacknowledged, and when it subscribes anew for another number. Pure.

Prefetch trades speed for order: many for tasks of microseconds, next to none beyond what runs for tasks of seconds, so
that a long task holds nothing back that another worker could run. What is here is overtaken by nothing: a message of
high priority starts after at most what the prefetch allows (RabbitMQ, "Classic Queues Support Priorities").

A prefetch applies to new consumers only (basic.qos of RabbitMQ, per consumer), so that each change is a subscription.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["LONG_TASK", "Prefetch", "patience"]

#: Seconds. A task that runs so long is a long one: nothing is put behind it in an executor's hands.
LONG_TASK = 0.1
#: Each slot should have about so many seconds of work in hand.
_WORK_IN_HAND = 0.05
_MOST_PER_SLOT = 128
_MOST = 1024
#: Bytes of messages, by their mean size: what is in hand waits in the leader's memory.
_MOST_BYTES = 64 * 1024 * 1024
#: Seconds that a message waits at most behind tasks that fill every slot; nothing is held in hand for longer tasks.
_PATIENCE = 1.0
#: Seconds between two changes; after one that was not right, growing waits twice as long each time, up to the last.
_PAUSE, _LONGEST_PAUSE = 1.0, 10.0


def patience(runtime: float | None) -> float:
    """Seconds after which tasks that fill every slot are too long for others to wait behind them."""
    return LONG_TASK if runtime is None else max(LONG_TASK, min(_PATIENCE, 2 * runtime))


class Prefetch:
    """The prefetch of one group.

    Args:
        setting: a number stands as it is; ``auto`` follows the run time.
        priorities: the queue has priorities: at most 2 a slot, and none beyond what runs where tasks are long.
    """

    def __init__(self, setting: int | Literal["auto"], *, priorities: bool) -> None:
        self._setting = setting
        self._priorities = priorities
        self._changed = self._grew = self._may_grow = float("-inf")
        self._pause = _PAUSE

    @property
    def auto(self) -> bool:
        """Whether it follows the run time."""
        return self._setting == "auto"

    def target(self, runtime: float | None, slots: int, size: float = 0.0) -> int:
        """The prefetch that is right now.

        Args:
            runtime: mean seconds a task runs; None before the first.
            slots: how many tasks run at once.
            size: mean bytes of a message.
        """
        if self._setting != "auto":
            return max(1, self._setting)
        if runtime is None or runtime >= _PATIENCE:
            return slots
        if runtime >= LONG_TASK:
            # One in hand: a slot that becomes free need not wait for the broker.
            return slots if self._priorities else slots + 1
        per_slot = 2 if self._priorities else max(2, min(_MOST_PER_SLOT, int(_WORK_IN_HAND / max(runtime, 1e-6))))
        most = min(max(_MOST, 2 * slots), max(slots, int(_MOST_BYTES / max(size, 1.0))))
        return min(slots * per_slot, most)

    def change(self, current: int, runtime: float | None, slots: int, now: float, size: float = 0.0) -> int | None:
        """The prefetch to subscribe anew with; None where that is not worth a subscription, or comes too soon.

        Worth it is a factor of two, the first message beyond what runs, and slots that would stay empty.
        """
        target = self.target(runtime, slots, size)
        if now < self._changed + _PAUSE or target == current:
            return None
        if target < current:
            if 2 * target > current:
                return None
            self.shrank(now)
        elif current < slots:
            self._changed = now
        elif current == slots or target >= 2 * current:
            if now < self._may_grow:
                return None
            self._changed = self._grew = now
        else:
            return None
        return target

    def shrank(self, now: float) -> None:
        """There is less in hand, by a change or because all slots have long tasks: growing was premature, if recent."""
        recent = now < self._grew + _LONGEST_PAUSE
        self._pause = min(2 * self._pause, _LONGEST_PAUSE) if recent else _PAUSE
        self._changed, self._may_grow = now, now + self._pause

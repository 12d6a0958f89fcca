"""How many messages a group may hold unacknowledged. Pure.

Prefetch trades speed for order: many for tasks of microseconds, none beyond what runs for tasks of seconds, so that a
long task holds nothing back that another worker could run, and a message of high priority is not behind a buffer.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["target_prefetch", "worth_changing"]

#: Each slot should have about so many seconds of work in hand.
_WORK_IN_HAND = 0.05
_LONG_TASK = 0.1
_MOST_PER_SLOT = 128
_MOST = 1024


def target_prefetch(
    setting: int | Literal["auto"], *, runtime: float | None, slots: int, concurrent: bool, priorities: bool
) -> int:
    """The prefetch for a group.

    Args:
        setting: a number stands as it is; ``auto`` follows the run time.
        runtime: mean seconds a task runs; None before the first.
        slots: how many tasks run at once.
        concurrent: the slots share a process (asyncio).
        priorities: the queue has priorities: then at most 2 a slot, because what is here is overtaken by nothing.
    """
    if setting != "auto":
        return max(1, setting)
    if runtime is None or runtime >= _LONG_TASK:
        return slots
    per_slot = max(2, min(_MOST_PER_SLOT, int(_WORK_IN_HAND / max(runtime, 1e-6))))
    if priorities or concurrent:
        per_slot = 2
    return max(slots, min(slots * per_slot, max(_MOST, 2 * slots)))


def worth_changing(current: int, target: int) -> bool:
    """Whether to subscribe anew: only for a factor of two, because it costs a round trip."""
    return target >= 2 * current or 2 * target <= current

"""What a process group is: one queue, its pool and its sizes, worked out from settings and flags."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from amqptasks.config import Settings
from amqptasks.errors import ConfigError

__all__ = ["GroupPlan", "plan_groups", "usable_cores"]

_POOLS = {"process": "process", "prefork": "process", "processes": "process", "solo": "solo", "asyncio": "asyncio"}
_LATER = {"thread", "threads", "gevent", "eventlet"}
_ASYNCIO_CONCURRENCY = 100


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One process group."""

    queue: str
    pool: Literal["process", "solo", "asyncio"]
    #: Executor processes.
    processes: int
    #: Tasks at once, over all processes.
    concurrency: int
    prefetch: int | Literal["auto"]
    poison_limit: int
    priorities: bool
    dead_letters: bool

    def __str__(self) -> str:
        shape = f"{self.processes} executor" + ("s" if self.processes != 1 else "")
        return f"{self.pool}, {self.concurrency} at once in {shape}, prefetch {self.prefetch}"


def plan_groups(
    settings: Settings,
    queues: Sequence[str],
    *,
    concurrency: int | None = None,
    pool: str | None = None,
    prefetch: int | Literal["auto"] | None = None,
) -> list[GroupPlan]:
    """A plan per queue; flags win over the queue's settings, those over the worker's. Raises `ConfigError`."""
    plans = []
    for name in dict.fromkeys(queues):
        queue = settings.queues.get(name)
        if queue is None:
            near = get_close_matches(name, settings.queues, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"queues: {', '.join(settings.queues)}"
            raise ConfigError(f"queue {name!r} is not declared; {hint}")
        kind = _pool(pool or queue.pool or settings.worker.pool, name)
        slots = concurrency or queue.concurrency or settings.worker.concurrency
        if kind == "solo":
            slots, processes = 1, 1
        elif kind == "asyncio":
            slots = slots or _ASYNCIO_CONCURRENCY
            processes = min(queue.processes or 1, slots)
        else:
            slots = slots or usable_cores()
            processes = slots
        plans.append(
            GroupPlan(
                queue=name,
                pool=kind,
                processes=processes,
                concurrency=slots,
                prefetch=prefetch or queue.prefetch or settings.worker.prefetch,
                poison_limit=queue.poison_limit or settings.worker.poison_limit,
                priorities=queue.max_priority is not None,
                dead_letters=queue.dead_letter.enabled,
            )
        )
    return plans


def _pool(name: str, queue: str) -> Literal["process", "solo", "asyncio"]:
    match _POOLS.get(name):
        case "process":
            return "process"
        case "solo":
            return "solo"
        case "asyncio":
            return "asyncio"
    if name in _LATER:
        raise ConfigError(
            f"queue {queue!r}: pool {name!r} is not available in this version; use process, solo or asyncio"
        )
    raise ConfigError(f"queue {queue!r}: pool {name!r} is not known; use process, solo or asyncio")


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those of its affinity, cut to its container's quota (Linux, cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        limit, period = quota.read_text().split()
        return max(1, min(cores, int(limit) // int(period)))
    except (OSError, ValueError):  # no container, or "max": no quota
        return cores

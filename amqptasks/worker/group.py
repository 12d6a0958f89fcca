"""What a process group is: one queue, its pool and its sizes, worked out from settings and flags."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from amqptasks.config import AutoscaleSettings, QueueSettings, Settings, WorkerSettings
from amqptasks.errors import ConfigError

__all__ = ["CONCURRENT_POOLS", "GroupPlan", "Pool", "Recycling", "plan_groups", "usable_cores"]

Pool = Literal["process", "solo", "thread", "asyncio", "gevent"]
#: Celery's names too.
_POOLS: dict[str, Pool] = {
    "process": "process",
    "prefork": "process",
    "processes": "process",
    "solo": "solo",
    "thread": "thread",
    "threads": "thread",
    "asyncio": "asyncio",
    "gevent": "gevent",
}
#: Pools whose executors run many tasks at once.
CONCURRENT_POOLS = frozenset({"thread", "asyncio", "gevent"})
_LOOP_CONCURRENCY = 100
_THREADS_PER_CORE = 4
#: An executor's shared memory has room for so many.
_MOST_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Recycling:
    """When executors are replaced; None for never."""

    #: Tasks that an executor runs at most.
    tasks: int | None = None
    #: Resident bytes beyond which it finishes what it has and goes.
    memory: int | None = None
    #: Resident bytes beyond which it is killed, with its tasks.
    memory_hard: int | None = None


_NEVER = Recycling()


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One process group."""

    queue: str
    pool: Pool
    #: Executor processes.
    processes: int
    #: Tasks at once, over all processes.
    concurrency: int
    prefetch: int | Literal["auto"]
    poison_limit: int
    priorities: bool
    dead_letters: bool
    recycling: Recycling = _NEVER
    #: (most, fewest) tasks at once, when the pool follows the work.
    autoscale: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.pool in CONCURRENT_POOLS:
            each = -(-self.concurrency // self.processes)
            kind = {"thread": "threads", "asyncio": "asyncio tasks", "gevent": "greenlets"}[self.pool]
            shape = f"{_count(self.processes, 'executor')} of {each} {kind}"
        else:
            shape = f"{_count(self.processes, 'executor')} of one task"
        scale = f", up to {self.autoscale[0]}" if self.autoscale is not None else ""
        return f"{self.pool}, {self.concurrency} at once{scale}: {shape}; prefetch {self.prefetch}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def plan_groups(
    settings: Settings,
    queues: Sequence[str],
    *,
    concurrency: int | None = None,
    pool: str | None = None,
    prefetch: int | Literal["auto"] | None = None,
    recycling: Recycling = _NEVER,
    autoscale: tuple[int, int] | None = None,
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
        scale = autoscale or _bounds(queue.autoscale or settings.worker.autoscale)
        if scale is not None:
            if kind == "solo":
                raise ConfigError(f"queue {name!r}: pool solo runs one task; autoscale needs another pool")
            slots = scale[1]
        if kind == "gevent" and not (settings.claim_check.url or "file:").startswith("file:"):
            raise ConfigError(
                f"queue {name!r}: a gevent pool reads large bodies (claim_check.url) from file:// only: fsspec's own "
                "event loop does not run beside gevent"
            )
        processes, slots = _shape(kind, name, slots, queue.processes)
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
                recycling=_recycling(recycling, queue, settings.worker),
                autoscale=scale,
            )
        )
    return plans


def _bounds(autoscale: AutoscaleSettings | None) -> tuple[int, int] | None:
    return None if autoscale is None else (autoscale.max, autoscale.min)


def _recycling(flags: Recycling, queue: QueueSettings, worker: WorkerSettings) -> Recycling:
    return Recycling(
        flags.tasks or queue.max_tasks_per_child or worker.max_tasks_per_child,
        flags.memory or queue.max_memory_per_child or worker.max_memory_per_child,
        queue.max_memory_per_child_hard or worker.max_memory_per_child_hard,
    )


def _shape(kind: Pool, queue: str, slots: int | None, processes: int | None) -> tuple[int, int]:
    """Executors of a group, and tasks at once over all of them."""
    match kind:
        case "solo":
            return 1, 1
        case "process":
            slots = slots or usable_cores()
            return slots, slots
        case "thread":
            slots = slots or _THREADS_PER_CORE * usable_cores()
        case _:
            slots = slots or _LOOP_CONCURRENCY
    processes = min(processes or 1, slots)
    if -(-slots // processes) > _MOST_AT_ONCE:
        raise ConfigError(
            f"queue {queue!r}: concurrency {slots} is more than {_MOST_AT_ONCE} tasks in each of its executors "
            f"({processes}); give it more `processes`"
        )
    return processes, slots


def _pool(name: str, queue: str) -> Pool:
    known = _POOLS.get(name)
    if known == "gevent" and find_spec("gevent") is None:
        raise ConfigError(f"queue {queue!r}: pool gevent needs gevent: pip install 'amqptasks[gevent]'")
    if known is not None:
        return known
    if name == "eventlet":
        raise ConfigError(
            f"queue {queue!r}: pool 'eventlet' is not offered: eventlet itself asks its users to leave it; "
            "use asyncio or gevent"
        )
    raise ConfigError(f"queue {queue!r}: pool {name!r} is not known; use process, thread, asyncio, gevent or solo")


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those of its affinity, cut to its container's quota (Linux, cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        limit, period = quota.read_text().split()
        return max(1, min(cores, int(limit) // int(period)))
    except (OSError, ValueError):  # no container, or "max": no quota
        return cores

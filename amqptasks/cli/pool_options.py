"""Flags of ``amqptasks worker`` that bound tasks, executors and pools."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import click

from amqptasks.config import Settings
from amqptasks.worker.group import GroupPlan, Recycling, plan_groups

__all__ = ["PoolOptions", "pool_options"]


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """What the flags say."""

    time_limit: float | None
    soft_time_limit: float | None
    recycling: Recycling
    #: (most, fewest) tasks at once.
    autoscale: tuple[int, int] | None

    @property
    def worker(self) -> dict[str, object]:
        """Settings of the worker that the flags replace."""
        given = {"time_limit": self.time_limit, "soft_time_limit": self.soft_time_limit}
        return {key: value for key, value in given.items() if value is not None}

    def plan(
        self,
        settings: Settings,
        queues: Sequence[str],
        *,
        concurrency: int | None,
        pool: str | None,
        prefetch: int | Literal["auto"] | None,
    ) -> list[GroupPlan]:
        """The groups of these queues. Raises `ConfigError`."""
        return plan_groups(
            settings,
            queues,
            concurrency=concurrency,
            pool=pool,
            prefetch=prefetch,
            recycling=self.recycling,
            autoscale=self.autoscale,
        )


class _Range(click.ParamType[tuple[int, int]]):
    name = "MAX,MIN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        most, _, least = str(value).partition(",")
        try:
            bounds = int(most), int(least or 1)
        except ValueError:
            bounds = 0, 0
        if not 1 <= bounds[1] <= bounds[0]:
            self.fail(f"{value!r} is not MAX,MIN, such as 10,2")
        return bounds


_FLAGS = (
    click.option(
        "--time-limit", type=click.FloatRange(0, min_open=True), metavar="S", help="Kill tasks after S seconds."
    ),
    click.option(
        "--soft-time-limit",
        type=click.FloatRange(0, min_open=True),
        metavar="S",
        help="Raise SoftTimeLimitExceeded in tasks after S seconds.",
    ),
    click.option(
        "--max-tasks-per-child", type=click.IntRange(1), metavar="N", help="Replace an executor after N tasks."
    ),
    click.option(
        "--max-memory-per-child",
        type=click.IntRange(1),
        metavar="KB",
        help="Replace an executor that grew beyond so many kilobytes.",
    ),
    click.option("--autoscale", type=_Range(), help="Tasks at once per queue follow the work between these."),
)


def pool_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags; the command gets them as `limits`."""

    @functools.wraps(command)
    def with_limits(
        *args: Any,
        time_limit: float | None,
        soft_time_limit: float | None,
        max_tasks_per_child: int | None,
        max_memory_per_child: int | None,
        autoscale: tuple[int, int] | None,
        **options: Any,
    ) -> Any:
        memory = None if max_memory_per_child is None else max_memory_per_child * 1024
        recycling = Recycling(max_tasks_per_child, memory)
        return command(*args, limits=PoolOptions(time_limit, soft_time_limit, recycling, autoscale), **options)

    for flag in reversed(_FLAGS):
        with_limits = flag(with_limits)
    return with_limits

"""When executors are replaced, before there is one."""

from __future__ import annotations

from typing import Any, cast

from amqptasks.worker.fleet import Fleet
from amqptasks.worker.group import Recycling
from amqptasks.worker.handle import ExecutorHandle


class _Limits:
    """What a fleet writes on an executor of its limits."""

    quota: int | None = None
    grown: int | None = None


def test_executors_of_the_same_age_do_not_leave_together() -> None:
    nothing: Any = None
    fleet = Fleet(
        nothing, nothing, 1, frozenset(), Recycling(100, 1_000_000, None),
        on_events=nothing, on_death=nothing, on_capacity=nothing,
    )  # fmt: skip
    several = [_Limits() for _ in range(100)]
    for one in several:
        fleet._ration(cast("ExecutorHandle", one))
    quotas, sizes = {one.quota for one in several}, {one.grown for one in several}
    assert all(quota is not None and 90 <= quota <= 100 for quota in quotas)
    assert all(size is not None and 900_000 <= size <= 1_000_000 for size in sizes)
    assert len(quotas) >= 5
    assert len(sizes) >= 50

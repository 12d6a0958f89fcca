"""How many tasks at once, worked out from the load."""

from __future__ import annotations

import pytest

from amqptasks.worker.autoscale import Load, wanted


@pytest.mark.parametrize(
    ("slots", "engaged", "backlog", "peak", "expected"),
    [
        (1, 1, True, None, 2),  # a backlog doubles
        (4, 4, True, None, 8),
        (6, 6, True, None, 10),  # up to the most
        (10, 10, True, None, 10),
        (4, 3, True, None, 4),  # not while a slot is free
        (4, 4, False, None, 4),  # nor when nothing waits
        (8, 2, False, 2, 3),  # after half a minute: what was needed, and one
        (8, 0, False, 0, 1),
        (2, 1, False, 1, 2),  # a steady load of one keeps its spare: no growing and shrinking in turn
        (8, 8, True, 8, 10),
        (20, 0, False, None, 10),  # bounds that were drawn closer
    ],
)
def test_slots_follow_the_work(slots: int, engaged: int, backlog: bool, peak: int | None, expected: int) -> None:
    assert wanted(Load(slots, engaged, backlog, peak), 10, 1) == expected


def test_never_fewer_than_the_fewest() -> None:
    assert wanted(Load(8, 0, False, 0), 10, 3) == 3

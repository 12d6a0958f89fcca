"""A worker that has run many tasks holds no more than one that has run some."""

from __future__ import annotations

import pytest

from benchmarks.soak import Plan, Soaked, soak


def judge(found: Soaked) -> None:
    assert not found.samples[-1].outgrows(found.samples[0]), found.samples


@pytest.mark.timeout(180)
def test_sixty_thousand_tasks_leave_nothing_behind_and_an_idle_worker_holds_no_more() -> None:
    """Neither memory nor files nor threads nor channels."""
    found = soak(lambda tasks, _seconds: tasks < 80_000, Plan(idle=5))
    assert (found.samples[0].tasks, found.samples[-1].tasks) == (20_000, 80_000)
    judge(found)
    assert found.idle is not None
    assert not found.idle.outgrows(found.samples[-1]), (found.idle, found.samples[-1])


@pytest.mark.timeout(180)
def test_tasks_that_raise_leave_nothing_behind() -> None:
    """Each leaves a traceback, a log line, and a dead letter that is confirmed."""
    judge(soak(lambda tasks, _seconds: tasks < 16_000, Plan(every=4_000, one_fails_of=2)))


@pytest.mark.fault
@pytest.mark.timeout(180)
def test_connections_that_are_lost_while_tasks_are_in_flight_leave_nothing_behind() -> None:
    found = soak(lambda tasks, _seconds: tasks < 60_000, Plan(every=12_000, lose_every=4_000))
    assert found.losses >= found.in_flight >= 3
    judge(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_thousand_tasks_that_raise_leave_nothing_behind() -> None:
    judge(soak(lambda tasks, _seconds: tasks < 100_000, Plan(every=10_000, one_fails_of=2)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_lost_connections_leave_nothing_behind() -> None:
    found = soak(lambda tasks, _seconds: tasks < 804_000, Plan(every=40_000, lose_every=4_000, while_losing=1))
    assert found.losses >= 200
    judge(found)

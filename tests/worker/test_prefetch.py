"""The prefetch follows the run time, within what order and fairness allow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from amqptasks.worker.flow import Flow
from amqptasks.worker.prefetch import Prefetch, patience

MB = 1024 * 1024


def auto(runtime: float | None, slots: int = 2, *, priorities: bool = False) -> int:
    return Prefetch("auto", priorities=priorities).target(runtime, slots)


def test_before_the_first_task_nothing_is_held_beyond_what_runs() -> None:
    assert auto(None) == 2


def test_a_long_task_holds_one_message_and_a_very_long_one_none() -> None:
    assert auto(0.1) == 3
    assert auto(0.9) == 3
    assert auto(1.0) == 2
    assert auto(60.0) == 2


def test_some_tens_of_milliseconds_of_work_are_in_hand() -> None:
    assert auto(0.00005) == 256, "bounded for tasks of microseconds"
    for runtime in (0.001, 0.002, 0.005, 0.01, 0.02):
        assert 0.04 <= auto(runtime) / 2 * runtime <= 0.06, runtime
    assert auto(0.09) == 4


@pytest.mark.parametrize("runtime", [None, 0.00001, 0.001, 0.09, 0.1, 0.5, 5.0])
@pytest.mark.parametrize("slots", [1, 2, 64, 2000])
@pytest.mark.parametrize("priorities", [False, True])
def test_every_slot_gets_its_message(runtime: float | None, slots: int, priorities: bool) -> None:
    assert auto(runtime, slots, priorities=priorities) >= slots


def test_it_is_bounded_however_many_slots_there_are() -> None:
    assert auto(0.00001, slots=64) == 1024
    assert auto(0.00001, slots=2000) == 4000


def test_priorities_bound_what_cannot_be_overtaken() -> None:
    assert auto(0.00005, priorities=True) == 4
    assert auto(0.05, priorities=True) == 4
    assert auto(0.5, priorities=True) == 2


def test_a_number_stands_as_it_is() -> None:
    seven = Prefetch(7, priorities=True)
    assert seven.target(0.00001, 2) == 7
    assert seven.change(7, 0.00001, 10, now=5.0) is None


def test_a_new_subscription_is_worth_a_factor_of_two_or_the_first_message_in_hand() -> None:
    assert Prefetch("auto", priorities=False).change(3, 0.01, 2, now=1.0) == 10
    assert Prefetch("auto", priorities=False).change(2, 0.5, 2, now=1.0) == 3
    assert Prefetch("auto", priorities=False).change(256, 5.0, 2, now=1.0) == 2
    assert Prefetch("auto", priorities=False).change(10, 0.0085, 2, now=1.0) is None
    assert Prefetch("auto", priorities=False).change(10, 0.012, 2, now=1.0) is None


def test_every_slot_of_a_pool_that_has_grown_gets_its_message_soon() -> None:
    prefetch = Prefetch("auto", priorities=True)
    assert prefetch.change(1, 0.01, 2, now=1.0) == 4
    assert prefetch.change(4, 0.01, 10, now=1.5) is None
    prefetch.shrank(now=1.6)
    assert prefetch.change(4, 2.0, 10, now=2.7) == 10, "it does not wait for growing to be sensible again"


def test_between_short_and_long_tasks_it_subscribes_ever_more_seldom_and_then_soon_again() -> None:
    prefetch = Prefetch("auto", priorities=False)
    current, changes = 2, []
    for tick in range(600):  # a minute in which the mean swings each second, seen ten times a second
        runtime = 0.001 if tick // 10 % 2 else 0.5
        target = prefetch.change(current, runtime, 2, now=tick / 10)
        if target is not None:
            changes.append(tick / 10)
            current = target
    assert 4 <= len(changes) <= 20, changes
    assert len([one for one in changes if one >= 30]) <= 7, changes
    prefetch.shrank(now=100.0)  # it has not grown for long: this is no swing any more
    assert prefetch.change(3, 0.001, 2, now=101.0) == 100


def test_less_in_hand_is_right_at_once() -> None:
    prefetch = Prefetch("auto", priorities=False)
    assert prefetch.change(2, 0.001, 2, now=10.0) == 100
    assert prefetch.change(100, 0.5, 2, now=10.9) is None, "a second between two"
    assert prefetch.change(100, 0.5, 2, now=11.0) == 3
    assert prefetch.change(3, 0.001, 2, now=12.9) is None, "growing was premature"
    assert prefetch.change(3, 0.001, 2, now=13.0) == 100


def test_what_is_in_hand_waits_behind_long_tasks_for_a_second_at_most() -> None:
    assert patience(None) == 0.1
    assert patience(0.00005) == 0.1
    assert patience(0.2) == pytest.approx(0.4)
    assert patience(60.0) == 1.0


def test_large_messages_are_bounded_by_their_bytes_but_for_what_runs() -> None:
    held = Prefetch("auto", priorities=False)
    assert held.target(0.00001, 4, 1_000) == 512
    assert held.target(0.00001, 4, 4 * MB) == 16
    assert held.target(0.00001, 4, 40 * MB) == 4
    assert held.target(0.00001, 1, 4 * MB) * 4 * MB <= 64 * MB
    assert Prefetch(50, priorities=False).target(0.00001, 4, 40 * MB) == 50, "a number stands as it is"


def flow_of() -> tuple[Flow, Any, Any]:
    """A flow over a consumer and a connection that are only figures; four slots, tasks of microseconds."""
    plan: Any = SimpleNamespace(prefetch="auto", priorities=False, autoscale=None)
    link: Any = SimpleNamespace(connection=SimpleNamespace(bytes_received=1_000_000))
    taken: Any = SimpleNamespace(consuming=True, prefetch=0, seen=0, paused=0, resumed=0, given_back=0)
    taken.set_prefetch = lambda prefetch: setattr(taken, "prefetch", prefetch)
    taken.pause = lambda then: (setattr(taken, "paused", taken.paused + 1), then())
    taken.resume = lambda: setattr(taken, "resumed", taken.resumed + 1)
    slots: Any = SimpleNamespace(runtime=0.00001, concurrency=4, waiting=[], stalled=False, free=True)

    def give_back() -> None:
        taken.given_back += 1

    flow = Flow(plan, link, taken, slots, give_back)
    return flow, taken, (link, slots)


@pytest.mark.parametrize(("size", "most"), [(1_000, 512), (8 * MB, 8)])
def test_the_size_of_messages_is_what_the_connection_reads_for_each(size: int, most: int) -> None:
    flow, taken, (link, _slots) = flow_of()
    flow.lost()  # what was read before the channel opened is no message
    taken.prefetch = 4
    for _ in range(20):
        taken.seen += 1
        link.connection.bytes_received += size
    flow.tick()
    assert taken.prefetch == most


def test_a_pause_ends_with_its_channel() -> None:
    flow, taken, (_link, slots) = flow_of()
    slots.waiting, slots.stalled, slots.free = [object()], True, False
    flow.tick()
    assert (taken.paused, taken.given_back) == (1, 1)
    taken.prefetch = 512
    flow.lost()
    assert taken.prefetch == 4, "tasks are long: as many as there are slots"
    slots.waiting, slots.stalled = [], False
    for _ in range(10):
        flow.tick()
    assert taken.given_back == 1

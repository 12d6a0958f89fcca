"""The prefetch follows the run time, within what order and fairness allow."""

from __future__ import annotations

from amqptasks.worker.prefetch import target_prefetch, worth_changing


def auto(runtime: float | None, slots: int = 2, *, concurrent: bool = False, priorities: bool = False) -> int:
    return target_prefetch("auto", runtime=runtime, slots=slots, concurrent=concurrent, priorities=priorities)


def test_before_the_first_task_nothing_is_held_beyond_what_runs() -> None:
    assert auto(None) == 2


def test_a_long_task_holds_nothing_back() -> None:
    assert auto(60.0) == 2


def test_short_tasks_are_held_in_hand() -> None:
    assert auto(0.00005) == 256
    assert auto(0.01) == 10


def test_it_is_bounded_however_many_slots_there_are() -> None:
    assert auto(0.00001, slots=64) == 1024
    assert auto(0.00001, slots=2000) == 4000


def test_priorities_bound_what_cannot_be_overtaken() -> None:
    assert auto(0.00005, priorities=True) == 4


def test_a_number_stands_as_it_is() -> None:
    assert target_prefetch(7, runtime=0.00001, slots=2, concurrent=False, priorities=True) == 7


def test_a_new_subscription_is_worth_a_factor_of_two() -> None:
    assert worth_changing(2, 4)
    assert worth_changing(256, 2)
    assert not worth_changing(10, 12)

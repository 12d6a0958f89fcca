"""What a leader remembers of revokes: bounded, and no longer than it was asked to."""

from __future__ import annotations

import time
from collections.abc import Callable

from amqptasks.config.sections import RevokeSettings
from amqptasks.worker.revoked import RevokeBook


def book(settings: RevokeSettings, timers: list[Callable[[], None]]) -> RevokeBook:
    """A book without a broker. `timers` gets what it wants to be called for later."""
    return RevokeBook(
        "amqptasks",
        settings,
        publish=lambda _envelope, done: done(None),
        call_later=lambda _seconds, call: timers.append(call),
        blocked=lambda: False,
        act=lambda _ids, _signum: None,
    )


def test_of_three_hundred_thousand_revokes_the_newest_hundred_thousand_are_remembered() -> None:
    timers: list[Callable[[], None]] = []
    made = book(RevokeSettings(), timers)
    for start in range(0, 300_000, 1000):
        made.revoke(tuple(f"id-{number}" for number in range(start, start + 1000)))
        for timer in timers[1:]:
            timer()
        del timers[1:]
    assert list(made.known) == [f"id-{number}" for number in range(200_000, 300_000)]
    assert not made._to_journal


def test_what_cannot_be_written_down_is_bounded_too() -> None:
    made = book(RevokeSettings(limit=2000), [])
    for start in range(0, 10_000, 1000):
        made.revoke(tuple(f"id-{number}" for number in range(start, start + 1000)))
    assert len(made.known) == len(made._to_journal) == 2000


def test_a_revoke_goes_when_its_time_is_over() -> None:
    timers: list[Callable[[], None]] = []
    made = book(RevokeSettings(expires=0.3), timers)
    made.revoke(("short",))
    longer = RevokeSettings(expires=60)
    made._settings = longer
    made.revoke(("long",))
    tick = timers[0]
    tick()
    assert list(made.known) == ["short", "long"]
    time.sleep(0.35)
    tick()
    assert list(made.known) == ["long"]


def test_a_worker_that_is_told_to_stop_writes_down_first_what_it_answered_yes_to() -> None:
    timers: list[Callable[[], None]] = []
    made = book(RevokeSettings(), timers)
    assert made.idle
    made.revoke(("one", ("customer", "acme")))
    assert not made.idle
    timers[-1]()
    assert made.idle

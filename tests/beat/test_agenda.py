"""Which ticks a beat sends: what is late, what was missed, what has changed."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amqptasks.beat.agenda import LATE, Agenda
from amqptasks.beat.state import State
from amqptasks.errors import DecodeError
from amqptasks.periodic import Entry
from amqptasks.schedules import crontab, interval

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)


def entry(name: str = "a", schedule: Any = None, **more: Any) -> Entry:
    return Entry(name, "task", schedule or interval(60), **more)


def handed_over(state: State) -> State:
    """As the next leader reads it."""
    return State.from_table(json.loads(state.to_bytes(leader={"host": "h"}))["state"])


def dues(agenda: Agenda, now: datetime, limit: int = 1000) -> list[datetime]:
    return [tick.due for tick in agenda.due(now, limit)]


def test_a_new_schedule_begins_now_and_has_each_tick_once() -> None:
    agenda = Agenda([entry()], State.new(NOON), NOON)
    assert dues(agenda, NOON) == []
    assert agenda.next_due == NOON + 60 * SECOND
    assert dues(agenda, NOON + 61 * SECOND) == [NOON + 60 * SECOND]
    assert dues(agenda, NOON + 61 * SECOND) == []


def test_the_next_leader_goes_on_with_the_same_ids_where_the_last_one_ended() -> None:
    state = State.new(NOON)
    Agenda([entry()], state, NOON).due(NOON + 61 * SECOND, 10)
    later = NOON + 121 * SECOND
    ticks = [Agenda([entry()], handed_over(state), later).due(later, 10) for _ in range(2)]
    assert [tick.due for tick in ticks[0]] == [NOON + 120 * SECOND]
    assert ticks[0] == ticks[1]
    other = State.new(NOON).task_id("a", ticks[0][0].due)
    assert other != ticks[0][0].task_id  # another broker's schedule


@pytest.mark.parametrize(
    ("catch_up", "expected"),
    [("skip", []), ("one", [NOON + 3 * HOUR]), ("all", [NOON + HOUR, NOON + 2 * HOUR, NOON + 3 * HOUR])],
)
def test_catching_up(catch_up: Any, expected: list[datetime]) -> None:
    one = entry(schedule=interval(HOUR), catch_up=catch_up)
    state = State.new(NOON)
    Agenda([one], state, NOON)
    now = NOON + 3 * HOUR + timedelta(minutes=10)
    agenda = Agenda([one], handed_over(state), now)
    assert dues(agenda, now) == expected
    assert agenda.next_due == NOON + 4 * HOUR
    # Not again, neither by this one nor by the next.
    assert dues(agenda, now) == dues(Agenda([one], handed_over(agenda.state), now), now) == []


@pytest.mark.parametrize("catch_up", ["skip", "one", "all"])
def test_what_is_late_by_a_change_of_leaders_is_always_sent(catch_up: Any) -> None:
    one = entry(schedule=interval(2), catch_up=catch_up)
    state = State.new(NOON)
    Agenda([one], state, NOON)
    assert len(dues(Agenda([one], handed_over(state), NOON + LATE), NOON + LATE)) == 5


def test_a_long_outage_of_a_quick_schedule_costs_no_long_calculation() -> None:
    one = entry(schedule=interval(0.01), catch_up="one")
    agenda = Agenda([one], State.new(NOON), NOON)
    ticks = dues(agenda, NOON + timedelta(days=3650))
    assert len(ticks) == LATE / one.schedule.every  # type: ignore[attr-defined]


def test_all_is_sent_in_portions() -> None:
    one = entry(schedule=interval(1), catch_up="all")
    agenda = Agenda([one], State.new(NOON), NOON)
    now, found = NOON + timedelta(seconds=1000), []
    while portion := dues(agenda, now, 300):
        assert len(portion) <= 300
        found += portion
    assert found == [NOON + n * SECOND for n in range(1, 1001)]


def test_what_is_held_back_waits_and_then_goes_alone() -> None:
    agenda = Agenda([entry("a"), entry("b"), entry("c")], State.new(NOON), NOON)
    agenda.held_back = {"b": NOON + 90 * SECOND}
    assert [tick.entry.name for tick in agenda.due(NOON + 60 * SECOND, 10)] == ["a", "c"]
    assert agenda.next_due == NOON + 90 * SECOND
    later = NOON + 120 * SECOND
    assert [tick.entry.name for tick in agenda.due(later, 10)] == ["a", "c"]
    assert [(tick.entry.name, tick.due) for tick in agenda.due(later, 10)][:1] == [("b", later)]
    assert agenda.due(later, 10) == []


def test_a_changed_schedule_neither_fires_by_surprise_nor_leaves_a_tick_out() -> None:
    before, after = entry(schedule=crontab(0, 3)), entry(schedule=crontab(0, 4))
    state = State.new(NOON - 12 * HOUR)
    Agenda([before], state, NOON - 12 * HOUR).due(NOON - 9 * HOUR, 10)
    assert dues(Agenda([after], handed_over(state), NOON), NOON) == []  # four o'clock is past; it was no tick then
    assert Agenda([after], handed_over(state), NOON).next_due == NOON + 16 * HOUR
    # At T-1 s, T and T+1 s of a tick that both schedules have: once, whoever sends it.
    minutely, same = entry(schedule=interval(60)), entry(schedule=crontab())
    for handover in (-SECOND, 0 * SECOND, SECOND):
        state = State.new(NOON)
        old = Agenda([minutely], state, NOON)
        moment = NOON + 60 * SECOND + handover
        found = dues(old, moment)
        new = Agenda([same], handed_over(old.state), moment + SECOND)
        assert [*found, *dues(new, moment + 2 * SECOND)] == [NOON + 60 * SECOND]


def test_a_renamed_entry_goes_on_and_one_that_was_off_makes_up_for_nothing() -> None:
    state = State.new(NOON)
    old = Agenda([entry("old")], state, NOON)
    assert len(dues(old, NOON + 60 * SECOND)) == 1
    now = NOON + 62 * SECOND
    assert dues(Agenda([entry("new")], handed_over(state), now), now) == []
    off = Agenda([entry("new", enabled=False)], handed_over(state), now)
    assert dues(off, NOON + HOUR) == []
    assert off.next_due is None
    late = NOON + 2 * HOUR + 30 * SECOND
    assert dues(Agenda([entry("new", catch_up="all")], handed_over(off.state), late), late) == []


def test_pausing_outlives_leaders_and_resuming_makes_up_for_nothing() -> None:
    agenda = Agenda([entry(catch_up="all")], State.new(NOON), NOON)
    agenda.pause("a")
    assert agenda.next_due is None
    later = NOON + HOUR + SECOND
    agenda = Agenda([entry(catch_up="all")], handed_over(agenda.state), later)
    assert dues(agenda, later) == []
    agenda.resume("a", later)
    assert agenda.next_due == NOON + HOUR + 60 * SECOND
    assert dues(agenda, later) == []


def test_a_clock_that_was_ahead_is_told_and_resuming_begins_now() -> None:
    state = State.new(NOON)
    agenda = Agenda([entry(), entry("b")], state, NOON)
    agenda.due(NOON + 2 * HOUR, 10)
    now = NOON + 70 * SECOND  # it was put right
    again = Agenda([entry(), entry("b"), entry("new")], handed_over(state), now)
    assert again.ahead(now) == dict.fromkeys(("a", "b"), NOON + 2 * HOUR)
    assert again.table(now)[0]["next"][0] == (NOON + 2 * HOUR + 60 * SECOND).isoformat()
    again.resume("a", now)
    assert again.ahead(now).keys() == {"b"}
    assert again.next_due == NOON + 120 * SECOND
    assert [tick.entry.name for tick in again.due(NOON + 121 * SECOND, 10)] == ["a", "new"]


def test_a_clock_that_is_ahead_by_little_repeats_nothing() -> None:
    state = State.new(NOON)
    agenda = Agenda([entry()], state, NOON)
    assert dues(agenda, NOON + 60 * SECOND) == [NOON + 60 * SECOND]
    agenda.resume("a", NOON + 55 * SECOND)
    assert agenda.ahead(NOON + 55 * SECOND) == {}
    assert dues(agenda, NOON + 61 * SECOND) == []


def test_a_run_beside_the_schedule_has_the_same_id_when_it_is_asked_twice() -> None:
    agenda = Agenda([entry()], State.new(NOON), NOON)
    first, again, other = (agenda.run("a", NOON, request) for request in ("x", "x", "y"))
    assert first.task_id == again.task_id != other.task_id
    assert agenda.next_due == NOON + 60 * SECOND


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 200), st.booleans()), min_size=1, max_size=15),
    st.sampled_from(["skip", "one", "all"]),
)
def test_however_leaders_change_no_tick_is_sent_twice(turns: list[tuple[float, bool]], catch_up: Any) -> None:
    """A leader that dies in a commit leaves the state before it, and its ticks were not sent."""
    one = entry(schedule=interval(7), catch_up=catch_up)
    now, committed, sent = NOON, State.new(NOON), []
    Agenda([one], committed, now)
    for seconds, dies in turns:
        now += timedelta(seconds=seconds)
        agenda = Agenda([one], handed_over(committed), now)
        ticks = agenda.due(now, 1000)
        if not dies:
            committed = handed_over(agenda.state)
            sent += [tick.due for tick in ticks]
    assert len(set(sent)) == len(sent)
    assert sent == sorted(sent)
    if catch_up == "all" and sent:
        assert sent == [sent[0] + n * 7 * SECOND for n in range(len(sent))]


@pytest.mark.parametrize("table", [{}, {"version": 2}, {"version": 1, "lineage": "x"}, [], None])
def test_what_is_no_state_is_said_so(table: Any) -> None:
    with pytest.raises(DecodeError):
        State.from_table(table)


def test_an_edit_touches_no_other_entry_and_begins_with_the_moment_it_was_made() -> None:
    minute, changed, gone = entry("minute"), entry("changed"), entry("gone")
    state = State.new(NOON)
    agenda = Agenda([minute, changed, gone], state, NOON)
    now = NOON + 60 * SECOND
    assert len(agenda.due(now, 10)) == 3
    # At the very second of a tick, and a second after one of the new schedule would have been due.
    agenda.arrange([minute, entry("changed", interval(59)), entry("fresh", interval(59))], now)
    assert agenda.due(now, 10) == []
    ticks = agenda.due(NOON + 120 * SECOND, 10)
    assert {(tick.entry.name, tick.due.second) for tick in ticks if tick.entry.name == "minute"} == {("minute", 0)}
    assert {tick.entry.name for tick in ticks} == {"minute", "changed", "fresh"}
    assert all(now < tick.due for tick in ticks)
    assert set(handed_over(state).marks) == {"minute", "changed", "fresh"}


def test_added_entries_are_handed_over_and_a_state_of_before_has_none() -> None:
    state = State.new(NOON)
    state.added = {"x": {"entry": {"task": "t", "every": 30.0, "args": [1]}, "signed": {}}}
    assert handed_over(state).added == state.added
    table = json.loads(state.to_bytes())["state"]
    del table["added"]
    assert State.from_table(table).added == {}
    with pytest.raises(DecodeError):
        State.from_table({**table, "added": ["x"]})


#: The tick around which a schedule is edited.
T = NOON + 60 * SECOND
#: What is edited: entries before and after, and for an edit a second before T, at T and a second after it what is sent
#: from then on, up to T + 130 s, in seconds after T.
EDITS = {
    "arguments": ([entry()], [entry(args=(2,))], [0, 60, 120], [0, 60, 120], [0, 60, 120]),
    "the same ticks": ([entry()], [entry(schedule=crontab())], [0, 60, 120], [0, 60, 120], [0, 60, 120]),
    # 12:00:45 is past, and was no tick then; that of the minute belongs to the entry as it was.
    "another schedule": ([entry()], [entry(schedule=interval(45))], [30, 75, 120], [0, 30, 75, 120], [0, 30, 75, 120]),
    "another time": ([entry()], [entry(schedule=crontab(0, 13))], [], [0], [0]),
    "disabled": ([entry()], [entry(enabled=False)], [], [0], [0]),
    "enabled": ([entry(enabled=False)], [entry()], [0, 60, 120], [60, 120], [60, 120]),
    "renamed": ([entry("a")], [entry("b")], [0, 60, 120], [0, 60, 120], [0, 60, 120]),
    "deleted": ([entry()], [], [], [0], [0]),
    "new": ([], [entry()], [0, 60, 120], [60, 120], [60, 120]),
}


@pytest.mark.parametrize("restarted", [False, True], ids=["while it runs", "with a restart"])
@pytest.mark.parametrize("moment", [-1, 0, 1], ids=["T-1 s", "T", "T+1 s"])
@pytest.mark.parametrize("catch_up", ["skip", "one", "all"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_around_a_tick_neither_fires_by_surprise_nor_skips_it(
    edit: str, catch_up: Any, moment: int, restarted: bool
) -> None:
    """As the leader does it: what is due of the entries as they were goes first. Each tick once, and none before it."""
    before, after, *expected = EDITS[edit]
    before, after = ([replace(one, catch_up=catch_up) for one in some] for some in (before, after))
    agenda = Agenda(before, State.new(NOON), NOON)
    edited = T + moment * SECOND
    sent: list[tuple[str, datetime, datetime]] = []
    for second in range(1, 191):
        now = NOON + second * SECOND
        if now == edited + 2 * SECOND and restarted:
            # Two seconds in which no beat leads: the last one has written down up to when it served the schedule.
            agenda = Agenda(after, handed_over(agenda.state), now)
        elif restarted and edited < now < edited + 2 * SECOND:
            continue
        sent += [(tick.entry.name, tick.due, now) for tick in agenda.due(now, 100)]
        if now == edited:
            agenda.state.through = now
            if not restarted:
                agenda.arrange(after, now)
    assert [(due - T) // SECOND for _, due, _ in sent] == expected[moment + 1]
    assert all(due <= now <= due + (1 + restarted) * SECOND for _, due, now in sent)
    names = {one.name for one in after} or {"a"}
    assert all(name in names for name, due, _ in sent if due > edited)

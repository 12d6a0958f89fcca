"""When periodic tasks are due, beside what another cron library says of the same days."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import pytest
from celery.schedules import crontab as celery_crontab
from croniter import croniter
from hypothesis import example, given, settings
from hypothesis import strategies as st

from amqptasks.beat.agenda import Agenda
from amqptasks.beat.state import State
from amqptasks.errors import ConfigError
from amqptasks.periodic import Entry
from amqptasks.schedules import Schedule, crontab, interval, schedule_of

MINUTE = timedelta(minutes=1)
#: Two years with every kind of change: in 2018 São Paulo had them still, at midnight.
TWO_YEARS = datetime(2017, 6, 1, 12, tzinfo=UTC), datetime(2019, 6, 1, 12, tzinfo=UTC)
#: Local times that are skipped or come twice: zone, day, hours around it that are looked at.
CHANGES = [
    ("America/New_York", "2026-03-08"),
    ("America/New_York", "2026-11-01"),
    ("Asia/Shanghai", "2026-03-08"),
    ("Asia/Shanghai", "2026-11-01"),
    ("Asia/Shanghai", "1991-04-14"),
    ("Asia/Shanghai", "1991-09-15"),
    ("Europe/Paris", "2026-03-29"),
    ("Europe/Paris", "2026-10-25"),
    ("Australia/Lord_Howe", "2026-04-05"),
    ("Australia/Lord_Howe", "2026-10-04"),
    ("America/Sao_Paulo", "2017-10-15"),
    ("America/Sao_Paulo", "2018-02-18"),
]
EXPRESSIONS = [
    "*/5 * * * *", "0 * * * *", "30 * * * *", "0 0 * * *", "30 1 * * *", "30 2 * * *", "15 0 * * *", "*/20 1 * * *",
    "*/5 2 * * *", "0 */2 * * *", "0,30 1-3 * * *", "59 23 * * *",
]  # fmt: skip
ZONES = ["America/New_York", "Europe/Paris", "Australia/Lord_Howe", "America/Sao_Paulo", "UTC"]


def due_between(schedule: Schedule, begin: datetime, end: datetime) -> list[datetime]:
    found = []
    moment = begin
    while (moment := schedule.next_after(moment)) <= end:
        found.append(moment)
    return found


def reference(expression: str, zone: str, begin: datetime, end: datetime, step: timedelta = MINUTE) -> list[datetime]:
    """Step by step, by the rule in words; croniter says which local times match.

    A schedule of every hour: all minutes that are. One that names hours: each local time once, and those that a clock
    skips at the first minute after. `step`: what all times, and all changes of the clocks, are multiples of.
    """
    every_hour = expression.split()[1] == "*"
    days = timedelta(days=2)
    matching = _matching(expression, begin.replace(tzinfo=None) - days, end.replace(tzinfo=None) + days)
    found: list[datetime] = []
    moment = begin - timedelta(hours=3)
    local = shown = moment.astimezone(ZoneInfo(zone)).replace(tzinfo=None, fold=0)
    while (moment := moment + step) <= end:
        local = moment.astimezone(ZoneInfo(zone)).replace(tzinfo=None, fold=0)
        if every_hour:
            due = local in matching
        else:
            # All local times that a clock that is never put back has passed since the last step.
            passed = [shown + step * n for n in range(1, (local - shown) // step + 1)]
            due = not matching.isdisjoint(passed)
        shown = max(shown, local)
        if due and moment > begin:
            found.append(moment)
    return found


@lru_cache(maxsize=32)
def _matching(expression: str, begin: datetime, end: datetime) -> frozenset[datetime]:
    """The local times between these two that match: zones share them."""
    theirs = croniter(expression, begin)
    return frozenset(itertools.takewhile(lambda one: one < end, iter(lambda: theirs.get_next(datetime), None)))


@pytest.mark.parametrize(("zone", "day"), CHANGES)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_24_hours_around_a_change_of_the_clocks_are_those_of_another_library(
    expression: str, zone: str, day: str
) -> None:
    begin = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC) - timedelta(hours=12)
    end = begin + timedelta(hours=36)
    assert due_between(crontab.from_string(expression, timezone=zone), begin, end) == reference(
        expression, zone, begin, end
    )


def test_the_documented_moments_of_a_skipped_hour_and_of_one_that_comes_twice() -> None:
    zone = ZoneInfo("America/New_York")
    nightly = crontab(minute=30, hour=2, timezone="America/New_York")
    spring = nightly.next_after(datetime(2026, 3, 8, tzinfo=zone)).astimezone(zone)
    assert spring.isoformat() == "2026-03-08T03:00:00-04:00"  # there is no 02:30: right after the gap
    assert nightly.next_after(spring).astimezone(zone).isoformat() == "2026-03-09T02:30:00-04:00"
    early = crontab(minute=30, hour=1, timezone="America/New_York")
    autumn = early.next_after(datetime(2026, 11, 1, tzinfo=zone)).astimezone(zone)
    assert autumn.isoformat() == "2026-11-01T01:30:00-04:00"  # the first 01:30
    assert early.next_after(autumn).astimezone(zone).isoformat() == "2026-11-02T01:30:00-05:00"
    assert early.next_after(autumn + timedelta(minutes=50)).astimezone(zone).day == 2  # asked in the second hour
    hourly = crontab(minute=30, timezone="America/New_York")
    assert (
        len(due_between(hourly, datetime(2026, 11, 1, 4, 0, tzinfo=UTC), datetime(2026, 11, 1, 8, 0, tzinfo=UTC))) == 4
    )


@settings(max_examples=60, deadline=None)
@given(
    zone=st.sampled_from(ZONES),
    expression=st.sampled_from([*EXPRESSIONS, "0 0 29 2 *", "0 12 1-7 * 1", "*/7 3,4 * * sun"]),
    begin=st.datetimes(datetime(2017, 6, 1), datetime(2019, 6, 1)),
)
@example(zone="America/New_York", expression="30 1 * * *", begin=datetime(2017, 11, 5, 6, 30))
def test_schedules_go_on_strictly_and_never_stall(zone: str, expression: str, begin: datetime) -> None:
    schedule = crontab.from_string(expression, timezone=zone)
    moments = [begin.replace(tzinfo=UTC)]
    for _ in range(40):
        moments.append(schedule.next_after(moments[-1]))
    assert all(a < b for a, b in itertools.pairwise(moments))
    # Asked a moment earlier, or anywhere before, the answer is the same.
    assert schedule.next_after(moments[2] - timedelta(microseconds=1)) == moments[2]
    assert schedule.next_after(moments[1] + (moments[2] - moments[1]) / 3) == moments[2]


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("expression", ["0 0 * * *", "30 1 * * *", "30 2 * * *", "*/5 * * * *"])
def test_two_years_are_those_of_another_library(expression: str, zone: str) -> None:
    """Every tick of two years: no time of a skipped hour is lost, none of one that comes twice runs twice."""
    due = due_between(crontab.from_string(expression, timezone=zone), *TWO_YEARS)
    assert due == reference(expression, zone, *TWO_YEARS, step=5 * MINUTE)
    assert all(a < b for a, b in itertools.pairwise(due))
    assert len(due) == (730 if expression[0] != "*" else 730 * 24 * 12)


NIGHTLY = {"midnight": "0 0 * * *", "half past one": "30 1 * * *", "half past two": "30 2 * * *"}


@pytest.mark.parametrize("zone", ZONES)
def test_a_beat_on_a_virtual_clock_neither_stalls_nor_repeats_for_two_years(zone: str) -> None:
    """The clock goes from one tick to the next, and every few ticks another beat takes over."""
    begin, end = TWO_YEARS
    entries = [Entry(name, "task", crontab.from_string(one, timezone=zone)) for name, one in NIGHTLY.items()]
    agenda = Agenda(entries, State.new(begin), begin)
    sent: dict[str, list[datetime]] = {name: [] for name in NIGHTLY}
    for turn in itertools.count():
        now = agenda.next_due
        assert now is not None
        if now > end:
            break
        ticks = agenda.due(now, 100)
        assert ticks, f"nothing is sent at {now}, when something is due"
        for tick in ticks:
            sent[tick.entry.name].append(tick.due)
        if turn % 7 == 0:
            state = State.from_table(json.loads(agenda.state.to_bytes())["state"])
            agenda = Agenda(entries, state, now + MINUTE)
    assert sent == {name: reference(one, zone, begin, end, step=5 * MINUTE) for name, one in NIGHTLY.items()}


@pytest.mark.parametrize(("zone", "day"), CHANGES)
def test_a_beat_of_every_five_minutes_goes_through_a_change_of_the_clocks(zone: str, day: str) -> None:
    begin = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC) - timedelta(hours=12)
    agenda = Agenda([Entry("e", "task", crontab("*/5", timezone=zone))], State.new(begin), begin)
    sent = []
    for second in range(0, 36 * 3600, 20):
        sent += [tick.due for tick in agenda.due(begin + timedelta(seconds=second), 100)]
    assert sent == [begin + n * 5 * MINUTE for n in range(1, 36 * 12)]


@pytest.mark.parametrize("zone", ZONES)
def test_two_years_of_days_have_one_run_each(zone: str) -> None:
    for expression in ("0 0 * * *", "30 1 * * *", "30 2 * * *", "15 2 * * *"):
        due = due_between(
            crontab.from_string(expression, timezone=zone),
            *TWO_YEARS,
        )
        days = [one.astimezone(ZoneInfo(zone)).date() for one in due]
        assert len(days) == 730
        assert all((b - a).days == 1 for a, b in itertools.pairwise(days))


@pytest.mark.parametrize(
    "fields",
    [
        {"hour": 3},
        {"minute": 0, "hour": 3},
        {"minute": "*/15", "hour": "8-17"},
        {"minute": "0", "hour": "*/3,8-17"},
        {"minute": [0, 20], "hour": 5, "day_of_week": "mon-fri"},
        {"minute": 0, "hour": 0, "day_of_week": "sunday"},
        {"minute": 0, "hour": 0, "day_of_week": 0},
        {"minute": 0, "hour": "22-2"},
        {"minute": 0, "hour": 0, "day_of_month": "1-7", "day_of_week": 1},
        {"minute": 0, "hour": 0, "day_of_month": "*/10"},
        {"minute": 5, "hour": 4, "month_of_year": "jan,jul", "day_of_month": 1},
        {"minute": "10-50/20", "hour": 1},
    ],
)
def test_the_keyword_form_means_what_it_means_to_celery(fields: dict) -> None:
    ours = crontab(**fields)
    theirs = celery_crontab(**fields)
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    for due in itertools.islice(_iterate(ours, begin), 50):
        assert due.minute in theirs.minute
        assert due.hour in theirs.hour
        assert due.isoweekday() % 7 in theirs.day_of_week
        assert due.day in theirs.day_of_month
        assert due.month in theirs.month_of_year
    count = sum(
        1
        for n in range(60 * 24 * 60)
        if (at := begin + MINUTE * (n + 1)).minute in theirs.minute
        and at.hour in theirs.hour
        and at.isoweekday() % 7 in theirs.day_of_week
        and at.day in theirs.day_of_month
        and at.month in theirs.month_of_year
    )
    assert len(due_between(ours, begin, begin + timedelta(days=60))) == count


def _iterate(schedule: Schedule, moment: datetime) -> Iterator[datetime]:
    while True:
        moment = schedule.next_after(moment)
        yield moment


@pytest.mark.parametrize(
    "expression", ["0 3 * * *", "*/10 * * * *", "0 0 1-7 * 1", "0 0 13 * fri", "5 4 * feb-apr sun", "0 0 */2 * 1"]
)
def test_five_fields_mean_what_they_mean_to_cron(expression: str) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    theirs = croniter(expression, begin, implement_cron_bug=True)
    ours = list(itertools.islice(_iterate(crontab.from_string(expression), begin), 30))
    assert ours == [theirs.get_next(datetime) for _ in range(30)]


def test_intervals_stand_on_a_grid_that_needs_no_memory() -> None:
    every = interval(300)
    assert every.next_after(datetime(2026, 1, 1, 0, 4, 59, 999999, UTC)) == datetime(2026, 1, 1, 0, 5, tzinfo=UTC)
    assert every.next_after(datetime(2026, 1, 1, 0, 5, tzinfo=UTC)) == datetime(2026, 1, 1, 0, 10, tzinfo=UTC)
    assert interval(0.1).next_after(datetime(2026, 1, 1, tzinfo=UTC)) == datetime(2026, 1, 1, 0, 0, 0, 100000, UTC)
    assert schedule_of(300) == schedule_of(timedelta(minutes=5)) == every
    assert schedule_of("0 3 * * *") == crontab.from_string("0 3 * * *")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: crontab(minute=61), "minute=61 is not between 0 and 59"),
        (lambda: crontab(hour="x"), "hour='x' is no number between 0 and 23"),
        (lambda: crontab(day_of_week="someday"), "nor the name of a day"),
        (lambda: crontab(minute="*/0"), "is not a number, a range"),
        (lambda: crontab(minute=[]), "names nothing"),
        (lambda: crontab(minute=True), "minute='true' is no number"),
        (lambda: crontab(day_of_month=30, month_of_year=2), "bad day-of-month"),
        (lambda: crontab(timezone="Europe/Pariss"), "did you mean 'Europe/Paris'"),
        (lambda: crontab.from_string("0 3 * *"), "has 4 fields; cron has five"),
        (lambda: crontab.from_string("0 25 * * *"), "'0 25 * * *' is not a crontab: bad hour"),
        (lambda: interval(0), "an interval of 0 seconds is too short"),
        (lambda: interval(timedelta(seconds=-5)), "an interval of -5 seconds"),
        (lambda: interval(float("nan")), "is no time"),
        (lambda: interval("5"), "an interval is a number of seconds"),
        (lambda: schedule_of(None), "a schedule is a crontab, an interval"),
    ],
)
def test_what_is_no_schedule_is_said_in_one_line(make, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as error:
        make()
    assert text in str(error.value)

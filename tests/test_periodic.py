"""Periodic calls, as settings and code name them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from amqptasks import AmqpTasks, chain
from amqptasks.beat.calls import checked_entries
from amqptasks.errors import ConfigError
from amqptasks.periodic import entries_of
from amqptasks.schedules import crontab, interval


def make(**config: Any) -> AmqpTasks:
    app = AmqpTasks("shop", config={"queues": {"media": {}}, **config})

    @app.task(name="shop.clean")
    def clean(days: int, *, deep: bool = False) -> None:
        """Nothing."""

    return app


def test_the_file_code_and_celerys_table_are_one_schedule_and_the_file_wins() -> None:
    app = make(
        timezone="Asia/Shanghai",
        schedule={
            "dawn": {"task": "shop.clean", "cron": "0 3 * * *", "args": [1], "options": {"queue": "media"}},
            "paris": {"task": "shop.clean", "cron": "0 3 * * *", "timezone": "Europe/Paris", "args": [2]},
        },
    )
    app.conf.beat_schedule = {
        "dawn": {"task": "shop.clean", "schedule": 1, "args": (9,)},
        "often": {"task": "shop.clean", "schedule": timedelta(seconds=30), "args": (3,), "options": {"expires": 10}},
    }

    @app.on_after_configure.connect
    def more(sender: AmqpTasks, **_: Any) -> None:
        sender.add_periodic_task(
            crontab(hour=7, minute=30, day_of_week=1),
            sender.tasks["shop.clean"].s(4, deep=True),
            name="mondays",
            priority=3,
        )
        sender.add_periodic_task(10.0, sender.tasks["shop.clean"].s(5))

    found = {one.name: one for one in checked_entries(app)}
    assert list(found) == ["dawn", "mondays", "often", "paris", "shop.clean(5)"]
    assert found["dawn"].schedule == crontab.from_string("0 3 * * *", timezone="Asia/Shanghai")
    assert found["paris"].schedule == crontab.from_string("0 3 * * *", timezone="Europe/Paris")
    assert (found["dawn"].args, found["dawn"].options) == ((1,), {"queue": "media"})
    assert found["often"].schedule == interval(30)
    assert found["often"].options == {"expires": 10.0}
    assert (found["mondays"].args, found["mondays"].kwargs) == ((4,), {"deep": True})
    assert found["mondays"].options == {"priority": 3}
    assert found["shop.clean(5)"].schedule == interval(10)
    assert len(entries_of(app, app.settings)) == 5  # the hook is called once


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"task": "shop.clean", "schedule": 0}, "periodic task 'x': an interval of 0 seconds is too short"),
        ({"task": "shop.clean"}, "periodic task 'x': a schedule is a crontab, an interval"),
        ({"schedule": 5}, "periodic task 'x': `task` is the name of a task"),
        ({"task": "shop.clean", "schedule": 5, "arg": (1,)}, "unknown key 'arg'; keys: args, catch_up"),
        ({"task": "shop.clean", "schedule": 5, "args": (1,), "options": {"queues": "media"}}, "queues: unknown option"),
        ({"task": "shop.clean", "schedule": 5, "args": (1,), "options": {"priority": 999}}, "priority: must be"),
        ({"task": "shop.clean", "schedule": 5, "args": (1,), "options": {"queue": "medai"}}, "queue 'medai' is not"),
        ({"task": "shop.clean", "schedule": 5, "args": (1,), "catch_up": "some"}, "catch_up is skip, one or all"),
        ({"task": "shop.clean", "schedule": 5}, "schedule 'x': task shop.clean: days: Missing"),
        ({"task": "shop.clean", "schedule": 5, "args": (object(),)}, "schedule 'x': "),
        (
            {"task": "shop.clean", "schedule": 5, "args": (1,), "options": {"headers": {"n": 1 << 70}}},
            "does not fit 64",
        ),
    ],
)
def test_what_cannot_be_sent_is_said_when_a_beat_starts(entry: dict[str, Any], text: str) -> None:
    app = make()
    app.conf.beat_schedule = {"x": entry}
    with pytest.raises(ConfigError) as error:
        checked_entries(app)
    assert text in str(error.value)
    assert "'x'" in str(error.value)


def test_only_signatures_of_tasks_are_periodic_and_only_the_schedule_is_set_in_code() -> None:
    app = make()
    clean = app.tasks["shop.clean"]
    with pytest.raises(ConfigError, match="write task"):
        app.add_periodic_task(5, clean)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is not the signature of a task"):
        app.add_periodic_task(5, chain(clean.s(1), clean.s(2)))
    with pytest.raises(ConfigError, match=r"app\.conf\.timezone: only beat_schedule"):
        app.conf.timezone = "UTC"


def test_a_task_that_is_not_here_is_sent_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    app = make(schedule={"x": {"task": "elsewhere.run", "every": "1h"}})
    assert [one.task for one in checked_entries(app)] == ["elsewhere.run"]
    assert "No such task here" in capsys.readouterr().out

"""Celery's settings as YAML, compared with what the real Celery makes of them."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery import Celery
from celery.app.defaults import _TO_OLD_KEY, SETTING_KEYS
from celery.schedules import crontab as celery_crontab
from celery.schedules import schedule as celery_interval
from click.testing import CliRunner, Result
from kombu import Exchange, Queue

from amqptasks.cli import cli
from amqptasks.config import Settings, load_settings
from amqptasks.conversion import Converted, convert, read_module
from amqptasks.conversion.names import current_name, is_lost
from amqptasks.errors import ConfigError
from amqptasks.routing import Router
from amqptasks.schedules import crontab


def loaded(found: Converted) -> Settings:
    return load_settings(data=found.document, environ={})


def said(found: Converted, kind: str) -> dict[str, str]:
    return {note.key: note.text for note in found.notes if note.kind == kind}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["import-celery", *arguments])


def test_every_setting_of_celery_is_known_and_those_of_celery_3_are_found_by_their_names() -> None:
    assert [key for key in SETTING_KEYS if current_name(key) != key] == []
    old = {name: new for new, name in _TO_OLD_KEY.items() if not is_lost(new)}
    assert {name: current_name(name) for name in old} == old
    assert current_name("CELERY_TASK_TIME_LIMIT") == "task_time_limit"  # Django's namespace
    assert {current_name(name) for name in ("DEBUG", "DATABASE_ROUTERS", "CACHE_MIDDLEWARE_SECONDS")} == {None}


@pytest.mark.parametrize(
    "routes",
    [
        {"feed.*": {"queue": "feeds"}, "feed.one": "email", "*.late": {"queue": "late", "priority": 3}},
        [{"feed.one": "email"}, ("feed.*", {"queue": "feeds"}), (re.compile(r"(IMAGE|video)\..*", re.I), "media")],
        {"feed.*.import": {"queue": "feeds"}, "what?": "late", "[feed]": {"queue": "late"}, "fe*": {"priority": 2}},
        ({re.compile(r"e{2}d"): "late", re.compile(r"f"): {"queue": "feeds", "priority": 0}},),
    ],
)
def test_tasks_go_where_celery_sends_them(routes: Any) -> None:
    if isinstance(routes, list):  # Celery takes pairs within a list of their own
        routes = [one if isinstance(one, dict) else [one] for one in routes]
    theirs = Celery(set_as_current=False)
    theirs.conf.update(task_routes=routes, task_default_queue="default", broker_url="memory://")
    ours = Router(loaded(convert({"task_routes": routes, "task_default_queue": "default"})))
    for name in ("feed.one", "feed.two", "feed.x.import", "feed.x.imported", "x.late", "video.cut", "what?", "whats",
                 "[feed]", "f", "eed", "need", "fed", "other"):  # fmt: skip
        found = theirs.amqp.router.route({}, name)
        queue = found["queue"].name if "queue" in found else "default"  # the route's priority alone: any queue
        route = ours.resolve(name)
        assert (route.queue, route.priority) == (queue, found.get("priority")), name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"minute": 0, "hour": 3},
        {"minute": "*/15", "hour": "8-17", "day_of_week": "mon-fri"},
        {"minute": [5, 35], "hour": {0, 12}, "day_of_month": "1, 15", "month_of_year": "1-6/2"},
        {"minute": "30", "hour": "4", "day_of_week": "sunday"},
        {"minute": "0", "hour": "22-2", "day_of_week": "friday-monday"},
    ],
)
def test_a_crontab_is_due_when_celery_s_is(fields: dict[str, Any]) -> None:
    now = [datetime(2027, 1, 1, 0, 0, 30, tzinfo=UTC)]
    theirs = celery_crontab(**fields, app=Celery(set_as_current=False), nowfun=lambda: now[0])
    entry = {"task": "x", "schedule": theirs}
    document = convert({"beat_schedule": {"one": entry}}).document
    ours = crontab.from_string(document["schedule"]["one"]["cron"]).in_zone("UTC")
    for _ in range(200):
        due = now[0] + theirs.remaining_estimate(now[0])
        assert ours.next_after(now[0]) == due
        now[0] = due


def test_days_that_must_both_match_are_no_fields_of_cron() -> None:
    entry = {"task": "x", "schedule": celery_crontab(day_of_month=13, day_of_week="friday")}
    found = convert({"beat_schedule": {"unlucky": entry}})
    assert "unlucky: both days of a crontab must match" in said(found, "lost")["beat_schedule"]
    assert "schedule" not in found.document


def test_queues_keep_their_arguments_and_whoever_sends_to_an_exchange_reaches_them() -> None:
    tasks = Exchange("tasks", type="topic")
    found = convert(
        {
            "task_queues": (
                Queue("plain"),
                Queue("urgent", tasks, routing_key="payment.#", queue_arguments={"x-max-priority": 10}),
                Queue("brief", max_length=1000, message_ttl=60, queue_arguments={"x-expires": 90_000, "x-mine": 1}),
                Queue("dead", queue_arguments={"x-dead-letter-exchange": "dlx"}, auto_delete=True),
            ),
            "task_default_queue": "plain",
        }
    )
    settings = loaded(found)
    assert list(settings.queues) == ["plain", "urgent", "brief", "dead"]
    assert settings.queues["urgent"].max_priority == 10
    assert [(one.exchange, one.routing_key) for one in settings.queues["urgent"].bindings] == [("tasks", "payment.#")]
    assert settings.exchanges["tasks"].type == "topic"
    brief = settings.queues["brief"]
    assert (brief.max_length, brief.message_ttl, brief.expires) == (1000, 60, 90)
    assert brief.arguments == {"x-mine": 1}
    assert "dead.dlq holds" in said(found, "look")["task_queues"]
    assert "auto_delete" in said(found, "lost")["task_queues"]


def test_a_table_of_queues_and_priorities_for_all_of_them() -> None:
    found = convert(
        {
            "task_queues": {"a": {"exchange": "ex", "exchange_type": "topic", "routing_key": "a.#"}, "b": {}},
            "task_queue_max_priority": 5,
        }
    )
    settings = loaded(found)
    assert {name: queue.max_priority for name, queue in settings.queues.items()} == {"celery": 5, "a": 5, "b": 5}
    assert settings.exchanges["ex"].type == "topic"


def test_what_needs_no_setting_and_what_stays_behind_is_named() -> None:
    found = convert(
        {
            "task_acks_late": False,
            "broker_transport_options": {"confirm_publish": True, "max_retries": 3},
            "worker_timer": "x",
            "broker_heartbeat": 0,
            "task_routes": ("shop.routers.Router",),
            "beat_schedule": {"sun": {"task": "x", "schedule": object()}},
            "result_backend": "s3://",
            "broker_url": "redis://here",
        }
    )
    assert said(found, "already").keys() == {"task_acks_late", "broker_transport_options"}
    assert said(found, "lost").keys() == {
        "broker_transport_options", "worker_timer", "broker_heartbeat", "task_routes", "beat_schedule",
        "result_backend", "broker_url",
    }  # fmt: skip
    loaded(found)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"broker_url": "pyamqp://a@b//"}, {"broker": {"url": "amqp://a@b//"}}),
        ({"broker_url": "amqp://a;amqp://b"}, {"broker": {"url": ["amqp://a", "amqp://b"]}}),
        (
            {"broker_url": "amqp://a", "broker_use_ssl": {"ca_certs": "/ca.pem", "cert_reqs": 0}},
            {"broker": {"url": "amqps://a", "tls": {"ca_file": "/ca.pem", "verify": False}}},
        ),
        ({"broker_connection_max_retries": None}, {"broker": {"connection_max_retries": None}}),
        ({"result_backend": "db+postgresql+psycopg2://u@h/d"}, {"result": {"backend": "postgresql://u@h/d"}}),
        ({"result_backend": "rpc"}, {"result": {"backend": "rpc://"}}),
        ({"result_expires": timedelta(hours=1)}, {"result": {"expires": 3600}}),
        ({"result_backend": "disabled://"}, {"result": {"backend": "none"}}),
        ({"task_compression": "bzip2"}, {"serialization": {"compression": "bzip2"}}),
        ({"worker_pool": "prefork"}, {"worker": {"pool": "prefork"}}),
        ({"worker_max_memory_per_child": 1000}, {"worker": {"max_memory_per_child": "1000KiB"}}),
        ({"worker_soft_shutdown_timeout": 60.0}, {"worker": {"grace_period": 60.0}}),
        ({"imports": ["a"], "include": ("b", "a")}, {"include": ["a", "b"]}),
        (
            {"task_ignore_result": True, "task_annotations": {"x": {"max_retries": 2}}},
            {"tasks": {"*": {"ignore_result": True}, "x": {"max_retries": 2}}},
        ),
    ],
)  # fmt: skip
def test_a_setting_becomes(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    found = convert(theirs)
    assert {key: value for key, value in found.document.items() if key not in ("queues", "topology")} == ours
    loaded(found)


def test_a_password_of_the_result_store_is_told() -> None:
    found = convert({"result_backend": "redis://:s3cret@here/0"})
    assert "a password stands in it" in said(found, "look")["result_backend"]
    assert loaded(found).result.backend == "redis://:s3cret@here/0"


def test_intervals() -> None:
    found = convert(
        {
            "beat_schedule": {
                "a": {"task": "t", "schedule": 0.5},
                "b": {
                    "task": "t",
                    "schedule": timedelta(minutes=5),
                    "args": (1,),
                    "options": {"queue": "q", "retry": 1},
                },
                "c": {"task": "t", "schedule": celery_interval(run_every=timedelta(days=1))},
            }
        }
    )
    schedule = loaded(found).schedule
    assert {name: one.every for name, one in schedule.items()} == {"a": 0.5, "b": 300, "c": 86400}
    assert schedule["b"].args == (1,)
    assert "q" in loaded(found).queues


CONFIG = """
from kombu import Queue
BROKER_URL = "amqp://shop:s3cret$@rabbit/shop"
CELERY_QUEUES = [Queue("email")]
CELERYD_CONCURRENCY = 4
CELERY_ROUTES = {"mail.*": "email"}
"""


def test_the_command_writes_a_file_that_loads(tmp_path: Path) -> None:
    source, target = tmp_path / "celeryconfig.py", tmp_path / "config" / "amqptasks.yaml"
    source.write_text(CONFIG + "worker_timer = 'x'\n")
    done = run(str(source), "-o", str(target))
    assert done.exit_code == 0, done.output
    assert "Not taken over:\n  worker_timer: no counterpart" in done.stderr
    assert "a password stands in it" in done.stderr
    assert "s3cret" not in done.output
    assert target.stat().st_mode & 0o077 == 0, "a password stands in it"
    assert "#   worker_timer: no counterpart" in target.read_text()
    settings = load_settings(target, environ={})
    assert settings.broker.url == ("amqp://shop:s3cret$@rabbit/shop",)
    assert settings.worker.concurrency == 4
    assert Router(settings).resolve("mail.send").queue == "email"
    again = run(str(source), "-o", str(target))
    assert again.exit_code == 1
    assert "is there already; --force replaces it" in again.output
    assert run(str(source), "-o", str(target), "--force").exit_code == 0


def test_the_command_for_programs_and_on_stdout(tmp_path: Path) -> None:
    source = tmp_path / "celeryconfig.py"
    source.write_text(CONFIG)
    told = json.loads(run(str(source), "--json").stdout)
    assert told["settings"]["worker"] == {"concurrency": 4}
    assert told["problems"] == []
    assert yaml.safe_load(run(str(source)).stdout)["worker"] == {"concurrency": 4}


def test_a_result_that_is_not_valid_is_told(tmp_path: Path) -> None:
    source = tmp_path / "celeryconfig.py"
    source.write_text("task_routes = {'a.*': {'exchange': 'elsewhere', 'routing_key': 'k'}}\n")
    done = run(str(source))
    assert done.exit_code == 1
    assert "the result is not valid yet" in done.stderr
    assert "elsewhere" in done.stderr
    assert yaml.safe_load(done.stdout)["routes"][0]["exchange"] == "elsewhere"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = (\n", "celeryconfig.py:1: "),
        ("import os\nimport nowhere_at_all\n", "celeryconfig.py:2: ModuleNotFoundError: No module named"),
        ("\n\nraise SystemExit(3)\n", "celeryconfig.py:3: SystemExit"),
        ("DEBUG = True\n", "no setting of Celery's stands in it"),
    ],
)
def test_a_module_that_cannot_be_used_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    source = tmp_path / "celeryconfig.py"
    source.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)):
        read_module(source)


def test_a_module_may_import_what_stands_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_celery.py").write_text("LIMIT = 7\n")
    source = tmp_path / "celeryconfig.py"
    source.write_text("from beside_celery import LIMIT\ntask_time_limit = LIMIT\n")
    assert read_module(source) == {"task_time_limit": 7}
    with pytest.raises(ConfigError, match="no such file"):
        read_module(tmp_path / "other.py")

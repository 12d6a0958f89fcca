"""``amqptasks config`` and ``amqptasks routes``, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = """
broker: {url: "amqp://shop:hidden@h/"}
exchanges: {events: {type: topic}}
queues: {high: {max_priority: 10}, media: {}}
routes:
  - {match: "payment.*", queue: high, priority: 9}
  - {regex: '^video\\.', exchange: events}
tasks:
  "report.*": {queue: high, priority: 2}
  "report.big": {queue: media}
"""
MODULE = """
from amqptasks import AmqpTasks
app = AmqpTasks("shop")
@app.task(name="mail.send", queue="media", priority=4)
def send(): ...
@app.task(name="report.big", queue="high")
def big(): ...
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "amqptasks.yaml").write_text(FILE)
    (tmp_path / "shop.py").write_text(MODULE)
    own = {name: value for name, value in os.environ.items() if not name.startswith("AMQPTASKS_")}

    def call(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "amqptasks", *arguments]
        env = {**own, "PYTHONPATH": str(ROOT), **environ}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    return call


def test_check_says_ok_with_counts(run):
    done = run("config", "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "amqptasks.yaml: ok: 3 queues, 1 exchange, 2 routes, 2 tasks, 0 schedules\n"
    assert json.loads(run("config", "check", "--json").stdout)["queues"] == 3


def test_check_exits_2_with_the_problems_and_no_traceback(run, tmp_path):
    (tmp_path / "bad.yaml").write_text("queues:\n  email: {max_lenght: 1}\napp: [x]\n")
    done = run("--config", "bad.yaml", "config", "check")
    assert (done.returncode, done.stdout) == (2, "")
    assert "bad.yaml:2: queues.email.max_lenght: unknown key; did you mean 'max_length'?\n" in done.stderr
    assert "bad.yaml:3: app: must be a valid string" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_commented_example_passes_the_check(run):
    done = run("--config", str(ROOT / "config/amqptasks.yaml"), "config", "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(": ok: 6 queues, 0 exchanges, 5 routes, 2 tasks, 2 schedules\n")


def test_check_reads_flags_and_environment(run):
    done = run("-b", "http://x", "config", "check")
    assert (done.returncode, "flag or argument: broker.url: " in done.stderr) == (2, True)
    done = run("config", "check", AMQPTASKS_WORKER__POOL="sol")
    assert (done.returncode, "AMQPTASKS_WORKER__POOL: worker.pool: " in done.stderr) == (2, True)
    assert "nope.yaml: no such configuration file" in run("--config", "nope.yaml", "config", "check").stderr


def test_a_variable_that_is_not_used_is_warned_of_on_stderr(run):
    done = run("config", "check", AMQPTASKS_BROKER_URL="amqp://h")
    assert done.returncode == 0
    assert "did you mean AMQPTASKS_BROKER__URL?" in done.stderr


def test_show_prints_the_effective_settings_without_secrets(run):
    done = run("-A", "shop:app", "config", "show", AMQPTASKS_WORKER__POOL="solo")
    shown = yaml.safe_load(done.stdout)
    assert (shown["app"], shown["worker"]["pool"]) == ("shop:app", "solo")
    assert shown["broker"]["url"] == ["amqp://shop:***@h/"]
    assert "hidden" not in done.stdout
    assert json.loads(run("config", "show", "--json").stdout)["queues"]["high"]["max_priority"] == 10


def test_schema_prints_a_json_schema(run):
    assert "queues" in json.loads(run("config", "schema").stdout)["properties"]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("payment.x", ["routes[0]: match 'payment.*'", "high", "amqptasks", "high", "9"]),
        ("video.x", [r"routes[1]: regex '^video\\.'", "(as the exchange decides)", "events", "(empty)", "-"]),
        ("other", ["none of 2 matches: the default queue", "default", "amqptasks", "default", "-"]),
        (
            "report.x",
            ["none of 2 matches: queue of tasks.report.*", "high", "amqptasks", "high", "2 (of tasks.report.*)"],
        ),
        (
            "report.big",
            ["none of 2 matches: queue of tasks.report.big", "media", "amqptasks", "media", "2 (of tasks.report.*)"],
        ),
    ],
)
def test_routes_test_tells_rule_queue_exchange_key_and_priority(run, name, rows):
    done = run("routes", "test", name)
    assert (done.returncode, done.stderr) == (0, "")
    titles = ["task", "rule", "queue", "exchange", "key", "priority"]
    assert done.stdout.splitlines() == [f"{title:<9}{row}" for title, row in zip(titles, [name, *rows], strict=True)]


def test_routes_test_looks_into_the_app_that_is_given(run):
    done = run("-A", "shop", "routes", "test", "mail.send")
    assert "none of 2 matches: queue of the code" in done.stdout
    assert "priority 4 (of the code)" in done.stdout
    assert "queue of tasks.report.big" in run("-A", "shop", "routes", "test", "report.big").stdout
    assert "has no task called 'nope'" in run("-A", "shop", "routes", "test", "nope").stderr


def test_routes_test_is_for_programs_too(run):
    assert json.loads(run("routes", "test", "payment.x", "--json").stdout) == {
        "task": "payment.x",
        "source": "rule",
        "rule": {"match": "payment.*", "queue": "high", "priority": 9},
        "index": 0,
        "exchange": "amqptasks",
        "routing_key": "high",
        "queue": "high",
        "priority": 9,
    }

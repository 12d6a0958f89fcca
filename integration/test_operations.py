"""Three days in operations: a deployment half done, a night of failures, a queue that somebody else declared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from integration.conftest import ROOT, Bench

NEWER = """
from integration.apps.jobs import app
from amqptasks.testing.ledger import record

@app.task(bind=True, name="integration.apps.jobs.version_two")
def version_two(self, number):
    record(self.request.id, "done", self.request.retries + 1)
"""
SHOP = """
import pathlib
from amqptasks import AmqpTasks
from amqptasks.testing.ledger import record

app = AmqpTasks("shop")
MENDED = pathlib.Path(__file__).with_name("mended")

class CardRefused(Exception): pass

@app.task(bind=True, name="shop.charge", autoretry_for=(Exception,), max_retries=1, default_retry_delay=0.2)
def charge(self, order, how):
    if MENDED.exists():
        record(self.request.id, "done", self.request.retries + 1)
        return
    raise {"card": CardRefused, "net": ConnectionError, "data": KeyError}[how](f"order {order}")

@app.task(bind=True, name="shop.order")
def order(self, number, how):
    charge.delay(number, how)
"""


def _amqptasks(bench: Bench, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "amqptasks", "--config", str(bench.config), *arguments],
        capture_output=True, text=True, timeout=60, check=False, cwd=bench.folder,
        env={**os.environ, "PYTHONPATH": f"{bench.folder}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout + (done.stderr if code else "")


def _processor_share(worker: WorkerProcess) -> float:
    """What a worker with all its processes uses, while it has nothing to do."""
    root = psutil.Process(worker.process.pid)
    family = [root, *root.children(recursive=True)]

    def used() -> float:
        return sum(times.user + times.system for times in (one.cpu_times() for one in family))

    began, before = time.monotonic(), used()
    time.sleep(3)
    return (used() - before) / (time.monotonic() - began)


@pytest.mark.timing
def test_calls_of_a_newer_version_wait_for_its_workers_and_one_command_brings_them_back(bench: Bench) -> None:
    app = bench.client()
    old = bench.worker()
    ids = {bench.send(app, "version_two", number) for number in range(20)}
    letters = bench.vhost.dead_letters("default", 20)
    assert {one["properties"]["headers"]["x-task-reason"] for one in letters} == {"unknown_task"}
    share = _processor_share(old)
    print(f"the worker that cannot run them uses {share:.1%} of a processor")
    assert share < 0.05
    old.stop()
    (bench.folder / "newer.py").write_text(NEWER)
    bench.APP = "newer:app"
    bench.worker(path=bench.folder)
    assert _amqptasks(bench, "dlq", "replay", "--reason", "unknown_task") == "20 letters replayed\n"
    bench.wait_done(ids)
    assert bench.vhost.ready("default.dlq") == 0
    assert len(bench.ledger.entries("done")) == 20


def test_a_night_of_failures_is_read_sorted_and_replayed(bench: Bench) -> None:
    """A hundred orders: their payments fail for three reasons, after a retry each."""
    (bench.folder / "shop.py").write_text(SHOP)
    bench.APP = "shop:app"
    worker = bench.worker("default", "-c", "4", path=bench.folder)
    app = bench.client()
    kinds = ["card"] * 60 + ["net"] * 30 + ["data"] * 10
    orders = {app.send_task("shop.order", (number, kind)).id for number, kind in enumerate(kinds)}
    wait_until(lambda: bench.vhost.ready("default.dlq") == 100, 60, "all payments are dead")
    worker.stop()

    groups = json.loads(_amqptasks(bench, "dlq", "list", "--json"))
    told = [(one["count"], one["task"], one["reason"], one["exception"].rpartition(".")[2]) for one in groups]
    assert told == [
        (60, "shop.charge", "retries_exhausted", "CardRefused"),
        (30, "shop.charge", "retries_exhausted", "ConnectionError"),
        (10, "shop.charge", "retries_exhausted", "KeyError"),
    ]
    assert all("shop.py:" in one["top_frame"] for one in groups)
    for filters, count in (
        (["--task", "shop.*"], 100), (["--task", "mail.*"], 0), (["--exception", "*Card*"], 60),
        (["--since", "1h"], 100), (["--until", "1h"], 0), (["--reason", "failed"], 0),
        (["--exception", "Key*", "-Q", "default"], 10),
    ):  # fmt: skip
        found = json.loads(_amqptasks(bench, "dlq", "list", "--json", *filters))
        assert sum(one["count"] for one in found) == count, filters
    chosen = groups[2]["examples"][0]
    shown = _amqptasks(bench, "dlq", "show", chosen)
    assert '"data"]' in shown
    assert "KeyError: 'order 9" in shown
    assert "in charge" in shown

    assert "60 letters match" in _amqptasks(bench, "dlq", "replay", "--exception", "*Card*", "--dry-run")
    assert bench.vhost.ready("default") == 0
    before = {
        one["properties"]["headers"]["id"]: one["properties"]["headers"]
        for one in bench.vhost.dead_letters("default", 100)
    }
    assert _amqptasks(bench, "dlq", "replay", chosen) == "1 letter replayed\n"
    assert _amqptasks(bench, "dlq", "replay", "--exception", "*Card*") == "60 letters replayed\n"
    assert _amqptasks(bench, "dlq", "replay", "--all") == "39 letters replayed\n"
    replayed = [one["properties"]["headers"] for one in bench.vhost.management.messages("default")]
    assert len(replayed) == 100
    for headers in replayed:
        was = before[headers["id"]]
        assert [headers[name] for name in ("root_id", "parent_id")] == [was["root_id"], was["parent_id"]]
        assert (headers["parent_id"] in orders, headers["retries"], headers["x-task-replays"]) == (True, 0, 1)
    (bench.folder / "mended").touch()
    bench.worker("default", "-c", "4", path=bench.folder)
    bench.wait_done(set(before))
    assert bench.vhost.ready("default.dlq") == 0


QUORUM = {"x-queue-type": "quorum"}
FOREIGN: list[Any] = [
    pytest.param({}, {"x-queue-type": "classic"}, ["x-queue-type=classic", "declared quorum"], id="type"),
    pytest.param(
        {"max_priority": 5},
        {"x-queue-type": "classic", "x-max-priority": 3},
        ["x-max-priority=3", "declared 5"],
        id="priority",
    ),
    pytest.param({}, {**QUORUM, "x-message-ttl": 5000}, ["x-message-ttl=5000", "declared without"], id="ttl"),
    pytest.param(
        {},
        {**QUORUM, "x-dead-letter-exchange": "theirs"},
        ["x-dead-letter-exchange=theirs", "declared amqptasks.dlx"],
        id="dead-letter exchange",
    ),
]


@pytest.mark.parametrize(("settings", "arguments", "words"), FOREIGN)
def test_a_queue_that_somebody_else_declared_is_named_once_and_can_be_used_as_it_is(
    bench: Bench, settings: dict[str, Any], arguments: dict[str, Any], words: list[str]
) -> None:
    bench.settings["queues"]["default"] = settings
    path = f"queues/{bench.vhost.name}/default"
    bench.vhost.management.request("PUT", path, {"durable": True, "arguments": arguments})
    ended = bench.worker(ready=False)
    assert ended.process.wait(30) == 2, "it ends: nothing starts it again and again"
    errors = [line for line in ended.log.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    for word in ("queue 'default'", *words):
        assert word in errors[0], errors[0]
    assert "delete_queue default" in errors[0] or "amqptasks topology migrate default" in errors[0]
    assert "Traceback" not in ended.log

    # Everything else stands by now; what only looks takes the queue as it is.
    bench.settings["topology"] = {"declare": False}
    bench.worker()
    app = bench.client()
    bench.vhost.management.request(
        "POST", f"bindings/{bench.vhost.name}/e/amqptasks/q/default", {"routing_key": "default"}
    )
    bench.wait_done({bench.send(app, "note")})


def test_limits_that_a_policy_sets_need_no_new_declaration(bench: Bench) -> None:
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url
    worker = bench.worker()
    app = bench.client()
    bench.wait_done({bench.send(app, "note")})
    for number, definition in enumerate(
        [{"message-ttl": 3_600_000, "max-length": 1000}, {"delivery-limit": 50}, {"dead-letter-exchange": "theirs"}]
    ):
        bench.vhost.management.set_policy("ours", "^default$", definition)
        wait_until(
            lambda definition=definition: (
                bench.vhost.management.queue("default").get("effective_policy_definition") == definition
            ),
            20,
            "the policy is in effect",
        )
        worker.stop()
        worker = bench.worker()  # it declares all of it again
        bench.wait_done({bench.send(app, "note")})
        plan = json.loads(_amqptasks(bench, "topology", "plan", "--json"))
        told = plan["policies"].pop("default")
        assert plan == {"same": True, "changes": [], "policies": {}}, number
        assert {"policy": "ours", "operator_policy": "", **definition}.items() <= told.items()

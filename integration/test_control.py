"""Remote control: Celery's own commands and these, against a worker whose executors are all busy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pika
import pytest

from amqptasks.broker.broadcast import broadcast
from amqptasks.broker.mailbox import REPLY_EXCHANGE, REQUEST_EXCHANGE
from amqptasks.config import BrokerSettings
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench
from integration.strangers import strange_channel

NODE, TASK = "shop@test", "integration.apps.jobs.note"


def _run(bench: Bench, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def _celery(bench: Bench, *command: str) -> Any:
    """What Celery's own command line prints of our worker, with ``--json``."""
    done = _run(bench, "celery", "-b", bench.vhost.url, *command, "--json", "--timeout", "10", "-d", NODE)
    assert done.returncode == 0, done.stderr + done.stdout
    said = json.loads(done.stdout)
    return (said[0] if isinstance(said, list) else said)[NODE]


def _ours(bench: Bench, *command: str, code: int = 0) -> Any:
    done = _run(bench, "amqptasks", "-b", bench.vhost.url, *command, "--json", "--timeout", "10", "-d", NODE)
    assert done.returncode == code, done.stderr + done.stdout
    return json.loads(done.stdout)[NODE]


def _ask(bench: Bench, method: str, arguments: dict[str, Any] | None = None, timeout: float = 10.0) -> Any:
    settings = BrokerSettings.model_validate({"url": bench.vhost.url})
    return broadcast(settings, method, arguments or {}, destination=[NODE], timeout=timeout).get(NODE)


@pytest.fixture
def busy(bench: Bench) -> tuple[Bench, list[str]]:
    """A worker of two queues with every executor busy, and the ids of what it holds."""
    bench.settings["queues"]["email"] = {}
    bench.worker("default", "-c", "1", "-n", NODE, "--prefetch", "3")
    app = bench.client()
    ids = [bench.send(app, "note", 60.0, queue="default") for _ in range(3)]
    wait_until(lambda: len(bench.ledger.ids("begin")) == 1, 20, "the first task runs")
    wait_until(lambda: len(_ask(bench, "reserved")) == 2, 20, "the others are held")
    return bench, ids


@pytest.mark.parametrize("ask", [_celery, _ours])
def test_inspection_answers_while_every_executor_is_busy(
    busy: tuple[Bench, list[str]], ask: Callable[..., Any]
) -> None:
    bench, ids = busy
    assert ask(bench, "inspect", "ping") == {"ok": "pong"}
    (active,) = ask(bench, "inspect", "active")
    assert active["id"] in ids
    assert active["name"] == "integration.apps.jobs.note"
    assert (active["args"], active["kwargs"], active["hostname"]) == ([60.0], {}, NODE)
    assert 0 <= time.time() - active["time_start"] < 60
    os.kill(active["worker_pid"], 0)
    reserved = ask(bench, "inspect", "reserved")
    assert {active["id"], *(one["id"] for one in reserved)} == set(ids)
    assert ask(bench, "inspect", "scheduled") == []
    found = ask(bench, "inspect", "query_task", *ids)
    assert sorted(state for state, _ in found.values()) == ["active", "reserved", "reserved"]
    (queue,) = ask(bench, "inspect", "active_queues")
    assert queue["name"] == "default"
    assert queue["queue_arguments"]["x-queue-type"] == "quorum"
    stats = ask(bench, "inspect", "stats")
    assert stats["pool"]["max-concurrency"] == 1
    assert stats["pool"]["processes"] == [active["worker_pid"]]
    assert stats["prefetch_count"] == 3
    assert "integration.apps.jobs.note" in ask(bench, "inspect", "registered")
    assert "guest:guest" not in json.dumps([ask(bench, "inspect", "conf"), ask(bench, "inspect", "report")])


#: Everything that is asked or changed, but what ends the worker.
_PLAIN = (
    "ping", "clock", "memsample", "conf", "report", "registered", "stats", "active_queues", "active", "reserved",
    "scheduled", "revoked", "heartbeat", "enable_events", "disable_events", "dump_revoked", "dump_conf", "dump_active",
    "dump_reserved", "dump_schedule", "dump_tasks", "pool_restart",
)  # fmt: skip
_METHODS: dict[str, dict[str, Any]] = {
    **{method: {} for method in _PLAIN},
    "hello": {"from_node": "another@test", "revoked": {}},
    "query_task": {"ids": ["nobody"]},
    "time_limit": {"task_name": TASK, "hard": 600, "soft": 500},
    "rate_limit": {"task_name": "integration.apps.jobs.paced", "rate_limit": "0"},
    "revoke": {"task_id": ["nobody"]},
    "terminate": {"task_id": ["nobody"], "signal": "SIGTERM"},
    "pool_grow": {"n": 1},
    "pool_shrink": {"n": 1},
    "add_consumer": {"queue": "default"},
    "cancel_consumer": {"queue": "email"},
    "autoscale": {"max": 3, "min": 1},
}


@pytest.mark.timing
@pytest.mark.parametrize(("pool", "task"), [("process", "occupies"), ("thread", "occupies"), ("asyncio", "blocks")])
def test_every_question_is_answered_within_a_second_while_every_executor_is_busy(
    bench: Bench, pool: str, task: str
) -> None:
    """In the thread pool with the interpreter's lock held, in the asyncio pool with the loop blocked."""
    bench.settings["queues"]["email"] = {}
    worker = bench.worker("default,email", "-c", "1", "-P", pool, "-n", NODE)
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    busy = bench.send(bench.client(), task, *(("gil",) if task == "occupies" else ()), 90.0)
    bench.wait_done({busy}, event="begin")
    took, said = {}, {}
    for method, arguments in _METHODS.items():
        started = time.monotonic()
        said[method] = _ask(bench, method, arguments)
        took[method] = time.monotonic() - started
    assert None not in said.values(), said
    # With connecting. One may come while the machine does something else.
    assert sorted(took.values())[-2] < 1.0, took
    assert max(took.values()) < 2.0, took
    refused = {method: one for method, one in said.items() if isinstance(one, dict) and "error" in one}
    assert refused.keys() == {"autoscale"}
    assert isinstance(said["clock"]["clock"], int)
    assert said["hello"].keys() == {"revoked", "clock"}
    assert said["hello"]["revoked"] == {}
    assert said["memsample"].endswith("MB")
    for alias in ("active", "reserved", "revoked"):
        assert [type(one) for one in said[f"dump_{alias}"]] == [type(one) for one in said[alias]]
    assert said["dump_tasks"] == said["registered"]
    assert said["dump_schedule"] == said["scheduled"] == []
    assert said["dump_conf"] == said["conf"]
    assert busy not in bench.ledger.ids("done")
    worker.kill()


def test_celery_with_an_application_asks_too(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "celery_app.py").write_text(
        f"from celery import Celery\napp = Celery('other', broker={bench.vhost.url!r})\n"
    )
    bench.worker("default", "-c", "1", "-n", NODE)
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    for method in ("ping", "stats", "clock", "conf"):
        done = subprocess.run(
            [sys.executable, "-m", "celery", "-A", "celery_app", "inspect", method, "--json", "-t", "10", "-d", NODE],
            capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        said = json.loads(done.stdout)
        assert NODE in (said[0] if isinstance(said, list) else said)


def test_the_settings_are_told_with_and_without_the_defaults(bench: Bench) -> None:
    bench.worker("default", "-c", "1", "-n", NODE)
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    own, all_of_them = _ours(bench, "inspect", "conf"), _ours(bench, "inspect", "conf", "true")
    assert own.keys() == {"broker", "queues"}
    assert own["broker"].keys() == {"url"}
    assert all_of_them.keys() > {"broker", "queues", "worker", "result"}
    assert all_of_them["broker"]["heartbeat"] > 0
    assert "guest:guest" not in json.dumps([own, all_of_them])


@pytest.mark.parametrize("ask", [_celery, _ours])
def test_a_queue_is_added_and_cancelled(bench: Bench, ask: Callable[..., Any]) -> None:
    bench.settings["queues"]["email"] = {}
    worker = bench.worker("default", "-c", "1", "-n", NODE)
    app = bench.client()
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    assert "ok" in ask(bench, "control", "add_consumer", "email")
    wait_until(lambda: len(worker.leaders()) == 2, 20, "a leader for email")
    mail = bench.send(app, "note", 0.0, queue="email")
    bench.wait_done({mail})
    assert "ok" in ask(bench, "control", "cancel_consumer", "email")
    wait_until(lambda: len(worker.leaders()) == 1, 20, "email's leader leaves")
    bench.send(app, "note", 0.0, queue="email")
    default = bench.send(app, "note", 0.0, queue="default")
    bench.wait_done({default})
    assert bench.vhost.ready("email") == 1
    assert [one["name"] for one in ask(bench, "inspect", "active_queues")] == ["default"]


@pytest.mark.parametrize("by", ["broadcast", "journal"])
def test_what_runs_in_a_queue_that_was_cancelled_is_seen_and_ended(bench: Bench, by: str) -> None:
    """Also when the queue is consumed again meanwhile."""
    bench.settings["queues"]["email"] = {}
    worker = bench.worker("default,email", "-c", "1", "-n", NODE)
    app = bench.client()
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    old = bench.send(app, "note", 60.0, queue="email")
    bench.wait_done({old}, event="begin")
    assert "ok" in _ask(bench, "cancel_consumer", {"queue": "email"})
    assert [one["id"] for one in _ask(bench, "active")] == [old]
    assert "ok" in _ask(bench, "add_consumer", {"queue": "email"})
    new = bench.send(app, "note", 60.0, queue="email")
    bench.wait_done({new}, event="begin")
    assert {one["id"] for one in _ask(bench, "active")} == {old, new}
    assert [state for state, _ in _ask(bench, "query_task", {"ids": [old]}).values()] == ["active"]
    assert len(_ask(bench, "active_queues")) == 2
    assert len(worker.leaders()) == 3
    if by == "journal":
        app.control.revoke(old, terminate=True)
    else:
        assert "ok" in _ask(bench, "revoke", {"task_id": old, "terminate": True})
    wait_until(lambda: len(worker.leaders()) == 2, 10, "the old leader leaves")
    (letter,) = bench.vhost.dead_letters("email", 1)
    assert letter["properties"]["correlation_id"] == old
    assert letter["properties"]["headers"]["x-task-reason"] == "revoked"
    assert [one["id"] for one in _ask(bench, "active")] == [new]


def test_what_runs_in_leaders_of_the_old_code_is_ended(bench: Bench) -> None:
    worker = bench.worker("default", "-c", "1", "-n", NODE)
    app = bench.client()
    task = bench.send(app, "note", 60.0)
    bench.wait_done({task}, event="begin")
    (old,) = worker.leaders()
    worker.process.send_signal(signal.SIGHUP)
    wait_until(lambda: {one.pid for one in worker.leaders()} > {old.pid}, 30, "new leaders beside the old")
    bench.wait_done({bench.send(app, "note")})
    wait_until(lambda: worker.log.count(" ready.") == 2, 20, "the old leader drains")
    app.control.revoke(task, terminate=True)
    wait_until(lambda: not old.is_running(), 10, "the old leader leaves")
    (letter,) = bench.vhost.dead_letters("default", 1)
    assert letter["properties"]["headers"]["x-task-reason"] == "revoked"


def test_the_pool_grows_and_shrinks_and_is_replaced(bench: Bench) -> None:
    worker = bench.worker("default", "-c", "1", "-n", NODE)
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    assert "ok" in _celery(bench, "control", "pool_grow", "2")
    wait_until(lambda: len(worker.executors()) == 3, 20, "three executors")
    app = bench.client()
    three = [bench.send(app, "note", 3.0) for _ in range(3)]
    wait_until(lambda: set(three) <= bench.ledger.ids("begin"), 20, "three run at once", pause=0.02)
    assert not bench.ledger.ids("done")
    assert "ok" in _celery(bench, "control", "pool_shrink", "1")
    wait_until(lambda: len(worker.executors()) == 2, 20, "two executors")
    old = {one.pid for one in worker.executors()}
    assert "ok" in _ours(bench, "control", "pool_restart")
    wait_until(
        lambda: len(now := {one.pid for one in worker.executors()}) == 2 and not now & old, 20, "they are others"
    )
    assert "not within" in _ours(bench, "control", "pool_shrink", "5", code=1)["error"]
    bench.wait_done({*three, bench.send(app, "note")})


def test_the_bounds_of_a_pool_that_follows_the_work_are_changed(bench: Bench) -> None:
    worker = bench.worker("default", "--autoscale", "1,1", "-n", NODE)
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    assert "autoscale" in _ours(bench, "control", "pool_grow", "1", code=1)["error"]
    assert "not 1 <=" in _ours(bench, "control", "autoscale", "2", "3", code=1)["error"]
    assert _ask(bench, "stats")["autoscaler"] == {"max": 1, "min": 1, "current": 1, "qty": 0}
    assert _celery(bench, "control", "autoscale", "3", "2") == {"ok": "autoscale now max=3 min=2"}
    wait_until(lambda: len(worker.executors()) == 2, 20, "it grows to its least")


def test_celery_revokes_and_limits_tasks_here(busy: tuple[Bench, list[str]]) -> None:
    bench, ids = busy
    (running,) = bench.ledger.ids("begin")
    waiting = [one for one in ids if one != running]
    assert "ok" in _celery(bench, "control", "revoke", waiting[0])
    assert "ok" in _celery(bench, "control", "rate_limit", TASK, "100/s")
    assert "error" in _ours(bench, "control", "rate_limit", TASK, "often", code=1)
    assert "ok" in _celery(bench, "control", "terminate", "KILL", running)
    letters = bench.vhost.dead_letters("default", 2)
    assert {one["properties"]["correlation_id"] for one in letters} == {waiting[0], running}
    assert {one["properties"]["headers"]["x-task-reason"] for one in letters} == {"revoked"}
    wait_until(lambda: waiting[1] in bench.ledger.ids("begin"), 20, "the next one runs")
    assert bench.ledger.ids("begin") == {running, waiting[1]}


def test_time_limits_change_while_the_worker_runs(bench: Bench) -> None:
    bench.worker("default", "-c", "1", "-n", NODE)
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    assert "ok" in _celery(bench, "control", "time_limit", "integration.apps.jobs.note", "20", "1")
    bench.send(bench.client(), "note", 60.0)
    (letter,) = bench.vhost.dead_letters("default", 1)
    assert letter["properties"]["headers"]["x-task-reason"] == "time_limit"
    assert _ours(bench, "control", "time_limit", "no.such.task", "1", code=1) == {"error": "unknown task"}


@pytest.mark.parametrize("ask", [_celery, _ours])
def test_shutdown_by_remote_control_is_warm(bench: Bench, ask: Callable[..., Any]) -> None:
    worker = bench.worker("default", "-c", "1", "-n", NODE)
    task = bench.send(bench.client(), "note", 2.0)
    wait_until(lambda: task in bench.ledger.ids("begin"), 20, "it runs")
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    if ask is _celery:  # its command line takes no answer to this for an error
        _run(bench, "celery", "-b", bench.vhost.url, "control", "shutdown", "-d", NODE, "--timeout", "5")
    else:
        ask(bench, "control", "shutdown")
    assert worker.wait() == 0
    assert task in bench.ledger.ids("done")


def test_shutdown_asked_for_twice_is_warm_still(bench: Bench) -> None:
    """A second signal ends a worker at once; a second request is the same one, by another operator."""
    worker = bench.worker("default", "-c", "1", "-n", NODE)
    task = bench.send(bench.client(), "note", 4.0)
    bench.wait_done({task}, event="begin")
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    for _ in range(3):
        assert _ask(bench, "shutdown") == {"ok": "shutting down"}
        time.sleep(0.4)  # the same signal is another request after a quarter of a second
    assert worker.wait() == 0
    assert task in bench.ledger.ids("done")


def test_status_and_errors_of_the_command_line(bench: Bench) -> None:
    nobody = _run(bench, "amqptasks", "-b", bench.vhost.url, "status", "--timeout", "0.3")
    assert (nobody.returncode, nobody.stdout.strip()) == (1, "0 nodes online.")
    bench.worker("default", "-c", "1", "-n", NODE)
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    somebody = _run(bench, "amqptasks", "-b", bench.vhost.url, "status", "--timeout", "2")
    assert (somebody.returncode, somebody.stdout.splitlines()[0]) == (0, f"{NODE}: OK")
    typo = _run(bench, "amqptasks", "-b", bench.vhost.url, "inspect", "actve")
    assert typo.returncode == 2
    assert "did you mean 'active'?" in typo.stderr
    undeclared = _ours(bench, "control", "add_consumer", "nosuch", code=1)
    assert "not declared" in undeclared["error"]


def test_a_stranger_with_wrong_fields_harms_nothing(bench: Bench) -> None:
    worker = bench.worker("default", "-c", "1", "-n", NODE)
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    desk = _ask(bench, "stats")["desk"]
    here = {"exchange": REPLY_EXCHANGE, "routing_key": "nobody"}
    hostile: list[Any] = [
        b"\xff\x00", b"[]", b"[" * 500_000, b'{"method": 1}', {"method": "ping", "arguments": [1]},
        {"method": "active", "arguments": {"safe": {"a": 1}, "other": 1}, "reply_to": here},
        {"method": "query_task", "arguments": {"ids": 7}, "reply_to": here},
        {"method": "time_limit", "arguments": {"task_name": ["x"], "hard": "soon"}, "reply_to": here},
        {"method": "time_limit", "arguments": {"task_name": TASK, "hard": "soon"}, "reply_to": here},
        {"method": "ping", "arguments": {}, "reply_to": {"exchange": "", "routing_key": "default"}},
        {"method": "ping", "arguments": {}, "reply_to": "default"},
        {"method": "ping", "pattern": "(", "matcher": "pcre", "reply_to": here},
        {"method": "ping", "pattern": "*" * 10_000, "matcher": "glob", "reply_to": here},
        {"method": "ping", "destination": {"a": 1}, "reply_to": here},
        {"method": "no_such", "arguments": {}, "reply_to": here},
        {"method": "add_consumer", "arguments": {"queue": {"x": 1}}, "reply_to": here},
    ]  # fmt: skip
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as connection:
        channel = connection.channel()
        for one in hostile:
            body = one if isinstance(one, bytes) else json.dumps(one).encode()
            channel.basic_publish(REQUEST_EXCHANGE, "", body)
        channel.basic_publish(REQUEST_EXCHANGE, "", b"{}", pika.BasicProperties(headers={"expires": "x", "clock": []}))
    assert _ask(bench, "ping") == {"ok": "pong"}
    assert _ask(bench, "stats")["desk"] == desk, "the desk was replaced"
    assert bench.vhost.ready("default") == 0, "an answer went where the stranger said"
    assert worker.process.poll() is None


def test_headers_of_any_kind_are_told_of(bench: Bench) -> None:
    """AMQP has timestamps, decimals, tables and binary values; a caller may put them where a text is expected."""
    worker = bench.worker("default", "-c", "1", "-n", NODE, "--prefetch", "10")
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    leaders = worker.leaders()
    strange: list[Any] = [datetime.now(UTC), Decimal("1.5"), {"a": [1]}, b"\xff", None, 7]
    with strange_channel(bench.vhost.url) as channel:
        for number, value in enumerate(strange):
            headers = {"task": TASK, "id": f"strange-{number}", "argsrepr": value, "kwargsrepr": value, "x": value}
            properties = pika.BasicProperties(headers=headers, content_type="application/json")
            channel.basic_publish("", "default", b"[[60.0], {}, {}]", properties)
    safe = {"safe": True}  # it shows what the headers say
    wait_until(lambda: len(_ask(bench, "reserved", safe)) == 5, 20, "all are held")
    told = [*_ask(bench, "active", safe), *_ask(bench, "reserved", safe)]
    assert {one["args"] for one in told} >= {"Decimal('1.5')", "{'a': [1]}", None, 7}
    found = _ask(bench, "query_task", {"ids": [f"strange-{number}" for number in range(6)]})
    assert len(found) == 6
    assert worker.leaders() == leaders


def test_a_pattern_that_takes_for_ever_is_refused(bench: Bench) -> None:
    node = f"{'shop' * 10}@test"
    worker = bench.worker("default", "-c", "1", "-n", node)
    settings = BrokerSettings.model_validate({"url": bench.vhost.url})
    wait_until(lambda: broadcast(settings, "ping", {}, timeout=1.0), 20, "it answers")
    desk = worker.helper("desk")
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as connection:
        for pattern in ("(.+)+#", "(.*)*" * 40 + "#", "(" * 200 + ")" * 50, "(.+)+(.+)+#"):
            request = {"method": "ping", "arguments": {}, "pattern": pattern, "matcher": "pcre"}
            connection.channel().basic_publish(REQUEST_EXCHANGE, "", json.dumps(request).encode())
    wait_until(lambda: worker.log.count("a request that is none was ignored") == 4, 20, lambda: worker.log)
    assert broadcast(settings, "ping", {}, destination=[node], timeout=5.0) == {node: {"ok": "pong"}}
    assert worker.helper("desk") == desk
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as connection:
        request = {"method": "shutdown", "arguments": {}, "pattern": "shop.*@t(e|a)st", "matcher": "pcre"}
        connection.channel().basic_publish(REQUEST_EXCHANGE, "", json.dumps(request).encode())
    assert worker.wait() == 0


@pytest.mark.fault
def test_a_desk_that_dies_is_replaced_and_tasks_go_on(bench: Bench) -> None:
    bench.worker("default", "-c", "1", "-n", NODE)
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    desk = _ask(bench, "stats")["desk"]
    task = bench.send(bench.client(), "note", 3.0)
    wait_until(lambda: task in bench.ledger.ids("begin"), 20, "it runs")
    os.kill(desk, signal.SIGKILL)

    def another() -> bool:
        found = broadcast(
            BrokerSettings.model_validate({"url": bench.vhost.url}), "stats", {}, destination=[NODE], timeout=1.0
        )
        return NODE in found and found[NODE]["desk"] != desk

    wait_until(another, 20, "another desk answers")
    bench.wait_done({task})
    assert len(bench.ledger.ids("begin")) == 1


def test_an_idle_worker_sends_nothing_and_has_one_queue_of_its_own(bench: Bench) -> None:
    bench.worker("default", "-c", "1", "-n", NODE)
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers")
    topology = {"default", "default.dlq"}
    own = {name for name in bench.vhost.management.queues() if name not in topology and name[:10] != "amqptasks."}
    assert own == {f"{NODE}.celery.pidbox"}


def test_sighup_brings_new_code_without_a_pause(bench: Bench, tmp_path: Path) -> None:
    module = tmp_path / "rolling.py"
    text = """
import os
from amqptasks import AmqpTasks
from amqptasks.testing.ledger import record
app = AmqpTasks("rolling")
@app.task(bind=True, name="rolling.version")
def version(self, seconds=0.0):
    import time
    record(self.request.id, "begin")
    time.sleep(seconds)
    record(self.request.id, "VERSION")
"""
    module.write_text(text.replace("VERSION", "old"))
    bench.APP = "rolling:app"
    worker = bench.worker("default", "-c", "2", "-n", NODE, path=tmp_path)
    app = bench.client()

    def send(seconds: float = 0.0) -> str:
        return app.send_task("rolling.version", (seconds,)).id

    running = send(3.0)
    wait_until(lambda: running in bench.ledger.ids("begin"), 20, "it runs")
    module.write_text("raise ImportError('half a deployment')\n")
    worker.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "going on with the old" in worker.log, 30, lambda: worker.log)
    bench.wait_done({send()}, event="old")

    module.write_text(text.replace("VERSION", "new"))
    pid, leaders = worker.process.pid, {one.pid for one in worker.leaders()}
    worker.process.send_signal(signal.SIGHUP)
    sent = set()
    deadline = time.monotonic() + 30
    while not bench.ledger.ids("new") and time.monotonic() < deadline:
        sent.add(send())
        time.sleep(0.05)
    wait_until(lambda: sent <= bench.ledger.ids("new") | bench.ledger.ids("old"), 20, "everything sent has run")
    bench.wait_done({running}, event="old")
    wait_until(lambda: not leaders & {one.pid for one in worker.leaders()}, 20, "the old leaders leave")
    assert worker.process.pid == pid
    assert worker.process.poll() is None
    wait_until(lambda: _ask(bench, "ping", timeout=2.0), 20, "it answers again")
    bench.wait_done({send()}, event="new")
    assert worker.stop() == 0


def test_purge_deletes_what_waits_and_asks_before(bench: Bench) -> None:
    bench.settings["queues"]["email"] = {}
    app = bench.client()
    app.declare()
    for queue in ("default", "default", "email"):
        bench.send(app, "note", queue=queue)
    command = (sys.executable, "-m", "amqptasks", "-b", bench.vhost.url, "purge", "-Q", "default,email")
    asked = subprocess.run(command, input="n\n", capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert asked.returncode == 130, asked.stderr
    assert (bench.vhost.ready("default"), bench.vhost.ready("email")) == (2, 1)
    done = subprocess.run([*command, "-f", "--json"], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == {"default": 2, "email": 1}
    gone = _run(bench, "amqptasks", "-b", bench.vhost.url, "purge", "-Q", "nosuch", "-f")
    assert (gone.returncode, "no queue 'nosuch'" in gone.stderr) == (2, True)


def test_idle_workers_say_nothing_however_many_there_are(bench: Bench) -> None:
    """Eight idle workers: no message is published, and each has one queue of its own."""
    bench.client().declare()
    before = set(bench.vhost.management.queues())
    names = [f"idle{number}@test" for number in range(8)]
    for name in names:
        bench.worker("default", "-c", "1", "-n", name, ready=False)
    settings = BrokerSettings.model_validate({"url": bench.vhost.url})
    wait_until(lambda: set(broadcast(settings, "ping", {}, timeout=2.0)) == set(names), 60, "all answer")

    def published() -> int:
        found = bench.vhost.management.request("GET", f"vhosts/{bench.vhost.name}")
        return int((found.get("message_stats") or {}).get("publish", 0))

    time.sleep(6.0)  # statistics are 5 s old at most
    since = published()
    time.sleep(10.0)
    assert published() == since
    assert set(bench.vhost.management.queues()) - before == {f"{name}.celery.pidbox" for name in names}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_idle_workers_cost_the_broker_little_and_each_the_same(bench: Bench) -> None:
    """Connections, queues, messages and bytes a second, of ten workers and of fifty."""
    bench.client().declare()
    management = bench.vhost.management
    before = set(management.queues())
    settings = BrokerSettings.model_validate({"url": bench.vhost.url})
    names: list[str] = []
    bytes_each = []
    for count in (10, 50):
        while len(names) < count:
            names.append(f"idle{len(names)}@test")
            bench.worker("default", "-c", "1", "-n", names[-1], ready=False)
            if len(names) % 5 == 0:  # not all at the same moment
                wait_until(lambda: len(broadcast(settings, "ping", {}, timeout=3.0)) == len(names), 120, "all answer")
        time.sleep(12.0)
        since, begun = _traffic(bench), time.monotonic()
        time.sleep(60.0)
        now, seconds = _traffic(bench), time.monotonic() - begun
        published, octets, connections = (b - a for a, b in zip(since, now, strict=True))
        bytes_each.append(octets / seconds / count)
        own = set(management.queues()) - before
        print(
            f"{count} idle workers: {now[2] / count:.1f} connections and {len(own) / count:.1f} queues each, "
            f"{published / seconds:.2f} messages/s in all, {bytes_each[-1]:.1f} bytes/s each"
        )
        assert connections == 0
        assert published == 0
        assert own == {f"{name}.celery.pidbox" for name in names}
        assert now[2] <= 3 * count
    # Heartbeats; not more of them when there are more workers.
    assert bytes_each[1] < 1.5 * bytes_each[0] + 1
    assert bytes_each[1] < 50


def _traffic(bench: Bench) -> tuple[int, int, int]:
    """Messages published in the virtual host, bytes over its connections, and how many connections there are."""
    management = bench.vhost.management
    found = management.request("GET", f"vhosts/{bench.vhost.name}")
    connections = [one for one in management.connections() if one["vhost"] == bench.vhost.name]
    octets = sum(one.get("recv_oct", 0) + one.get("send_oct", 0) for one in connections)
    return int((found.get("message_stats") or {}).get("publish", 0)), octets, len(connections)

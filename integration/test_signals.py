"""Signals and task hooks in a real worker: each in its process, and none able to do harm."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pika
import pytest

from amqptasks import AmqpTasks
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from integration.apps.hearing import FILE, heard
from integration.conftest import ROOT, Bench
from integration.strangers import strange_channel

NAME = "integration.apps.listening"


class Listening(Bench):
    """The bench with the tasks of `integration.apps.listening`."""

    APP = f"{NAME}:app"

    @property
    def file(self) -> Path:
        return self.folder / "heard"

    def start(self, *options: str) -> WorkerProcess:
        os.environ[FILE] = str(self.file)
        try:
            return self.worker("default", *options)
        finally:
            del os.environ[FILE]

    def of(self, task_id: str) -> list[str]:
        """The names of what was heard of a task."""
        return [entry["signal"] for entry in heard(self.file) if entry.get("id") == task_id]

    def wait_heard(self, *names: str, task_id: str | None = None, timeout: float = 20.0) -> dict[str, Any]:
        """Wait until all these were heard; the last of them."""

        def look() -> dict[str, dict[str, Any]] | None:
            found = {one["signal"]: one for one in heard(self.file) if task_id is None or one.get("id") == task_id}
            return found if set(names) <= set(found) else None

        return wait_until(look, timeout, lambda: f"{names} of {task_id} in {heard(self.file)}")[names[-1]]

    def act(self, app: AmqpTasks, *args: Any, **options: Any) -> str:
        return app.send_task(f"{NAME}.act", args, **options).id


@pytest.fixture
def listening(vhost: Any, tmp_path: Path) -> Any:
    made = Listening(vhost, tmp_path)
    made.settings["worker"] = {"poison_limit": 1}
    yield made
    made.close()


def publish_raw(bench: Bench, body: bytes, headers: dict[str, Any]) -> None:
    properties = pika.BasicProperties(headers=headers, content_type="application/json", delivery_mode=2)
    with strange_channel(bench.vhost.url) as channel:
        channel.basic_publish("amqptasks", "default", body, properties)


def test_every_signal_is_heard_in_its_process_though_every_handler_raises(listening: Listening) -> None:
    worker = listening.start("-c", "1")
    supervisor, executor = worker.process.pid, worker.executors()[0].pid
    app = listening.client()
    good, bad, again = listening.act(app), listening.act(app, "wrong"), listening.act(app, "retry")
    listening.wait_heard("task_postrun", task_id=good)
    listening.wait_heard("on_failure", "task_failure", "after_return", "task_postrun", task_id=bad)
    listening.wait_heard("task_retry", "task_failure", "task_postrun", task_id=again)
    assert listening.of(good) == [
        "task_received", "task_prerun", "before_start", "act",
        "on_success", "task_success", "after_return", "task_postrun",
    ]  # fmt: skip
    expired = listening.act(app, countdown=0.3, expires=0.1)
    assert listening.wait_heard("task_revoked", task_id=expired)["expired"] is True
    unknown = app.send_task("nobody.knows").id
    listening.wait_heard("task_unknown", task_id=unknown)
    publish_raw(listening, b"{", {"task": f"{NAME}.act", "id": "undecodable"})
    publish_raw(listening, b"[[], {}, {}]", {"task": f"{NAME}.act", "id": ["a", "list"]})
    wait_until(lambda: [one["signal"] for one in heard(listening.file)].count("task_rejected") == 2, 10, "rejected")
    broken = {"errbacks": [{"task": 7}], "callbacks": None, "chain": None, "chord": None}
    publish_raw(listening, json.dumps([["no"], {}, broken]).encode(), {"task": f"{NAME}.act", "id": "internal"})
    listening.wait_heard("task_internal_error", task_id="internal")
    listening.wait_heard("heartbeat_sent")
    assert worker.stop() == 0
    told = heard(listening.file)
    assert [one for one in told if one.get("missing")] == []
    names = [one["signal"] for one in told]
    in_supervisor = {one["signal"] for one in told if one["pid"] == supervisor}
    in_executor = {one["signal"] for one in told if one["pid"] == executor}
    assert in_supervisor == {
        "celeryd_init", "after_setup_logger", "after_setup_task_logger", "import_modules", "celeryd_after_setup",
        "worker_init", "worker_ready", "heartbeat_sent", "worker_shutting_down", "worker_shutdown",
    }  # fmt: skip
    assert {one["pid"] for one in told} == {supervisor, executor}, "no leader runs user code"
    assert {"worker_process_init", "worker_process_shutdown", "task_unknown", "task_rejected"} <= in_executor
    assert names.index("worker_init") < names.index("worker_process_init") < names.index("task_received")
    for one in ("worker_shutting_down", "worker_process_shutdown"):
        assert names.index(one) < names.index("worker_shutdown")
    assert [one["how"] for one in told if one["signal"] == "worker_shutting_down"] == ["Warm"]
    assert "the handler of worker_init is broken" in worker.log
    assert "the handler of task_prerun is broken" in worker.log
    assert "Executor died" not in worker.log
    assert {one["properties"]["headers"]["x-task-reason"] for one in listening.vhost.dead_letters("default", 7)} == {
        "failed", "retries_exhausted", "expired", "unknown_task", "undecodable",
    }  # fmt: skip


def test_a_lost_executor_and_a_hard_time_limit_are_told_by_another_executor(listening: Listening) -> None:
    worker = listening.start("-c", "1")
    app = listening.client()
    died, late = listening.act(app, "die"), listening.act(app, "sleep", time_limit=1.0)
    told = listening.wait_heard("on_failure", "task_failure", task_id=died)
    assert "WorkerLost" in told["error"]
    told = listening.wait_heard("on_failure", "task_failure", task_id=late)
    assert "TimeLimitExceeded" in told["error"]
    pids = [one["pid"] for one in heard(listening.file) if one.get("id") == late and one["signal"] != "task_received"]
    assert pids[0] != pids[-1], "the first was killed"
    assert not set(pids) & {one.pid for one in worker.leaders()}
    reasons = [one["properties"]["headers"]["x-task-reason"] for one in listening.vhost.dead_letters("default", 2)]
    assert sorted(reasons) == ["poison", "time_limit"]


def test_a_hook_that_kills_its_process_is_counted_against_its_task(listening: Listening) -> None:
    listening.settings["worker"] = {"poison_limit": 2}
    listening.start("-c", "1")
    app = listening.client()
    task_id = app.send_task(f"{NAME}.act", kwargs={"hook": "dies"}).id
    other = listening.act(app)
    (letter,) = listening.vhost.dead_letters("default", 1)
    assert letter["properties"]["headers"]["x-task-reason"] == "poison"
    assert listening.of(task_id).count("act") == 2
    listening.wait_heard("task_postrun", task_id=other)


def test_a_revoked_task_is_told_whether_it_ran_or_not(listening: Listening) -> None:
    listening.start("-c", "1", "--prefetch", "1")
    app = listening.client()
    runs, waits = listening.act(app, "sleep"), listening.act(app)
    listening.wait_heard("act", task_id=runs)
    app.control.revoke(waits)
    app.control.revoke(runs, terminate=True, signal="SIGKILL")
    told = listening.wait_heard("task_revoked", task_id=runs)
    assert (told["terminated"], told["signum"], told["expired"]) == (True, signal.SIGKILL, False)
    told = listening.wait_heard("task_revoked", task_id=waits)
    assert (told["terminated"], told["signum"], told["expired"]) == (False, None, False)
    assert "on_failure" not in listening.of(runs)


@pytest.mark.parametrize("pool", ["asyncio", "thread"])
def test_hooks_and_signals_work_where_many_tasks_share_a_process(listening: Listening, pool: str) -> None:
    listening.start("-P", pool, "-c", "4")
    app = listening.client()
    waits, acts = app.send_task(f"{NAME}.wait").id, listening.act(app, "wrong")
    for task_id, ended in ((waits, "on_success"), (acts, "on_failure")):
        listening.wait_heard("task_postrun", task_id=task_id)
        names = [one for one in listening.of(task_id) if one != "act"]
        assert names[:4] == ["task_received", "task_prerun", "before_start", ended]
        assert names[-2:] == ["after_return", "task_postrun"]


async def test_publishing_is_told_where_it_happens_and_only_when_confirmed(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amqptasks import PublishError, signals

    before, after = [], []

    def starts(sender: Any, headers: Any, **named: Any) -> None:
        before.append(headers["id"])
        headers["x-colour"] = "blue"
        raise RuntimeError("broken")

    def done(sender: Any, headers: Any, body: Any, **named: Any) -> None:
        after.append((headers["id"], sender, list(body[0])))
        raise RuntimeError("broken")

    signals.before_task_publish.connect(starts)
    signals.after_task_publish.connect(done)
    try:
        app = listening.client()
        first = app.send_task(f"{NAME}.act").id
        second = (await app.asend_task(f"{NAME}.act")).id
        many = [one.id for one in app.send_many([app.signature(f"{NAME}.act") for _ in range(3)])]
        assert before == [first, second, *many]
        assert after == [(one, f"{NAME}.act", []) for one in before]
        with pytest.raises(PublishError):
            app.send_task(f"{NAME}.act", exchange="amqptasks", routing_key="nowhere")
        assert len(before) == 6
        assert len(after) == 5, "what was returned was not published"
    finally:
        assert signals.before_task_publish.disconnect(starts)
        assert signals.after_task_publish.disconnect(done)
        await app.aclose()
    listening.start("-c", "1")
    for task_id in (first, second, *many):
        assert listening.wait_heard("act", task_id=task_id)["colour"] == "blue"


def test_what_follows_a_task_is_announced_in_the_executor(listening: Listening) -> None:
    listening.start("-c", "1")
    app = listening.client()
    follow = app.signature(f"{NAME}.act", immutable=True)
    app.send_task(f"{NAME}.act", link=follow)
    wait_until(lambda: len([1 for one in heard(listening.file) if one["signal"] == "act"]) == 2, 10, "both ran")
    first, second = [one for one in heard(listening.file) if one["signal"] == "act"]
    assert (first["colour"], second["colour"]) == (None, "red"), "no handler here; one in the executor"
    assert next(one for one in heard(listening.file) if one["signal"] == "before_task_publish")["pid"] == first["pid"]


def test_handlers_of_setup_logging_get_every_line(listening: Listening) -> None:
    (listening.folder / "ownlog.py").write_text(
        "import logging\n"
        "from amqptasks import AmqpTasks, signals\n"
        "app = AmqpTasks('ownlog')\n"
        "@app.task(name='own.hello')\n"
        "def hello():\n"
        "    logging.getLogger('own').warning('hello from the task')\n"
        "@signals.setup_logging.connect\n"
        "def configure(loglevel, **kwargs):\n"
        f"    logging.basicConfig(filename={str(listening.folder / 'own.txt')!r}, level=loglevel,\n"
        "                        format='%(name)s|%(levelname)s|%(message)s')\n"
    )
    environment = {"PYTHONPATH": f"{listening.folder}:{ROOT}"}
    log = listening.folder / "own.log"
    with WorkerProcess("ownlog:app", "default", config=listening.config, log=log, environment=environment) as worker:
        text = listening.folder / "own.txt"
        wait_until(lambda: text.exists() and "ready." in text.read_text(), 20, "it is ready")
        listening.client().send_task("own.hello")
        wait_until(lambda: "succeeded in" in text.read_text(), 10, "it ran")
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
    lines = text.read_text().splitlines()
    assert "own|WARNING|hello from the task" in lines
    assert any(line.startswith("amqptasks.task|INFO|Task own.hello[") for line in lines)

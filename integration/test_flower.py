"""A real Flower against our worker: what its pages and its HTTP API show, and the commands that it sends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from amqptasks.testing.rabbitmq import free_port
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench

NODE = "shop@test"
JOBS = "integration.apps.jobs"


@pytest.fixture
def flower(bench: Bench) -> Iterator[httpx.Client]:
    """Flower's HTTP API. It changes limits of tasks only that its own Celery app knows by name."""
    names = "".join(f"@app.task(name='{JOBS}.{one}')\ndef {one}(): pass\n" for one in ("note", "paced"))
    # Celery's broadcasts are for one second only; a busy machine takes longer now and then.
    patient = "app.control.broadcast = functools.partial(app.control.broadcast, timeout=20)\n"
    head = "import functools\nimport celery\napp = celery.Celery('names')\n"
    (bench.folder / "names.py").write_text(head + patient + names)
    port = free_port()
    log = bench.folder / "flower.log"
    command = [sys.executable, "-m", "celery", "-A", "names", "-b", bench.vhost.url, "flower"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--address=127.0.0.1", f"--port={port}"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=bench.folder,
            env={**os.environ, "FLOWER_UNAUTHENTICATED_API": "true"}, start_new_session=True,
        )  # fmt: skip

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return client.get("/healthcheck").text == "OK"
        except httpx.TransportError:
            return False

    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        try:
            wait_until(answers, 30, lambda: f"Flower starts:\n{log.read_text()}", pause=0.1)
            yield client
        finally:
            process.kill()
            process.wait(10)


def _get(flower: httpx.Client, path: str, **parameters: Any) -> Any:
    answer = flower.get(path, params=parameters)
    answer.raise_for_status()
    return answer.json()


def test_flower_shows_workers_and_tasks_and_its_commands_arrive(bench: Bench, flower: httpx.Client) -> None:
    bench.settings["queues"]["email"] = {}
    bench.settings["events"] = {"send_sent": True}
    worker = bench.worker("default", "-c", "2", "-n", NODE)
    app = bench.client()
    # Flower turns events on, every five seconds.
    wait_until(lambda: _get(flower, "/api/workers", status=1).get(NODE), 20, "Flower sees the worker online")
    added = bench.send(app, "add", 2, 3)
    failed = bench.send(app, "fails")
    slow = bench.send(app, "note", 60.0)

    def states() -> dict[str, str]:
        return {one: found["state"] for one, found in _get(flower, "/api/tasks").items()}

    wanted = {added: "SUCCESS", failed: "FAILURE", slow: "STARTED"}
    wait_until(lambda: states() == wanted, 20, lambda: str(states()), pause=0.2)
    tasks = _get(flower, "/api/tasks")
    assert {key: tasks[added][key] for key in ("name", "args", "kwargs", "result", "worker")} == {
        "name": f"{JOBS}.add", "args": "(2, 3)", "kwargs": "{}", "result": "5", "worker": NODE,
    }  # fmt: skip
    assert 0 < tasks[added]["runtime"] < 5
    assert tasks[added]["sent"] <= tasks[added]["received"] <= tasks[added]["started"] <= tasks[added]["succeeded"]
    assert tasks[failed]["exception"] == "ValueError('broken: ü')"
    info = _get(flower, f"/api/task/info/{failed}")
    assert "in fails" in info["traceback"]

    def refreshed(*keys: str, **which: str) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            found: dict[str, Any] = _get(flower, "/api/workers", refresh=1, **which).get(NODE, {})
            # What does not come within a second is left out, and asked for again the next time.
            return found if found.keys() >= set(keys) else {}

        return wait_until(look, 30, f"Flower has asked for {keys}")

    found = refreshed("stats", "active_queues", "registered")
    assert found["stats"]["total"][f"{JOBS}.add"] == 1
    assert found["stats"]["pool"]["max-concurrency"] == 2
    assert [queue["name"] for queue in found["active_queues"]] == ["default"]
    assert f"{JOBS}.add" in found["registered"]
    (active,) = refreshed("active", workername=NODE)["active"]
    assert active["id"] == slow
    for page in ("/workers", f"/worker/{NODE}", "/tasks", f"/task/{added}", f"/task/{failed}"):
        shown = flower.get(page)
        assert (shown.status_code, NODE in shown.text or page == "/tasks") == (200, True), page
    counted = flower.get("/metrics").text
    assert f'flower_events_total{{task="{JOBS}.add",type="task-succeeded",worker="{NODE}"}} 1.0' in counted

    added_queue = flower.post(f"/api/worker/queue/add-consumer/{NODE}", params={"queue": "email"})
    assert added_queue.status_code == 200, added_queue.text
    wait_until(lambda: len(worker.leaders()) == 2, 20, "a leader for email")
    cancelled = flower.post(f"/api/worker/queue/cancel-consumer/{NODE}", params={"queue": "email"})
    assert cancelled.status_code == 200, cancelled.text
    wait_until(lambda: len(worker.leaders()) == 1, 20, "email's leader leaves")
    assert flower.post(f"/api/worker/shutdown/{NODE}").status_code == 200
    wait_until(lambda: "Stopping: running tasks finish" in worker.log, 20, "the worker stops")


def test_flowers_buttons_act(bench: Bench, flower: httpx.Client) -> None:
    worker = bench.worker("default", "-c", "1", "-n", NODE)
    app = bench.client()
    wait_until(lambda: _get(flower, "/api/workers", status=1).get(NODE), 20, "Flower sees the worker online")
    wait_until(lambda: NODE in _get(flower, "/api/workers", refresh=1), 20, "Flower has asked the worker")
    here = {"workername": NODE}

    def press(path: str, **fields: Any) -> str:
        answer = flower.post(f"/api/{path}", data=fields)
        assert answer.status_code == 200, (path, answer.text)
        return str(answer.json()["message"])

    wait_until(lambda: len(worker.executors()) == 1, 20, "one executor")
    assert "1" in press(f"worker/pool/grow/{NODE}", n=1)
    wait_until(lambda: len(worker.executors()) == 2, 20, "two executors")
    press(f"worker/pool/shrink/{NODE}", n=1)
    wait_until(lambda: len(worker.executors()) == 1, 20, "one executor")
    old = {one.pid for one in worker.executors()}
    press(f"worker/pool/restart/{NODE}")
    wait_until(lambda: (now := {one.pid for one in worker.executors()}) and not now & old, 20, "another one")
    refused = flower.post(f"/api/worker/pool/autoscale/{NODE}", data={"min": 2, "max": 3})
    assert "autoscale is not on; start the worker with --autoscale" in refused.text

    running = bench.send(app, "note", 60.0)
    bench.wait_done({running}, event="begin")
    waiting = bench.send(app, "note", countdown=8.0)
    press(f"task/revoke/{waiting}")
    press(f"task/revoke/{running}", terminate="true")
    reasons = {
        one["properties"]["correlation_id"]: one["properties"]["headers"]["x-task-reason"]
        for one in bench.vhost.dead_letters("default", 2)
    }
    assert reasons == {running: "revoked", waiting: "revoked"}

    press(f"task/timeout/{JOBS}.note", **here, hard=1.5, soft=1)
    press(f"task/rate-limit/{JOBS}.paced", **here, ratelimit="1/s")
    over = bench.send(app, "note", 30.0)
    paced = {bench.send(app, "paced") for _ in range(5)}
    bench.wait_done(paced)
    starts = sorted(entry.at for entry in bench.ledger.entries("begin") if entry.task_id in paced)
    assert starts[-1] - starts[0] > 1.0
    letters = [one["properties"] for one in bench.vhost.dead_letters("default", 3)]
    assert {one["correlation_id"]: one["headers"]["x-task-reason"] for one in letters}[over] == "time_limit"

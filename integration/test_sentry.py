"""Task exceptions reach Sentry: a real sink receives the real SDK's events."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from amqptasks.testing.rabbitmq import free_port
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench


@pytest.fixture
def sink() -> Iterator[str]:
    """A local Sentry sink; its address."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("kent-server")), "run", "--host", "127.0.0.1", "--port", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: process.poll() is None and _answers(address), 20, "the sink answers")
            yield address
        finally:
            process.terminate()
            process.wait(10)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


def _answers(address: str) -> bool:
    try:
        return bool(_get(f"{address}/api/eventlist/"))
    except OSError:
        return False


def test_a_task_that_fails_for_good_is_reported_and_one_that_will_be_retried_is_not(bench: Bench, sink: str) -> None:
    bench.settings["sentry"] = {"dsn": sink.replace("http://", "http://public@") + "/0", "environment": "tests"}
    app = bench.client()
    bench.send(app, "recovers", 1)
    failing = bench.send(app, "fails")
    # Where Brotli is installed, the SDK sends what this sink cannot read.
    hidden = bench.folder / "without-brotli"
    hidden.mkdir()
    (hidden / "brotli.py").write_text("raise ImportError\n")
    bench.worker(path=hidden)
    bench.vhost.dead_letters("default", 1)

    def events() -> list[str]:
        listed = json.loads(_get(f"{sink}/api/eventlist/"))["events"]
        return [one["event_id"] if isinstance(one, dict) else one for one in listed]

    wait_until(events, 30, "an event arrived", pause=0.2)
    bodies = [_get(f"{sink}/api/event/{one}") for one in events()]
    reported = [json.loads(body)["payload"]["body"] for body in bodies]
    exceptions = [one for one in reported if "exception" in one]
    assert len(exceptions) == 1
    event = exceptions[0]
    assert event["exception"]["values"][-1]["type"] == "ValueError"
    assert event["tags"]["task_id"] == failing
    assert event["tags"]["queue"] == "default"
    assert event["environment"] == "tests"

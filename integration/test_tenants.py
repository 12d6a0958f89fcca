"""Several applications on one broker, hostile senders, and secrets that nobody sees."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from amqptasks import chord
from amqptasks.message import Envelope
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench, VirtualHost

SECRET = "hunter-2-hunter"
JOBS = "integration.apps.jobs"


class Trap:
    """Loads by running a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_goes_to_the_dead_letter_queue_and_does_nothing(bench: Bench, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    trap = pickle.dumps(([Trap(marker)], {}, {}))
    app = bench.client()
    app.declare()
    # With confirms: what comes while a new quorum queue elects its leader is lost with the channel that sent it.
    app.client.publish(
        [
            Envelope(
                "amqptasks", queue, trap, content_type=content_type, headers={"task": f"{JOBS}.note", "id": "trap"}
            )
            for content_type in ("application/x-python-serialize", "application/json", None, "application/x-yaml")
            for queue in ("default", "amqptasks.joins")
        ]
    )
    bench.worker()
    letters = bench.vhost.dead_letters("default", 4)
    assert {one["properties"]["headers"]["x-task-reason"] for one in letters} == {"undecodable"}
    assert "not on the accept list (application/json)" in str(letters)
    bench.vhost.wait_settled("amqptasks.joins")
    bench.wait_done({bench.send(app, "note")})
    assert not marker.exists()
    pickle.loads(trap)
    wait_until(marker.exists, 5, "the trap works where it is loaded")


def test_two_applications_share_a_virtual_host_without_meeting(vhost: VirtualHost, tmp_path: Path) -> None:
    """Each has its prefix and its queues; tasks, dead letters, delays, chords and results stay apart."""
    benches: dict[str, Bench] = {}
    try:
        for name in ("shop", "bank"):
            folder = tmp_path / name
            folder.mkdir()
            bench = benches[name] = Bench(vhost, folder)
            bench.settings |= {
                "topology": {"prefix": name, "default_queue": f"{name}-work"},
                "queues": {f"{name}-work": {}},
            }
            bench.worker(f"{name}-work", "-c", "1", "-n", f"{name}@here")
        ids: dict[str, set[str]] = {}
        for name, bench in benches.items():
            app = bench.client()
            ids[name] = {
                bench.send(app, "note"),
                bench.send(app, "note", countdown=0.4),
                bench.send(app, "recovers", 1),
            }
            assert app.send_task(f"{JOBS}.add", (1, 2)).get(timeout=10) == 3
            header = [app.signature(f"{JOBS}.add", (n, n)) for n in range(3)]
            body = app.signature(f"{JOBS}.noop").clone()
            body.immutable = True
            assert app.apply_signature(chord(header, body)).get(timeout=20) is None
            bench.send(app, "fails", ignore_result=True)
        for name, bench in benches.items():
            bench.wait_done(ids[name])
            assert bench.ledger.ids() == ids[name]
            bench.vhost.dead_letters(f"{name}-work", 1)
        names = set(vhost.management.queues())
        assert {"shop.joins", "bank.joins", "shop.unroutable", "bank.unroutable"} <= names
        assert not [one for one in names if "amqptasks" in one], "each desk has its node's name"
    finally:
        for bench in benches.values():
            bench.close()


def test_no_output_of_any_command_shows_a_secret(bench: Bench) -> None:
    """With the right password and a wrong one: logs at debug level, errors with tracebacks, what is shown."""
    management = bench.vhost.management
    management.create_user("keeper", SECRET)
    management.permit("keeper", ".*", ".*", ".*")
    try:
        parts = urlsplit(bench.vhost.url)
        good = f"amqp://keeper:{SECRET}@{parts.hostname}:{parts.port}{parts.path}"
        bad = good.replace("keeper:", "nobody:")
        key = f"{SECRET}-{SECRET}-{SECRET}"
        everything = ""
        for url in (good, bad):
            bench.settings |= {
                "broker": {"url": url, "management_url": f"http://keeper:{SECRET}@127.0.0.1:1", "publish_timeout": 2},
                "security": {"signing_key": key, "verification_keys": [key + "2"]},
                "sentry": {"dsn": f"http://{SECRET}@127.0.0.1:1/1"},
            }
            config = bench.config
            assert SECRET in config.read_text()
            for command in (
                ["config", "show"],
                ["config", "check"],
                ["topology", "show"],
                ["topology", "apply"],
                ["topology", "permissions"],
                ["routes", "test", f"{JOBS}.note"],
                ["call", f"{JOBS}.note"],
                ["-v", "call", f"{JOBS}.note", "--queue", "nowhere"],
                ["-b", url.replace(":5", ":x5", 1), "call", f"{JOBS}.note"],
                ["worker", "--help"],
                ["--help"],
            ):
                line = [sys.executable, "-m", "amqptasks", "-A", f"{JOBS}:app", "--config", str(config), *command]
                environ = {**os.environ, "PYTHONPATH": str(ROOT), "AMQPTASKS_BROKER__URL": url}
                done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=60, check=False)
                assert SECRET not in done.stdout + done.stderr, command
                everything += done.stdout + done.stderr
            if url == good:
                worker = bench.worker("default", "-l", "debug")
                app = bench.client()
                bench.wait_done({bench.send(app, "note")})
                bench.send(app, "fails", "value")
                bench.vhost.dead_letters("default", 1)
                for process in (worker.process.pid, *[one.pid for one in worker.leaders()]):
                    assert SECRET not in Path(f"/proc/{process}/cmdline").read_text()
                worker.stop()
                assert SECRET not in worker.log
                assert len(worker.log) > 500
        assert "***" in everything
        assert "refused the user name or password" in everything
    finally:
        management.delete_user("keeper")

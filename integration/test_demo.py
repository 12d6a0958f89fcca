"""The demo on a real broker: its real input, and every number of what came of it counted again by other means."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pika
import psutil
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "examples.demo"]

pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True)
class Run:
    numbers: dict[str, Any]
    folder: Path
    messages: str


def environment(url: str) -> dict[str, str]:
    return {**os.environ, "AMQPTASKS_DEMO_BROKER_URL": url}


def demo(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment(url), capture_output=True, text=True, timeout=150, check=False
    )


def queue_size(url: str, queue: str) -> int | None:
    """Messages that are ready; None when there is no such queue."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        return connection.channel().queue_declare(queue, passive=True).method.message_count
    except pika.exceptions.ChannelClosedByBroker as closed:
        if closed.reply_code != 404:
            raise
        return None
    finally:
        if connection.is_open:
            connection.close()


def recount(log: Path) -> dict[str, Any]:
    """The log's numbers, by splitting at quotes instead of by the pattern that the shop uses."""
    statuses: Counter[str] = Counter()
    lines = malformed = size = 0
    for raw in log.read_bytes().split(b"\n")[:-1]:
        lines += 1
        # An escaped quote is not a quote.
        parts = raw.replace(rb"\"", b"'").split(b'"')
        try:
            head, request, numbers, _referer, between, _agent, rest = parts
            assert (between, rest) == (b" ", b"")
            datetime.strptime(head.decode().partition("[")[2], "%d/%b/%Y:%H:%M:%S %z] ")
            _method, _target, protocol = request.decode().split(" ")
            assert protocol.startswith("HTTP/")
            status, sent = numbers.split()
            hits, sent_bytes = str(int(status)), 0 if sent == b"-" else int(sent)
        except (ValueError, AssertionError):
            malformed += 1
            continue
        statuses[hits] += 1
        size += sent_bytes
    return {"lines": lines, "malformed": malformed, "bytes": size, "by_status": dict(statuses)}


@pytest.fixture
def run(vhost: Any, tmp_path: Path) -> Run:
    folder = tmp_path / "run"
    done = demo(vhost.url, "--json", "--dir", str(folder))
    log = folder / "worker.log"
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log.read_text() if log.exists() else ''}"
    return Run(json.loads(done.stdout), folder, done.stderr)


def test_the_demo_does_the_work_that_it_was_given(run: Run, vhost: Any) -> None:
    assert run.numbers["ok"] is True
    assert [check["name"] for check in run.numbers["checks"] if not check["ok"]] == []
    log_is_counted_right(run)
    pictures_have_the_right_sizes(run)
    payments_and_mails_add_up(run)
    dead_letters_say_why(run)
    work_is_spread_over_processes(run)
    broker_is_left_as_it_was_found(vhost)


def log_is_counted_right(run: Run) -> None:
    truth = recount(run.folder / "access.log")

    assert truth["lines"] == 10_000
    assert truth["malformed"] > 100
    assert {key: run.numbers["log"][key] for key in truth} == truth
    with closing(sqlite3.connect(run.folder / "shop" / "shop.sqlite3")) as db:
        rows = db.execute("SELECT status, sum(hits) FROM batch_status GROUP BY status").fetchall()
    assert {str(status): hits for status, hits in rows} == truth["by_status"]


def pictures_have_the_right_sizes(run: Run) -> None:
    folder = run.folder / "shop" / "images"
    names = {path.name for path in folder.iterdir()}
    originals = {name for name in names if re.fullmatch(r"product-\d\d\.jpg", name)}

    assert len(originals) == 24
    assert len(names) == 24 * 4
    with Image.open(folder.parent / "sheet.jpg") as sheet:
        assert sheet.size == (6 * 160, 4 * 160)
        # Every cell holds a picture: its middle is not the paper's white.
        colours = {sheet.getpixel((x * 160 + 80, y * 160 + 80)) for x in range(6) for y in range(4)}
    assert (255, 255, 255) not in colours
    for name in originals:
        with Image.open(folder / name) as picture:
            width, height = picture.size
        for form, side in (("large", 1024), ("card", 320), ("icon", 96)):
            with Image.open(folder / name.replace(".jpg", f"-{form}.jpg")) as picture:
                picture.load()
                assert max(picture.size) == min(side, max(width, height))
                # The same shape, to within half a pixel of the shorter side.
                scale = max(picture.size) / max(width, height)
                assert abs(min(picture.size) - min(width, height) * scale) <= 0.5


def payments_and_mails_add_up(run: Run) -> None:
    with closing(sqlite3.connect(run.folder / "shop" / "shop.sqlite3")) as db:
        orders, cents = db.execute("SELECT count(*), sum(cents) FROM charge").fetchone()

    assert orders == 300
    assert Decimal(run.numbers["revenue"]) == Decimal(cents) / 100
    assert run.numbers["mails"] == {"delivered": 282, "repeated": 0}
    assert "greater than 0" in run.numbers["refused_at_call"]


def dead_letters_say_why(run: Run) -> None:
    letters = run.numbers["dead_letters"]
    headers = [letter["headers"] for letter in letters]

    assert Counter((letter["queue"], letter["task"]) for letter in letters) == {
        ("email.dlq", "email.receipt"): 18,
        ("high_priority.dlq", "payment.charge"): 1,
        ("high_priority.dlq", "payment.refund"): 1,
    }
    assert Counter((one["x-task-reason"], one["x-task-attempts"]) for one in headers) == {
        ("failed", 1): 12,
        ("retries_exhausted", 3): 6,
        ("invalid_arguments", 1): 1,
        ("unknown_task", 1): 1,
    }
    full = next(one for one in headers if one["x-task-reason"] == "retries_exhausted")
    assert full["x-task-exception"] == "examples.shop.mail.MailboxUnavailable"
    assert "452 4.2.2 mailbox full" in full["x-task-exception-message"]
    assert "refusal(error)" in full["x-task-traceback"]
    assert full["x-task-worker"]
    assert datetime.fromisoformat(full["x-task-failed-at"]).tzinfo is not None


def work_is_spread_over_processes(run: Run) -> None:
    ran = {one["task"]: one for one in run.numbers["ran"] if one["succeeded"]}

    assert {task: (one["queue"], one["succeeded"]) for task, one in ran.items()} == {
        "payment.charge": ("high_priority", 300),
        "weblog.aggregate": ("high_priority", 40),
        "email.receipt": ("email", 282),
        "image.make": ("media", 24),
        "image.resize": ("media", 72),
        "image.sheet": ("media", 1),
        "weblog.parse": ("media", 40),
    }
    # 18 servers that were busy at first, and two retries for each of 6 full mailboxes.
    assert (ran["email.receipt"]["retried"], ran["email.receipt"]["failed"]) == (18 + 12, 18)
    assert len(ran["email.receipt"]["by_process"]) == 2


def broker_is_left_as_it_was_found(vhost: Any) -> None:
    assert queue_size(vhost.url, "email.dlq") is None
    assert queue_size(vhost.url, "high_priority") is None


def test_a_broker_whose_queues_are_in_use_is_left_alone(vhost: Any) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(vhost.url))
    channel = connection.channel()
    channel.confirm_delivery()
    channel.queue_declare("email", durable=True)
    channel.basic_publish("", "email", b"somebody's")
    connection.close()

    done = demo(vhost.url, "--json")

    assert done.returncode == 1
    assert "queue 'email' is in use" in done.stderr
    assert done.stdout == ""
    assert queue_size(vhost.url, "email") == 1
    assert queue_size(vhost.url, "media") is None


def test_ctrl_c_ends_everything_that_the_demo_started(vhost: Any) -> None:
    running = subprocess.Popen(
        [*COMMAND, "--keep"], cwd=ROOT, env=environment(vhost.url), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        # Supervisor, three leaders and five executors.
        while len(started) < 9:
            assert running.poll() is None, running.communicate()[0].decode()
            assert time.monotonic() < deadline, f"only {started} were started"
            time.sleep(0.1)
            started = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        output = running.communicate(timeout=60)[0].decode()
    finally:
        running.kill()

    assert "Stop" in output
    _, alive = psutil.wait_procs(started, timeout=1)
    assert alive == []
    assert queue_size(vhost.url, "email") is None

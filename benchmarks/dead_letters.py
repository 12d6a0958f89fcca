#!/usr/bin/env python3
"""How long `amqptasks dlq` takes with many letters, and how much memory, on a private node; prints a table.

    python -m benchmarks.dead_letters [--count 1000000]

A dead-letter queue (quorum, as declared) is filled; every second letter has another exception. Then the commands run,
each in a process of its own. Before each, the order of the letters is compared with that in which they died.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from amqptasks import AmqpTasks
from amqptasks.broker.reader import QueueReader
from amqptasks.message import Envelope
from amqptasks.testing.rabbitmq import PrivateNode

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 5000
FRAME = 'Traceback (most recent call last):\n  File "/srv/shop.py", line 7, in charge\n    card.pay()\nValueError: no'


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    megabytes: float
    said: str


def letters(start: int, count: int) -> Iterator[Envelope]:
    for number in range(start, start + count):
        headers = {
            "task": "shop.charge", "id": f"{number}", "retries": 3, "x-task-reason": "failed",
            "x-task-exception": ("CardRefused", "ConnectionError")[number % 2], "x-task-exception-message": "no",
            "x-task-failed-at": "2026-07-01T09:00:00+00:00", "x-task-attempts": 4, "x-task-traceback": FRAME,
        }  # fmt: skip
        yield Envelope("amqptasks.dlx", "default", b"[[1, 2], {}, {}]", headers=headers, correlation_id=f"{number}")


def fill(app: AmqpTasks, count: int) -> float:
    """Seconds to publish so many."""
    began = time.monotonic()
    for start in range(0, count, CHUNK):
        chunk = list(letters(start, min(CHUNK, count - start)))
        assert app.client.publish_many(chunk) == [None] * len(chunk)
    return time.monotonic() - began


def in_order(app: AmqpTasks) -> tuple[int, bool]:
    """How many letters there are, and whether they stand as they died."""
    last, count, right = -1, 0, True
    with QueueReader(app.settings.broker, "default.dlq") as reader:
        for _, incoming in reader.messages():
            number = int(incoming.properties.correlation_id)
            right = right and number > last
            last, count = number, count + 1
    return count, right


def run(config: Path, *arguments: str) -> Cost:
    """Run a command; its time and the most memory that it had."""
    command = [sys.executable, "-m", "amqptasks", "--config", str(config), "dlq", *arguments]
    began = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    return Cost(time.monotonic() - began, usage.ru_maxrss / 1000, said.strip().splitlines()[0][:60])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    count = parser.parse_args().count
    commands = (
        ("list", "--json"),
        ("replay", "--exception", "Card*", "--dry-run"),
        ("purge", "--exception", "Card*", "-f"),
        ("replay", "--all"),
    )
    with PrivateNode("letters", tune=False) as node, tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "amqptasks.yaml"
        config.write_text(yaml.safe_dump({"broker": {"url": node.url}, "queues": {"default": {}}}))
        app = AmqpTasks("letters", config=config)
        app.declare()
        print(f"{count} letters published in {fill(app, count):.0f} s", flush=True)
        print(f"{'command':<42}{'seconds':>9}{'letters/s':>11}{'MB at most':>12}  said", flush=True)
        for command in commands:
            there, right = in_order(app)
            cost = run(config, *command)
            row = f"{' '.join(command):<42}{cost.seconds:>9.1f}{there / cost.seconds:>11.0f}{cost.megabytes:>12.0f}"
            print(f"{row}  {cost.said}", flush=True)
            assert right, f"before {command} the letters do not stand as they died"
        print("the order before each command was that in which they died", flush=True)
        app.close()


if __name__ == "__main__":
    main()

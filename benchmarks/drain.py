#!/usr/bin/env python3
"""Drains no-op tasks with amqptasks and with Celery's prefork pool, in turn on one private node; prints the ratio.

Both acknowledge after the task, on quorum queues, with persistent messages, at their default log levels. Each run's
queue is filled first; the rate is taken between a first and a last task that write down when they ran.

    python -m benchmarks.drain [--tasks 10000] [--rounds 3] [-c 2] [--events]

With ``--events`` it compares amqptasks with itself instead: events off, and on (``-E``) with a queue that takes them.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pika
import yaml

from amqptasks import AmqpTasks
from amqptasks.broker.publisher import Publisher
from amqptasks.config import load_settings
from amqptasks.protocol.serializers import serializer
from amqptasks.protocol.task import TaskHeaders, task_envelope
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
JSON = serializer("json")


def fill(publisher: Publisher, exchange: str, queue: str, tasks: int) -> None:
    names = ["bench.mark", *["bench.noop"] * tasks, "bench.mark"]
    envelopes = [
        task_envelope(
            TaskHeaders(task=name, id=str(uuid.uuid4()), ignore_result=True),
            (),
            {},
            serializer=JSON,
            exchange=exchange,
            routing_key=queue,
        )
        for name in names
    ]
    errors = [error for error in publisher.publish_many(envelopes) if error is not None]
    assert not errors, errors[0]


def drain(command: list[str], environment: dict[str, str], marks: Path, tasks: int) -> float:
    """Tasks per second between the first task and the last."""
    marks.unlink(missing_ok=True)
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=quiet, stderr=quiet) as worker:

        def finished() -> bool:
            assert worker.poll() is None, f"{command} ended with {worker.returncode}"
            return marks.exists() and len(marks.read_text().split()) == 2

        try:
            wait_until(finished, 120, "the last task ran", pause=0.1)
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(30)
    first, last = sorted(float(line) for line in marks.read_text().split())
    return tasks / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-c", "--concurrency", type=int, default=2)
    parser.add_argument("--events", action="store_true", help="what events cost, instead of Celery")
    options = parser.parse_args()
    with PrivateNode("bench", tune=False) as node, tempfile.TemporaryDirectory() as folder:
        marks, config = Path(folder) / "marks", Path(folder) / "amqptasks.yaml"
        config.write_text(yaml.safe_dump({"broker": {"url": node.url}, "queues": {"default": {}}}))
        settings = load_settings(config)
        AmqpTasks("declare", config=config).declare()
        connection = pika.BlockingConnection(pika.URLParameters(node.url))
        channel = connection.channel()
        # As Celery declares it, so that the queue can be filled before its worker starts.
        channel.exchange_declare("celery-bench", "direct", durable=True)
        channel.queue_declare("celery-bench", durable=True, arguments={"x-queue-type": "quorum"})
        channel.queue_bind("celery-bench", "celery-bench", "celery-bench")
        # Celery's exchange for events, and somebody who listens.
        channel.exchange_declare("celeryev", "topic", durable=True)
        channel.queue_declare("monitor", durable=True, arguments={"x-max-length": 1000, "x-message-ttl": 5000})
        channel.queue_bind("monitor", "celeryev", "#")
        connection.close()
        environment = {**os.environ, "BENCH_MARKS": str(marks), "BENCH_BROKER": node.url, "PYTHONPATH": str(ROOT)}
        many = str(options.concurrency)
        ours = [sys.executable, "-m", "amqptasks", "-A", "benchmarks.apps:amqp_app", "--config", str(config)]
        theirs = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "benchmarks.apps:celery_app",
            "worker",
            "-P",
            "prefork",
            "-c",
            many,
        ]
        systems = {
            "amqptasks": ("amqptasks", "default", [*ours, "worker", "-Q", "default", "-c", many]),
            "celery prefork": (
                "celery-bench",
                "celery-bench",
                [
                    *theirs,
                    "-c",
                    many,
                    "-Q",
                    "celery-bench",
                    "--without-gossip",
                    "--without-mingle",
                    "--without-heartbeat",
                ],
            ),
        }
        if options.events:
            exchange, queue, command = systems["amqptasks"]
            systems = {"events off": systems["amqptasks"], "events on": (exchange, queue, [*command, "-E"])}
        publisher = Publisher(settings.broker)
        rates: dict[str, list[float]] = {name: [] for name in systems}
        for number in range(options.rounds):
            for name, (exchange, queue, command) in systems.items():
                fill(publisher, exchange, queue, options.tasks)
                rates[name].append(drain(command, environment, marks, options.tasks))
                print(f"round {number + 1}  {name:<16}{rates[name][-1]:>10,.0f} tasks/s", flush=True)
        publisher.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\nmedian of {options.rounds}, {options.tasks} no-op tasks, -c {options.concurrency}, quorum queues")
    for name, value in medians.items():
        print(f"  {name:<16}{value:>10,.0f} tasks/s")
    first, second = medians.values()
    print(f"  ratio {first / second:.2f}")


if __name__ == "__main__":
    main()

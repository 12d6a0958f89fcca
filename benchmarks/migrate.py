#!/usr/bin/env python3
"""Replaces a queue of 50 000 messages while tasks are published and a worker runs them; prints a table.

The migration is killed at each of its steps, and run again until it has ended. Exits with 1 when a task whose call had
returned did not run, or when fewer tasks a second were published than wanted.

    python -m benchmarks.migrate [--count 50000] [--rate 500] [--rabbitmq 4.3] [--case "classic to quorum"]

Without ``--rabbitmq`` it is the installed version; another one is started as `scripts/test --rabbitmq` does it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from amqptasks import AmqpTasks
from amqptasks.errors import PublishError
from amqptasks.testing.ledger import PATH_VARIABLE, Judgement, Ledger
from amqptasks.testing.management import Management
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess

ROOT = Path(__file__).resolve().parents[1]
TASK = "integration.apps.jobs.noted"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COUNT, RATE = 50_000, 500
#: Offered beyond the wanted rate, which is measured from the first call to the last.
MORE = 1.02
#: The steps, and moments within them, at which the migration is killed.
MOMENTS = (
    "park", "divert", "divert+0.003", "drain", "drain+0.3", "settle", "settle+0.5", "switch", "switch+0.004", "return",
    "return+0.003", "refill", "refill+0.3", "finish",
)  # fmt: skip
#: Those in which messages are on their way, and no key leads to two queues: then it is known how many may run twice.
MOVING = ("drain+0.3", "refill+0.3")


@dataclass(frozen=True)
class Case:
    """What the settings say of the queue before and after, and when the migration is killed."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    moments: Sequence[str] = MOMENTS


CASES = {
    "classic to quorum": Case({"type": "classic"}, {}),
    "`max_priority` 5 to 10": Case({"max_priority": 5}, {"max_priority": 10}),
    "quorum to `max_priority: 10`": Case({}, {"max_priority": 10}, MOVING),
}


@dataclass(frozen=True)
class Migrated:
    """What became of the tasks. `rate`: calls that returned, a second, from the first kill to the end.

    `told`: calls that raised.
    """

    tasks: int
    killed: int
    seconds: float
    rate: float
    told: Sequence[PublishError]
    verdict: Judgement
    queue: Mapping[str, Any]


def killed(config: Path, moment: str, *options: str) -> None:
    """Run the migration of `default` until this moment, at which it is killed."""
    command = [sys.executable, "-m", "integration.apps.migrator", str(config), "default", moment, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=ROOT, check=False, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL, (moment, done.stdout + done.stderr)


def fill(app: AmqpTasks, count: int, pause: float = 0.0) -> dict[str, float]:
    """Put so many tasks into the queue, which take so many seconds; id -> when it may run."""
    sent: dict[str, float] = {}
    while len(sent) < count:
        calls = [app.signature(TASK, (pause,)) for _ in range(min(1000, count - len(sent)))]
        sent |= dict.fromkeys([one.id for one in app.send_many(calls)], 0.0)
    return sent


@contextmanager
def publishing(
    app: AmqpTasks, sent: dict[str, float], rate: float = RATE, **options: Any
) -> Iterator[list[PublishError]]:
    """So many tasks a second, each confirmed, a tenth of them delayed; what callers were told of others."""
    stop, told = threading.Event(), list[PublishError]()

    def publish(share: float) -> None:
        due = time.monotonic()
        for number in itertools.count():
            due += 1 / share
            if stop.wait(max(0.0, due - time.monotonic())):
                return
            try:
                wait = 0.5 if number % 10 == 0 and not options else None
                sent[app.send_task(TASK, (0.0,), countdown=wait, **options).id] = 0.0
            except PublishError as error:
                told.append(error)

    threads = [threading.Thread(target=publish, args=(rate / 4,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield told
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def run(
    case: Case, broker: Mapping[str, str], folder: Path, *, vhost: str = "/", count: int = COUNT, rate: float = RATE
) -> Migrated:
    """Migrate the queue `default` of a broker: `url` and `management_url`, as in the settings."""
    config, ledger = folder / "migrate.yaml", Ledger(folder / "migrate.ledger")

    def configure(queue: Mapping[str, Any]) -> None:
        data = {"broker": dict(broker), "queues": {"default": dict(queue)}, "result": {"backend": "none"}}
        config.write_text(yaml.safe_dump(data))

    configure(case.before)
    with closing(AmqpTasks("migrate", config=config)) as app:
        app.declare()
        sent = fill(app, count)
        environment = {PATH_VARIABLE: str(ledger.path), "PYTHONPATH": str(ROOT)}
        options = {"config": config, "log": folder / "migrate.log", "environment": environment}
        with WorkerProcess("integration.apps.jobs:app", "default", "-c", "2", **options) as worker:
            worker.wait_ready()
            configure(case.after)
            began, before = time.monotonic(), len(sent)
            with publishing(app, sent, rate) as told:
                for moment in case.moments:
                    killed(config, moment)
                command = ["amqptasks", "--config", str(config), "topology", "migrate", "default", "--yes"]
                subprocess.run(
                    [sys.executable, "-m", *command], check=True, timeout=110, cwd=ROOT, env=ENVIRONMENT,
                    capture_output=True,
                )  # fmt: skip
                published, seconds = len(sent) - before, time.monotonic() - began
            wait_until(lambda: set(sent) <= ledger.ids(), 120, "all tasks have run", pause=1.0)
            management = Management(broker["management_url"], vhost)
            wait_until(lambda: management.counts("default") == (0, 0), 20, "nothing is left", pause=0.2)
            return Migrated(
                len(sent), len(case.moments), seconds, published / seconds, told, ledger.judge(sent),
                management.queue("default"),
            )  # fmt: skip


def _spaced(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--rabbitmq", metavar="VERSION", help="such as 4.3")
    parser.add_argument("--case", choices=list(CASES), action="append")
    options = parser.parse_args()
    missed = []
    print("| | killed | tasks | published a second | lost | run again | longest pause |", flush=True)
    print(f"{'|---' * 7}|", flush=True)
    for name in options.case or CASES:
        node = PrivateNode("migrate", tune=False, version=options.rabbitmq)
        with node, tempfile.TemporaryDirectory() as folder:
            version = str(Management(node.management_url).request("GET", "overview")["rabbitmq_version"])
            where = {"url": node.url, "management_url": node.management_url}
            found = run(CASES[name], where, Path(folder), count=options.count, rate=options.rate * MORE)
        verdict = found.verdict
        cells = (
            f"{name}, {version.partition('-')[0]}",
            f"{found.killed} times",
            _spaced(found.tasks),
            _spaced(found.rate),
            _spaced(len(verdict.lost)),
            _spaced(verdict.again),
            f"{verdict.pause:.1f} s",
        )
        print(f"| {' | '.join(cells)} |", flush=True)
        if verdict.lost or found.told or found.rate < options.rate:
            missed.append(name)
    if missed:
        sys.exit(f"lost, refused or too slow: {', '.join(missed)}")


if __name__ == "__main__":
    main()

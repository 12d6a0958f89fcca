"""Work under faults: publishers and workers go on while faults are injected, and the ledger judges.

    python -m integration.ordeal [--seconds 12]     # each fault alone; prints the table of docs/guarantees.md

Three kinds of tasks: most run once, some fail and are retried, some are delayed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from amqptasks import AmqpTasks
from amqptasks.broker.admin import queue_counts
from amqptasks.errors import PublishError
from amqptasks.testing.chaos import FAULTS, Scene
from amqptasks.testing.ledger import PATH_VARIABLE, Judgement, Ledger
from amqptasks.testing.management import Management
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess

ROOT = Path(__file__).resolve().parents[1]
PUBLISHERS = 4
#: Youngest queue that a killed node keeps: docs/guarantees.md.
SETTLED_SECONDS = 1.5


@dataclass(frozen=True)
class Result:
    """What came of one run. `told` are calls that raised."""

    sent: int
    told: int
    injected: int
    judgement: Judgement


class Ordeal:
    """A broker, a proxy, two workers (one behind the proxy) and a client behind the proxy."""

    def __init__(self, folder: Path, node: PrivateNode, proxy: TcpProxy) -> None:
        self.folder, self.node, self.proxy = folder, node, proxy
        self.through = f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
        self.ledger = Ledger(folder / "ledger")
        self.config = folder / "amqptasks.yaml"
        broker = {"url": node.url, "heartbeat": 10, "publish_timeout": 30}
        self.config.write_text(yaml.safe_dump({"broker": broker, "queues": {"default": {}}}))
        self.app = AmqpTasks("client", config=self.config, broker=self.through)
        self.app.declare()
        self._numbers = itertools.count()
        time.sleep(SETTLED_SECONDS)
        self.scene = Scene(node, proxy, [self.worker(), self.worker()], self.worker)

    def worker(self) -> WorkerProcess:
        number = next(self._numbers)
        return WorkerProcess(
            "integration.apps.jobs:app",
            "default",
            "-c",
            "2",
            config=self.config,
            log=self.folder / f"worker-{number}.log",
            environment={PATH_VARIABLE: str(self.ledger.path), "PYTHONPATH": str(ROOT)},
            global_options=["-b", self.through] if number % 2 else [],
        ).wait_ready(60)

    def run(self, faults: Sequence[str], dice: random.Random, *, tasks: int = 0, seconds: float = 0.0) -> Result:
        """Publish for so long, or so many, while faults come one after the other; wait for the end; judge."""
        sent: dict[str, float] = {}
        told = itertools.count()
        stop = threading.Event()

        def publish() -> None:
            while not stop.is_set():
                with contextlib.suppress(PublishError):
                    self._send(sent, random.random())
                    continue
                next(told)

        injected = 0
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(PUBLISHERS) as pool:
            publishers = [pool.submit(publish) for _ in range(PUBLISHERS)]
            try:
                while len(sent) < tasks or time.monotonic() < until:
                    time.sleep(dice.uniform(0.3, 1.5))
                    FAULTS[dice.choice(faults)](self.scene, dice)
                    injected += 1
            finally:
                stop.set()
        for one in publishers:
            one.result()
        self._wait_done(set(sent))
        letters = Management(self.node.management_url).messages("default.dlq", 1000)
        dead = {letter["properties"]["correlation_id"] for letter in letters}
        return Result(len(sent), next(told), injected, self.ledger.judge(sent, dead))

    def _send(self, sent: dict[str, float], kind: float) -> None:
        name, args, wait = "note", [0.002], 0.0
        if kind < 0.05:
            name, args = "recovers", [1]
        elif kind < 0.1:
            wait = 1.0
        called = time.time()
        result = self.app.send_task(f"integration.apps.jobs.{name}", args, countdown=wait or None, ignore_result=True)
        sent[result.id] = called + wait

    def _wait_done(self, ids: set[str]) -> None:
        """Until all are in the ledger, or nothing is left that could run."""
        idle_since = None
        deadline = time.monotonic() + 120
        while not ids <= self.ledger.ids() and time.monotonic() < deadline:
            names = [queue.name for queue in self.app.topology.queues if not queue.name.endswith(".dlq")]
            management = Management(self.node.management_url)
            waiting = sum(sum(management.counts(name)) for name in names)
            idle_since = None if waiting else idle_since or time.monotonic()
            if idle_since is not None and time.monotonic() - idle_since > 15:
                return
            time.sleep(0.5)

    def end(self) -> list[int]:
        """Stop the workers; their exit codes."""
        self.app.close()
        return [worker.stop() for worker in self.scene.workers]


@contextlib.contextmanager
def ordeal(folder: Path) -> Iterator[Ordeal]:
    """All of it, on a node of its own."""
    with PrivateNode("ordeal") as node, TcpProxy("127.0.0.1", node.port) as proxy:
        made = Ordeal(folder, node, proxy)
        try:
            yield made
        finally:
            for worker in made.scene.workers:
                worker.kill()
            made.app.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    dice = random.Random(options.seed)
    print(f"seed {options.seed}\n")
    print("| fault | times | tasks | callers told | lost | early | run again | longest pause |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, ordeal(Path(folder)) as made:
        for fault in FAULTS:
            found = made.run([fault], dice, seconds=options.seconds)
            verdict = found.judgement
            print(
                f"| {fault} | {found.injected} | {found.sent} | {found.told} | {len(verdict.lost)} | "
                f"{len(verdict.early)} | {verdict.again} | {verdict.pause:.1f} s |",
                flush=True,
            )
        assert queue_counts(made.app.settings.broker, ["default"])["default"] is not None
        wait_until(lambda: all(code == 0 for code in made.end()), 60, "the workers end")


if __name__ == "__main__":
    main()

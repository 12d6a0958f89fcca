"""Work under faults: publishers and workers go on while faults are injected, and the ledger judges.

    python -m integration.ordeal [--seconds 10] [--write docs/guarantees.md]

Each fault alone, and then those of a single node at random: prints the table of docs/guarantees.md, or writes it
between its markers there. A seed gives the same tasks and the same faults again, not the same moments.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from amqptasks import AmqpTasks
from amqptasks.testing.chaos import CLUSTER_FAULTS, DELETIONS, DISK_FAULTS, FAULTS, Fault, Scene
from amqptasks.testing.cluster import PrivateCluster
from amqptasks.testing.disks import SmallDisk
from amqptasks.testing.ledger import PATH_VARIABLE, Judgement, Ledger
from amqptasks.testing.management import Management, ManagementError
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from integration.publishing import TOLD
from integration.seeds import run_seed

ROOT = Path(__file__).resolve().parents[1]
PUBLISHERS = 2
MARKERS = "<!-- ordeal -->\n", "<!-- /ordeal -->\n"
#: Youngest queue that a killed node keeps: docs/guarantees.md.
SETTLED_SECONDS = 1.5
#: After so long a level of the delay ladder sends again what was not confirmed; by itself after three minutes
#: (docs/topology.md).
RESENT_SECONDS = 15
PATIENCE = {"dead_letter_worker_publisher_confirm_timeout": RESENT_SECONDS * 1000}
#: Where messages stand whose task does not run.
DEAD, UNROUTABLE = "default.dlq", "amqptasks.unroutable"

RUNS = "A task whose `delay()` returned runs at least once"
RECOVERED = "A lost connection is recovered without a restart"
TOLD_APART = "What keeps a caller from the broker is told apart"
#: In the words of docs/guarantees.md: the promise that a fault puts to the test.
PROMISES = {
    **dict.fromkeys(FAULTS, RUNS),
    "worker terminated": "SIGTERM finishes what runs, gives the rest back",
    "publisher killed": "what it returned for is there though the process ends at once",
    "publisher frozen": "what it returned for is there though the process ends at once",
    "connections cut": RECOVERED,
    "connections stalled": RECOVERED,
    "connections delayed": RECOVERED,
    "connections closed by the broker": RECOVERED,
    "permissions revoked": TOLD_APART,
    "memory alarm": TOLD_APART,
    "disk alarm": TOLD_APART,
    **dict.fromkeys(DELETIONS, "What stands in a queue that somebody deletes"),
    **dict.fromkeys(DISK_FAULTS, "A full disk takes nothing that was confirmed"),
    **dict.fromkeys(CLUSTER_FAULTS, "All of this in a cluster"),
}


@dataclass(frozen=True)
class Result:
    """What came of one run. `told` are calls that raised, `rest` the seconds from the last call to the last end."""

    sent: int
    told: int
    injected: int
    rest: float
    judgement: Judgement


class Ordeal:
    """A broker, a proxy, two workers (one behind the proxy) and two publishers behind the proxy, if it is one node."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        proxy: TcpProxy,
        node: PrivateNode,
        *,
        disk: SmallDisk | None = None,
        cluster: PrivateCluster | None = None,
    ) -> None:
        self.folder, self.seed = folder, seed
        self._dice = random.Random(seed)
        self._through = None if cluster is not None else f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
        self.ledger = Ledger(folder / "ledger")
        self.config = folder / "amqptasks.yaml"
        url = node.url if cluster is None else cluster.urls
        broker = {"url": url, "heartbeat": 10, "publish_timeout": 30}
        self.config.write_text(yaml.safe_dump({"broker": broker, "queues": {"default": {}}}))
        self.app = AmqpTasks("client", config=self.config)
        self.app.declare()
        self.management = Management(node.management_url)
        self._workers, self._publishers = itertools.count(), itertools.count()
        size = 1 if cluster is None else len(cluster.nodes)
        wait_until(lambda: len(self.management.queue("default").get("online", [])) == size, 60, "a member on each node")
        time.sleep(SETTLED_SECONDS)
        workers = [self.worker(), self.worker()]
        self.scene = Scene(
            node, proxy, workers, self.worker, start_publisher=self.publisher, disk=disk, cluster=cluster
        )

    @property
    def _environment(self) -> dict[str, str]:
        return {PATH_VARIABLE: str(self.ledger.path), "PYTHONPATH": str(ROOT)}

    def worker(self) -> WorkerProcess:
        number = next(self._workers)
        return WorkerProcess(
            "integration.apps.jobs:app",
            "default",
            "-c",
            "2",
            config=self.config,
            log=self.folder / f"worker-{number}.log",
            environment=self._environment,
            global_options=["-b", self._through] if self._through and number % 2 else [],
        ).wait_ready(60)

    def publisher(self) -> subprocess.Popen[bytes]:
        number = next(self._publishers)
        command = [sys.executable, "-m", "integration.publishing", str(self.config), f"{self.seed}-{number}"]
        with (self.folder / f"publisher-{number}.log").open("wb") as log:
            return subprocess.Popen(
                [*command, *([self._through] if self._through else [])],
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, faults: Mapping[str, Fault], *, tasks: int = 0, seconds: float = 0.0) -> Result:
        """Publish for so long, or so many, while faults come one after the other; wait for the end; judge."""
        self.ledger.clear()
        self.scene.deletions.clear()
        self.scene.publishers = [self.publisher() for _ in range(PUBLISHERS)]
        wait_until(self.ledger.confirmed, 60, "the publishers publish")
        injected = 0
        until = time.monotonic() + seconds
        while time.monotonic() < until or len(self.ledger.confirmed()) < tasks:
            time.sleep(self._dice.uniform(0.3, 1.5))
            name = self._dice.choice(list(faults))
            faults[name](self.scene, self._dice)
            injected += 1
        for one in self.scene.publishers:
            one.terminate()
        codes = {one.wait(90) for one in self.scene.publishers}
        # One that has just started in the place of another knows no signals yet.
        assert codes <= {0, -signal.SIGTERM}, f"publishers ended with {codes}: {self.folder}"
        sent, stopped = self.ledger.confirmed(), time.time()
        held = self._drained(set(sent))
        if held:  # for the report of a test that fails
            print(f"left in the broker: {self._standing()}; the logs: {self.folder}")
        done = self.ledger.entries("done")
        dead, kept = self._aside(DEAD), self._aside(UNROUTABLE)
        deleted = max((one.deleted for one in self.scene.deletions), default=0.0)
        verdict = self.ledger.judge(sent, dead, kept=kept, held=held, deleted=deleted, until=stopped)
        rest = max(0.0, max(entry.at for entry in done) - stopped)
        return Result(len(sent), len(self.ledger.entries(TOLD)), injected, rest, verdict)

    def _standing(self) -> dict[str, tuple[int, int, int]]:
        """Queue -> messages that are ready, unacknowledged, and there in all; what was set aside is not among them."""
        names = {queue.name for queue in self.app.topology.queues} - {DEAD, UNROUTABLE}
        # What expired and is on its way to the next queue is neither ready nor unacknowledged, but one of all.
        known = {name: queue for name, queue in self.management.queues().items() if queue["type"] != "stream"}
        found = {name: (*self.management.counts(name), known[name].get("messages", 0)) for name in names & known.keys()}
        return {name: counts for name, counts in found.items() if any(counts)}

    def _held(self) -> int:
        """How many messages the broker has."""
        try:
            return sum(max(ready + unacked, messages) for ready, unacked, messages in self._standing().values())
        except ManagementError:  # the queue that was deleted
            return 1

    def _aside(self, queue: str) -> list[str]:
        found = self.management.messages(queue, 1000, remove=True)
        return [message["properties"].get("correlation_id", "") for message in found]

    def _drained(self, ids: set[str]) -> int:
        """Wait until all are in the ledger and the broker has none, or nothing happens any more; what it has left."""
        deadline = time.monotonic() + 150
        known, since = (-1, -1), time.monotonic()
        while time.monotonic() < deadline:
            held, done = self._held(), len(self.ledger.entries("done"))
            if held == 0 and ids <= self.ledger.ids():
                return 0
            if (held, done) != known:
                known, since = (held, done), time.monotonic()
            elif time.monotonic() - since > (2 * RESENT_SECONDS if held else 5):
                return held
            time.sleep(0.5)
        return self._held()

    def end(self) -> list[int]:
        """Stop the workers; their exit codes."""
        self.app.close()
        return [worker.stop() for worker in self.scene.workers]

    def kill(self) -> None:
        """End everything that it started, at once."""
        for worker in self.scene.workers:
            worker.kill()
        for one in self.scene.publishers:
            one.kill()
            one.wait(10)
        self.app.close()


@contextlib.contextmanager
def _ended(made: Ordeal) -> Iterator[Ordeal]:
    try:
        yield made
    finally:
        made.kill()


@contextlib.contextmanager
def ordeal(folder: Path, seed: int) -> Iterator[Ordeal]:
    """All of it, on a node of its own."""
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(PrivateNode("ordeal", application=PATIENCE))
        proxy = stack.enter_context(TcpProxy("127.0.0.1", node.port))
        yield stack.enter_context(_ended(Ordeal(folder, seed, proxy, node)))


@contextlib.contextmanager
def ordeal_on_a_small_disk(folder: Path, seed: int) -> Iterator[Ordeal]:
    """The same where the node's disk can be filled, and the alarm does not come before. Needs root."""
    node = PrivateNode("ordeal", config={"disk_free_limit.absolute": "1KB"}, application=PATIENCE)
    with SmallDisk(node.folder / "data", 300) as disk, contextlib.ExitStack() as stack:
        stack.callback(node.remove)
        node.start()
        proxy = stack.enter_context(TcpProxy("127.0.0.1", node.port))
        yield stack.enter_context(_ended(Ordeal(folder, seed, proxy, node, disk=disk)))


@contextlib.contextmanager
def ordeal_in_a_cluster(folder: Path, seed: int) -> Iterator[Ordeal]:
    """The same on three nodes, which publishers and workers reach directly."""
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(PrivateCluster(application=PATIENCE))
        node = cluster.nodes[0]
        proxy = stack.enter_context(TcpProxy("127.0.0.1", node.port))
        yield stack.enter_context(_ended(Ordeal(folder, seed, proxy, node, cluster=cluster)))


HEADER = """\
| promise | fault | times | tasks | callers told | lost | early | dead-lettered | left in the broker | run again \
| longest pause | then all done in |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def row(promise: str, fault: str, found: Result) -> str:
    """A line of the table."""
    verdict = found.judgement
    lost = f"{len(verdict.lost)}" + (f", {len(verdict.gone)} with the queue" if verdict.gone else "")
    lost += f", {len(verdict.kept)} unroutable" if verdict.kept else ""
    cells = (
        *(promise, fault, found.injected, found.sent, found.told, lost, len(verdict.early), len(verdict.dead)),
        *(verdict.held, verdict.again, f"{verdict.pause:.1f} s", f"{found.rest:.1f} s"),
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def rows(seed: int, seconds: float, tasks: int) -> Iterator[str]:
    """All lines of the table."""
    stages = {ordeal: {**FAULTS, **DELETIONS}, ordeal_on_a_small_disk: DISK_FAULTS, ordeal_in_a_cluster: CLUSTER_FAULTS}
    for stage, faults in stages.items():
        with tempfile.TemporaryDirectory() as folder, stage(Path(folder), seed) as made:
            for name, fault in faults.items():
                yield row(PROMISES[name], name, made.run({name: fault}, seconds=seconds))
            if stage is ordeal:
                mixed = f"the first {len(FAULTS)} of these at random"
                yield row(RUNS, mixed, made.run(FAULTS, tasks=tasks))
            assert made.end() == [0, 0], "the workers end in good order"


def write(file: Path, table: str) -> None:
    """Put the table between the markers of a file."""
    before, begin, rest = file.read_text().partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end:
        raise SystemExit(f"{file} has no lines {' and '.join(map(str.strip, MARKERS))}")
    file.write_text(f"{before}{begin}{table}{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each fault alone")
    parser.add_argument("--tasks", type=int, default=20_000, help="at least so many with all faults at random")
    parser.add_argument("--seed", type=int, default=run_seed())
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of this file")
    options = parser.parse_args()
    table = HEADER
    print(f"seed {options.seed}\n\n{HEADER}", end="", flush=True)
    for line in rows(options.seed, options.seconds, options.tasks):
        print(line, end="", flush=True)
        table += line
    if options.write is not None:
        command = f"`AMQPTASKS_TEST_SEED={options.seed} python -m integration.ordeal --seconds {options.seconds:g}`"
        write(options.write, f"{command}:\n\n{table}")


if __name__ == "__main__":
    main()

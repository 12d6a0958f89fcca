"""A cluster of three nodes for a module of tests, a bench on it, and work that goes on while something breaks."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from amqptasks.errors import PublishError
from amqptasks.testing.cluster import PrivateCluster
from amqptasks.testing.management import Management
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench, Broker, VirtualHost


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    with PrivateCluster() as running:
        yield running


def _create_vhost(management: Management, name: str) -> None:
    """A cluster that has just come together may take longer than one request waits; making it again is making it."""

    def made() -> bool:
        try:
            management.create_vhost(name)
        except TimeoutError:
            return False
        return True

    wait_until(made, 90, "the cluster has a virtual host")


@pytest.fixture
def bench(cluster: PrivateCluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A bench on all nodes, with a virtual host that is of this test alone."""
    cluster.wait_complete()
    name = request.node.name[:40]
    first = cluster.nodes[0]
    management = Management(first.management_url, name)
    _create_vhost(management, name)
    vhost = VirtualHost(name, f"{first.url}{name}", management, Broker("cluster", first.url, first.management_url))
    made = Bench(vhost, tmp_path)
    made.settings["broker"] = {"url": [f"{url}{name}" for url in cluster.urls], "publish_timeout": 60}
    yield made
    made.close()
    for node in cluster.nodes:
        if not node.runs:
            node.start()
    cluster.wait_complete()


def members(bench: Bench, cluster: PrivateCluster, queue: str) -> None:
    """Wait until each node holds a member of the queue that is up."""

    def look() -> bool:
        found = bench.vhost.management.request("GET", f"queues/{bench.vhost.name}/{queue}")
        return len(found.get("online", [])) == len(cluster.nodes)

    wait_until(look, 60, f"{queue} has a member on each node", pause=0.3)


class Load:
    """Four threads publish and two workers run, until `end`, which judges."""

    def __init__(self, bench: Bench, cluster: PrivateCluster) -> None:
        self._bench = bench
        self._app = bench.client()
        self._app.declare()
        members(bench, cluster, "default")
        self._workers = [bench.worker("default", "-c", "2") for _ in range(2)]
        self._sent: set[str] = set()
        self._told = itertools.count()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(4)
        self._senders = [self._pool.submit(self._send) for _ in range(4)]

    def _send(self) -> None:
        while not self._stop.wait(0.01):
            try:
                self._sent.add(self._bench.send(self._app, "note", 0.005))
            except PublishError:
                next(self._told)

    def wait_running(self, tasks: int = 100) -> float:
        """Wait until so many more tasks have run; the seconds that took."""
        since, before = time.monotonic(), len(self._bench.ledger.ids())
        wait_until(lambda: len(self._bench.ledger.ids()) > before + tasks, 60, "tasks run again")
        return time.monotonic() - since

    def stop_sending(self) -> None:
        self._stop.set()
        self._pool.shutdown()

    def end(self) -> None:
        """All that was confirmed has run, and the workers lived through it."""
        self.stop_sending()
        for one in self._senders:
            one.result()
        self._bench.wait_done(self._sent, timeout=90)
        runs = Counter(entry.task_id for entry in self._bench.ledger.entries("done"))
        again = sum(count - 1 for count in runs.values())
        print(f"sent {len(self._sent)}, told {next(self._told)}, run again {again}")
        assert len(self._sent) > 100
        assert [worker.process.poll() for worker in self._workers] == [None, None]
        codes = [worker.stop(60) for worker in self._workers]
        assert codes == [0, 0], [worker.log[-2000:] for worker in self._workers]


@pytest.fixture
def load(bench: Bench, cluster: PrivateCluster) -> Iterator[Load]:
    made = Load(bench, cluster)
    yield made
    made.stop_sending()

"""A cluster of three nodes: queues have members on each, and one after the other is killed."""

from __future__ import annotations

import contextlib
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


@pytest.fixture
def bench(cluster: PrivateCluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A bench on all nodes, with a virtual host that is of this test alone."""
    cluster.wait_complete()
    name = request.node.name[:40]
    first = cluster.nodes[0]
    management = Management(first.management_url, name)
    management.create_vhost(name)
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


@pytest.mark.timeout(300)
def test_leaders_that_are_killed_one_after_the_other_lose_nothing(bench: Bench, cluster: PrivateCluster) -> None:
    app = bench.client()
    app.declare()
    members(bench, cluster, "default")
    workers = [bench.worker("default", "-c", "2") for _ in range(2)]
    sent: set[str] = set()
    told = itertools.count()
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.01):
            try:
                sent.add(bench.send(app, "note", 0.005))
            except PublishError:
                next(told)

    slowest = 0.0
    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send) for _ in range(4)]
        try:
            for _ in range(3):
                victim = cluster.leader("default", bench.vhost.name)
                victim.kill()
                killed_at, before = time.monotonic(), len(bench.ledger.ids())
                wait_until(lambda before=before: len(bench.ledger.ids()) > before + 100, 60, "tasks run again")
                slowest = max(slowest, time.monotonic() - killed_at)
                victim.start()
                cluster.wait_complete()
                members(bench, cluster, "default")
        finally:
            stop.set()
        for one in senders:
            one.result()
    bench.wait_done(sent, timeout=90)
    runs = Counter(entry.task_id for entry in bench.ledger.entries("done"))
    again = sum(count - 1 for count in runs.values())
    print(f"sent {len(sent)}, told {next(told)}, run again {again}, longest pause {slowest:.1f} s")
    assert len(sent) > 1000
    assert slowest < 20
    assert [worker.process.poll() for worker in workers] == [None, None]
    assert [worker.stop() for worker in workers] == [0, 0]


@pytest.mark.timeout(180)
def test_without_a_majority_callers_are_told_and_afterwards_work_goes_on(bench: Bench, cluster: PrivateCluster) -> None:
    bench.settings["broker"]["publish_timeout"] = 5
    app = bench.client()
    app.declare()
    members(bench, cluster, "default")
    worker = bench.worker("default", "-c", "1")
    sent = {bench.send(app, "note") for _ in range(50)}
    for node in cluster.nodes[1:]:
        node.kill()
    for _ in range(3):
        started = time.monotonic()
        with pytest.raises(PublishError):
            bench.send(app, "note")
        assert time.monotonic() - started < 6
    for node in cluster.nodes[1:]:
        node.start()
    cluster.wait_complete()

    def works() -> bool:
        with contextlib.suppress(PublishError):
            sent.add(bench.send(app, "note"))
            return True
        return False

    wait_until(works, 60, "the cluster takes messages again")
    bench.wait_done(sent, timeout=60)
    assert worker.stop() == 0


@pytest.mark.timeout(180)
def test_results_come_though_the_node_with_the_reply_queue_is_gone(bench: Bench, cluster: PrivateCluster) -> None:
    app = bench.client()
    app.declare()
    members(bench, cluster, "default")
    bench.worker("default", "-c", "1")
    assert app.send_task("integration.apps.jobs.add", (1, 2)).get(timeout=20) == 3
    (queue,) = [name for name in bench.vhost.management.queues() if ".reply." in name]
    name = bench.vhost.management.request("GET", f"queues/{bench.vhost.name}/{queue}")["node"]
    home = next(node for node in cluster.nodes if node.name == name)
    home.kill()
    assert app.send_task("integration.apps.jobs.add", (3, 4)).get(timeout=30) == 7
    home.start()
    assert app.send_task("integration.apps.jobs.add", (5, 6)).get(timeout=30) == 11

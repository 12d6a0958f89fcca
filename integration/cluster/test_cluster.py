"""A cluster of three nodes: queues have members on each, and one after the other is killed."""

from __future__ import annotations

import contextlib
import time

import pytest

from amqptasks.errors import PublishError
from amqptasks.testing.cluster import PrivateCluster
from amqptasks.testing.waiting import wait_until
from integration.cluster.conftest import Load, members
from integration.conftest import Bench

pytestmark = pytest.mark.fault


@pytest.mark.timeout(300)
def test_leaders_that_are_killed_one_after_the_other_lose_nothing(
    bench: Bench, cluster: PrivateCluster, load: Load
) -> None:
    slowest = 0.0
    for _ in range(3):
        victim = cluster.leader("default", bench.vhost.name)
        victim.kill()
        slowest = max(slowest, load.wait_running())
        victim.start()
        cluster.wait_complete()
        members(bench, cluster, "default")
    load.end()
    print(f"longest pause {slowest:.1f} s")
    assert slowest < 45


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
        assert time.monotonic() - started < 15
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

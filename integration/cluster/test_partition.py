"""A cluster whose nodes do not reach each other, or stand still, and then meet again."""

from __future__ import annotations

import time

import pytest

from amqptasks.testing.cluster import PrivateCluster
from integration.cluster.conftest import Load
from integration.conftest import Bench

pytestmark = pytest.mark.fault


@pytest.mark.timeout(180)
def test_a_leader_that_a_partition_parts_from_the_others_loses_nothing(
    bench: Bench, cluster: PrivateCluster, load: Load
) -> None:
    """Up to 4.2 the node in the minority pauses; from 4.3 on it goes on to answer clients, and confirms nothing."""
    load.wait_running()
    parted = cluster.leader("default", bench.vhost.name)
    cluster.isolate(parted)
    pause = load.wait_running()
    time.sleep(8)
    load.wait_running()
    cluster.rejoin(parted)
    cluster.wait_complete()
    load.wait_running()
    load.end()
    print(f"pause {pause:.1f} s")
    assert pause < 30


@pytest.mark.timeout(180)
def test_a_leader_whose_node_stands_still_loses_nothing(bench: Bench, cluster: PrivateCluster, load: Load) -> None:
    """For longer than its clients' heartbeats allow; it does not know that time has passed, nor who leads now."""
    load.wait_running()
    frozen = cluster.leader("default", bench.vhost.name)
    frozen.freeze()
    try:
        time.sleep(12)
    finally:
        frozen.thaw()
    cluster.wait_complete()
    load.wait_running()
    load.end()

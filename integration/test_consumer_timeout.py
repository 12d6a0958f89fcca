"""The broker takes back what is not acknowledged in time; tasks that take longer are not to suffer from it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from amqptasks.testing.management import Management
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from integration.conftest import Bench

pytestmark = pytest.mark.fault

TIMEOUT = 3.0
LONG = 3 * TIMEOUT
KINDS = pytest.mark.parametrize("queue", [{}, {"max_priority": 5}], ids=["quorum", "classic"])


@pytest.fixture(scope="module")
def impatient() -> Iterator[PrivateNode]:
    """A node that takes back after three seconds, instead of half an hour, and looks every second."""
    with PrivateNode("impatient", config={"consumer_timeout": str(int(TIMEOUT * 1000))}) as node:
        node.rabbitmqctl("eval", "application:set_env(rabbit, channel_tick_interval, 1000).")
        yield node


@pytest.fixture
def there(bench: Bench, impatient: PrivateNode) -> Iterator[Bench]:
    """A bench on the impatient node."""
    bench.settings["broker"]["url"] = impatient.url
    yield bench
    bench.close()
    management = Management(impatient.management_url)
    for name in ("default", "default.dlq"):
        with contextlib.suppress(Exception):
            management.delete_queue(name)


def version(node: PrivateNode) -> tuple[int, int]:
    text = Management(node.management_url).request("GET", "overview")["rabbitmq_version"]
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


def run_long_and_short(there: Bench, impatient: PrivateNode) -> WorkerProcess:
    """One long task, which runs once, short ones meanwhile, and some afterwards.

    The broker takes back all that a channel holds: a short one that has ended runs again when its acknowledgement
    comes too late, one each time at most, since there is one at a time.
    """
    app = there.client()
    app.declare()
    worker = there.worker("default", "-c", "2")
    slow = there.send(app, "note", LONG)
    there.wait_done({slow}, event="begin")
    sent = {slow}
    until = time.monotonic() + LONG - 1
    while time.monotonic() < until:
        quick = there.send(app, "note")
        there.wait_done({quick}, timeout=20)
        sent.add(quick)
        time.sleep(0.5)
    there.wait_done(sent, timeout=20)
    management = Management(impatient.management_url)
    wait_until(lambda: management.counts("default") == (0, 0), 20, "all is acknowledged", pause=0.1)
    later = {there.send(app, "note") for _ in range(20)}
    there.wait_done(later, timeout=20)
    runs = Counter(entry.task_id for entry in there.ledger.entries("begin"))
    assert runs.keys() == sent | later
    assert runs[slow] == 1
    again = runs - Counter(runs.keys())
    assert again.total() <= worker.log.count("Consumer lost"), again
    return worker


@KINDS
def test_a_task_of_three_consumer_timeouts_is_left_alone(
    there: Bench, impatient: PrivateNode, queue: dict[str, Any]
) -> None:
    there.settings["queues"] = {"default": queue}
    worker = run_long_and_short(there, impatient)
    if version(impatient) >= (3, 12):
        assert "Consumer lost" not in worker.log
    assert worker.stop() == 0


@KINDS
def test_a_task_that_the_broker_takes_back_is_adopted_by_the_worker_that_runs_it(
    there: Bench, impatient: PrivateNode, queue: dict[str, Any]
) -> None:
    """Where no queue has a timeout of its own, or the queue is older than the setting."""
    there.settings["queues"] = {"default": {**queue, "consumer_timeout": None}}
    there.client().declare()
    there.settings["queues"] = {"default": queue}
    if version(impatient) < (4, 3):  # these take the argument for a queue that stands, and it has no effect
        there.settings["queues"]["default"]["consumer_timeout"] = None
    worker = run_long_and_short(there, impatient)
    # 4.3 has no timeout for classic queues.
    lost = worker.log.count("Consumer lost")
    assert lost >= 1 or (lost == 0 and queue and version(impatient) >= (4, 3)), worker.log
    assert worker.stop() == 0

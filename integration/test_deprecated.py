"""Nothing here needs what RabbitMQ has announced to remove: it is denied on this node, and everything works."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from amqptasks import chord
from amqptasks.testing.management import Management
from amqptasks.testing.rabbitmq import VERSION_VARIABLE, PrivateNode
from amqptasks.testing.waiting import wait_until
from integration.apps import canvas
from integration.conftest import Broker, CanvasBench, VirtualHost

pytestmark = pytest.mark.skipif(
    not os.environ.get(VERSION_VARIABLE, "").startswith("4"),
    reason=f"only RabbitMQ 4 can deny deprecated features: set {VERSION_VARIABLE}",
)


@pytest.fixture
def strict() -> Iterator[PrivateNode]:
    denied = {f"deprecated_features.permit.{one}": "false" for one in ("transient_nonexcl_queues", "global_qos")}
    with PrivateNode("strict", config=denied) as node:
        yield node


def test_results_chords_retries_delays_and_dead_letters_work_where_deprecated_features_are_denied(
    strict: PrivateNode, tmp_path: Path
) -> None:
    management = Management(strict.management_url)
    there = Broker("strict node", strict.url, strict.management_url)
    desk = CanvasBench(VirtualHost("/", strict.url, management, there), tmp_path)
    desk.settings["queues"] = {"default": {}, "urgent": {"max_priority": 5}, "small": {"max_length": 100}}
    try:
        app = desk.caller()
        app.declare()
        desk.worker("default,urgent,small", "-c", "2")
        add = "integration.apps.canvas.add"
        assert app.send_task(add, (1, 2)).get(timeout=20) == 3
        assert app.send_task(add, (1, 2), countdown=0.3, queue="urgent", priority=5).get(timeout=20) == 3
        assert app.send_task(add, (1, 2), queue="small").get(timeout=20) == 3
        assert chord([canvas.part.s(number) for number in range(5)], canvas.body.s()).delay().get(20) > 0
        with pytest.raises(canvas.Declined):
            app.send_task("integration.apps.canvas.fails").get(timeout=20)
        wait_until(lambda: sum(management.counts("default.dlq")) == 1, 10, "a dead letter")
        time.sleep(0.5)
        used = json.loads(strict.rabbitmqctl("list_deprecated_features", "--used", "--formatter", "json"))
        # The management plugin, which this test looks through, counts as a use of its own figures.
        assert {one["name"] for one in used} <= {"management_metrics_collection"}
        log = "".join(file.read_text(errors="replace") for file in (strict.folder / "log").glob("*.log"))
        assert not [line for line in log.splitlines() if "transient_nonexcl" in line or "global_qos" in line]
        assert not [line for line in log.splitlines() if "exception" in line and "operation" in line]
    finally:
        desk.close()

"""What is sent to which version."""

from __future__ import annotations

import pytest

from amqptasks.broker.versions import accepted_arguments, fitting_priority, two_priority_levels
from amqptasks.message import Envelope
from amqptasks.topology.entities import Queue, freeze_arguments


@pytest.mark.parametrize(
    ("product", "version", "two"),
    [
        ("RabbitMQ", "4.0.5", True),
        (b"RabbitMQ", b"4.2.1", True),
        ("RabbitMQ", "3.10.8", False),
        ("RabbitMQ", "3.13.7", False),
        ("RabbitMQ", "4.3.0", False),
        ("RabbitMQ", "4.10.0", False),
        ("LavinMQ", "4.0.1", False),
    ],
)
def test_two_levels_are_of_some_versions_of_rabbitmq(product: str, version: str, two: bool) -> None:
    assert two_priority_levels({"product": product, "version": version}) is two
    assert two_priority_levels(None) is False


@pytest.mark.parametrize(
    ("exchange", "priority", "fitting"),
    [
        ("amqptasks.delay.07", 9, 4),
        ("amqptasks.delay.24", 4, 4),
        ("amqptasks.delay.24", None, None),
        ("amqptasks", 9, 9),
        ("my.delay.lines", 9, 9),
    ],
)
def test_only_on_the_ladder_a_priority_is_lowered(exchange: str, priority: int | None, fitting: int | None) -> None:
    assert fitting_priority(Envelope(exchange, "key", b"", priority=priority)) == fitting


@pytest.mark.parametrize(
    ("kind", "version", "sent"),
    [
        ("quorum", "3.10.8", True),
        ("quorum", "4.3.6", True),
        ("classic", "3.13.7", True),
        ("classic", "4.2.9", True),
        ("classic", "4.3.0", False),
        ("classic", "5.0.1", False),
    ],
)
def test_classic_queues_get_a_consumer_timeout_where_they_can_have_one(kind: str, version: str, sent: bool) -> None:
    queue = Queue("q", arguments=freeze_arguments({"x-queue-type": kind, "x-consumer-timeout": 60_000}))
    found = accepted_arguments(queue, {"product": "RabbitMQ", "version": version})
    assert found == (dict(queue.arguments) if sent else {"x-queue-type": kind})

"""What differs between RabbitMQ's versions, where it concerns what is sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from amqptasks.message import Envelope
from amqptasks.topology.entities import Queue

__all__ = ["accepted_arguments", "counts_looks", "fitting_priority", "two_priority_levels"]

#: The highest priority that 4.0 to 4.2 take for a normal message (RabbitMQ 4.0, quorum queues, "Priority").
_NORMAL = 4


def _version(server: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Major and minor version of a RabbitMQ, from connection.start's table; None for another broker."""
    server = server or {}
    product, version = server.get("product"), server.get("version")
    texts = [one.decode() if isinstance(one, bytes) else str(one) for one in (product, version)]
    found = re.match(r"(\d+)\.(\d+)\.", texts[1])
    return (int(found[1]), int(found[2])) if texts[0] == "RabbitMQ" and found else None


def two_priority_levels(server: Mapping[str, Any] | None) -> bool:
    """Whether this broker's quorum queues know two priorities: RabbitMQ 4.0 to 4.2. Takes connection.start's table."""
    version = _version(server)
    return version is not None and (4, 0) <= version < (4, 3)


def counts_looks(server: Mapping[str, Any] | None) -> bool:
    """Whether a message that is given back has failed once more: before RabbitMQ 4.3."""
    version = _version(server)
    return version is not None and version < (4, 3)


def accepted_arguments(queue: Queue, server: Mapping[str, Any] | None) -> dict[str, Any]:
    """The queue's arguments without those that this broker refuses. Takes connection.start's table.

    From RabbitMQ 4.3 on classic queues have no consumer timeout, and refuse ``x-consumer-timeout`` with 406. Before
    3.12 no queue has one of its own; the argument is taken there, and works after an upgrade.
    """
    arguments = dict(queue.arguments)
    version = _version(server)
    if queue.kind == "classic" and version is not None and version >= (4, 3):
        arguments.pop("x-consumer-timeout", None)
    return arguments


def fitting_priority(envelope: Envelope) -> int | None:
    """The priority for a broker with two levels: in the delay ladder all messages take the normal one.

    There, a message of high priority that is not due hides normal ones that are: they were 3.6 s late after 8 s of
    one delayed task of each every 40 ms on 4.0.5, and would be later with every second.
    """
    priority = envelope.priority
    # <prefix>.delay.<two digits>
    if priority is not None and priority > _NORMAL and envelope.exchange[-9:-2] == ".delay.":
        return _NORMAL
    return priority

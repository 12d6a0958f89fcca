"""What differs between RabbitMQ's versions, where it concerns what is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amqptasks.message import Envelope

__all__ = ["fitting_priority", "two_priority_levels"]

#: The highest priority that 4.0 to 4.2 take for a normal message (RabbitMQ 4.0, quorum queues, "Priority").
_NORMAL = 4


def two_priority_levels(server: Mapping[str, Any] | None) -> bool:
    """Whether this broker's quorum queues know two priorities: RabbitMQ 4.0 to 4.2. Takes connection.start's table."""
    server = server or {}
    product, version = server.get("product"), server.get("version")
    texts = [one.decode() if isinstance(one, bytes) else str(one) for one in (product, version)]
    return texts[0] == "RabbitMQ" and texts[1].startswith(("4.0.", "4.1.", "4.2."))


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

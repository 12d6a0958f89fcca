"""What the broker says about a migration: all that there is to know, so that another process can go on with it. Pure.

The parking queue says by its being there that a migration is under way, and in an argument of its own what the queue
was before. Everything else follows from which arguments the queue has, and which of the two is bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from amqptasks.errors import ConfigError
from amqptasks.topology.entities import Binding, Queue, Topology, freeze_arguments

__all__ = ["Look", "Step", "former_queue", "look_at", "parking"]

#: RabbitMQ keeps arguments that it does not know (3.10 to 4.3).
_FORMER = "x-amqptasks-replaces"
_DEAD_LETTERS = ("x-dead-letter-exchange", "x-dead-letter-routing-key")
#: A mover that dies counts as a failed delivery of all that it held.
_NO_LIMIT = 1_000_000


class Step(Enum):
    """The steps, in their order, as they are told."""

    PARK = "park"
    DIVERT = "divert"
    DRAIN = "drain"
    SETTLE = "settle"
    SWITCH = "switch"
    RETURN = "return"
    REFILL = "refill"
    FINISH = "finish"


@dataclass(frozen=True, slots=True)
class Look:
    """What stands in the broker. Counts are as old as `ManagementApi.depths` says."""

    queue: Queue | None
    parked: Queue | None
    #: What leads to the queue, and to the parking queue.
    bound: tuple[Binding, ...]
    diverted: tuple[Binding, ...]
    #: Queue -> (messages, node that counts them).
    depths: Mapping[str, tuple[int, str]]

    def depth(self, queue: str) -> int:
        """Messages in a queue, with those that consumers hold."""
        return self.counted(queue)[0]

    def counted(self, queue: str) -> tuple[int, str]:
        """The same, and the node that says so."""
        return self.depths.get(queue, (0, ""))


def look_at(live: Topology, depths: Mapping[str, tuple[int, str]], name: str, parking_name: str) -> Look:
    """The part of the virtual host that a migration is about."""

    def leading(destination: str) -> tuple[Binding, ...]:
        return tuple(one for one in live.bindings if one.destination_type == "queue" and one.destination == destination)

    return Look(live.queue(name), live.queue(parking_name), leading(name), leading(parking_name), depths)


def parking(name: str, former: Queue, wanted: Queue) -> Queue:
    """The parking queue: replicated, without limits; what expires in it is dead-lettered as `wanted` would do it."""
    was = {"durable": former.durable, "arguments": dict(former.arguments)}
    arguments = dict(wanted.arguments)
    table = {
        "x-queue-type": "quorum",
        "x-overflow": "reject-publish",
        "x-delivery-limit": _NO_LIMIT,
        _FORMER: json.dumps(was, sort_keys=True),
        **{key: arguments[key] for key in _DEAD_LETTERS if key in arguments},
    }
    if _DEAD_LETTERS[0] in table:
        table["x-dead-letter-strategy"] = "at-least-once"
    return Queue(name, arguments=freeze_arguments(table))


def former_queue(parked: Queue, name: str) -> Queue:
    """The queue as it was before the migration began.

    Raises ConfigError for a queue of the parking queue's name that is none.
    """
    try:
        was = json.loads(dict(parked.arguments)[_FORMER])
        return Queue(name, durable=bool(was["durable"]), arguments=freeze_arguments(was["arguments"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"there is a queue {parked.name!r} that no migration made: it stands where messages are to be parked. "
            "Look at it, and delete it or move its messages"
        ) from error

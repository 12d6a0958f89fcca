"""A delivery on its way through the worker."""

from __future__ import annotations

from enum import Enum

from amqptasks.broker.consumer import Incoming
from amqptasks.execution.job import Job

__all__ = ["CRASHES_HEADER", "Delivery", "Stage", "header_crashes"]

#: How many executors this message has cost so far. It travels with the message, so that it survives every process.
CRASHES_HEADER = "x-amqptasks-crashes"


class Stage(Enum):
    """Where a delivery is."""

    WAITING = "waiting"
    RUNNING = "running"
    SETTLING = "settling"
    SETTLED = "settled"


class Delivery:
    """One message that this worker holds.

    `number` names it inside the worker for as long as it is held; `tag` and `epoch` name it to the broker, and change
    when the connection was lost and the broker delivers the message again while its task still runs here.
    """

    __slots__ = ("epoch", "incoming", "number", "queue", "stage", "tag")

    def __init__(self, number: int, incoming: Incoming, queue: str) -> None:
        self.number = number
        self.incoming = incoming
        self.queue = queue
        self.tag = incoming.tag
        self.epoch = incoming.epoch
        self.stage = Stage.WAITING

    @property
    def headers(self) -> dict[str, object]:
        """The message's headers."""
        return self.incoming.properties.headers or {}

    @property
    def key(self) -> tuple[object, object, int]:
        """What a redelivery of the same message has in common with this one. After intake found the headers sound."""
        headers = self.headers
        return headers.get("id"), headers.get("retries"), header_crashes(headers)

    def adopt(self, again: Incoming) -> None:
        """The broker delivered the message again: settle that delivery instead."""
        self.tag = again.tag
        self.epoch = again.epoch

    def job(self) -> Job:
        """What an executor needs of it."""
        incoming, properties = self.incoming, self.incoming.properties
        return Job(
            self.number,
            properties.headers or {},
            properties.content_type,
            properties.correlation_id,
            properties.reply_to,
            properties.priority,
            incoming.exchange,
            incoming.routing_key,
            incoming.redelivered,
            incoming.body,
        )


def header_crashes(headers: dict[str, object]) -> int:
    """How many executors the message has cost; 0 for a header that is no count."""
    value = headers.get(CRASHES_HEADER)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

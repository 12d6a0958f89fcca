"""A delivery on its way through the worker."""

from __future__ import annotations

from enum import Enum

from amqptasks.broker.consumer import Incoming
from amqptasks.events import TaskFailed
from amqptasks.execution.job import Job
from amqptasks.outcome import Failed, Reason

__all__ = ["CRASHES_HEADER", "VERDICT_HEADER", "Delivery", "Stage", "failure_event", "header_crashes", "header_verdict"]

#: How many executors this message has cost so far. It travels with the message, so that it survives every process.
CRASHES_HEADER = "x-amqptasks-crashes"
#: (exception, message) of a task that must not run: the body of a chord that failed.
VERDICT_HEADER = "x-amqptasks-verdict"


class Stage(Enum):
    """Where a delivery is."""

    WAITING = "waiting"
    RUNNING = "running"
    SETTLING = "settling"
    SETTLED = "settled"


class Delivery:
    """One message that this worker holds.

    `number` names it to the executor that holds it, and is another one each time it is given out, so that what an
    executor says of it too late is not mistaken; `tag` and `epoch` name it to the broker, and change when the
    connection was lost and the broker delivers the message again while its task still runs here.
    """

    __slots__ = ("epoch", "incoming", "number", "queue", "stage", "tag", "unconfirmed", "verdict")

    def __init__(self, incoming: Incoming, queue: str) -> None:
        self.number = 0
        self.incoming = incoming
        self.queue = queue
        self.tag = incoming.tag
        self.epoch = incoming.epoch
        self.stage = Stage.WAITING
        #: Messages of its outcome that are not confirmed yet.
        self.unconfirmed = 0
        #: What is decided already: an executor only says so to those who wait.
        self.verdict: Failed | None = None

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
            None if self.verdict is None else (str(self.verdict.reason), self.verdict.exception, self.verdict.message),
        )


def header_verdict(headers: dict[str, object]) -> Failed:
    """What the verdict header says of a chord's body."""
    value = headers.get(VERDICT_HEADER)
    text = str(value[1]) if isinstance(value, list) and len(value) == 2 else "the chord failed"
    return Failed(Reason.FAILED, "ChordError", text)


def failure_event(delivery: Delivery, failed: Failed) -> TaskFailed:
    """What the log and the monitors hear of a message that failed without running to its end."""
    headers = delivery.headers
    retries = headers.get("retries")
    return TaskFailed(
        str(headers.get("task"))[:200],
        str(headers.get("id"))[:200],
        delivery.queue,
        (retries if isinstance(retries, int) else 0) + 1,
        0.0,
        failed.reason,
        failed.message,
        "",
        None,
        expected=True,
    )


def header_crashes(headers: dict[str, object]) -> int:
    """How many executors the message has cost; 0 for a header that is no count."""
    value = headers.get(CRASHES_HEADER)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

"""A delivery on its way through the worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

from amqptasks.broker.consumer import Incoming
from amqptasks.errors import PublishError
from amqptasks.events import TaskFailed, TaskRetrying, TaskRevoked
from amqptasks.execution.job import Job, header_retries
from amqptasks.message import Envelope
from amqptasks.outcome import Failed, Reason, Retrying
from amqptasks.protocol.task import PUBLISHED_HEADER, REPLAYS_HEADER

__all__ = [
    "CRASHES_HEADER",
    "HOME_HEADER",
    "PASSED_HEADER",
    "TURN_HEADER",
    "VERDICT_HEADER",
    "Delivery",
    "Key",
    "Stage",
    "Told",
    "failure_event",
    "header_crashes",
    "header_verdict",
    "key_of",
    "retry_event",
]

#: How many executors this message has cost so far. It travels with the message, so that it survives every process.
CRASHES_HEADER = "x-amqptasks-crashes"
#: (exception, message) of a task that must not run: the body of a chord that failed.
VERDICT_HEADER = "x-amqptasks-verdict"
#: The queue that a message came from when it went to wait for its turn, and goes back to.
HOME_HEADER = "x-amqptasks-home"
#: Names its wait there: one name for each time that it waits.
TURN_HEADER = "x-amqptasks-turn"
#: When its turn had come, in milliseconds of the epoch: the rate limit lets it run.
PASSED_HEADER = "x-amqptasks-passed"


#: What tells a message from others of the same task id. `x-death` the broker writes before it delivers, and not again.
_TELLING = (
    "id",
    "retries",
    CRASHES_HEADER,
    PASSED_HEADER,
    PUBLISHED_HEADER,
    REPLAYS_HEADER,
    "x-death",
)
Key = tuple[str, ...]


def key_of(headers: Mapping[str, object]) -> Key:
    """`Delivery.key` of a message with these headers."""
    # As text: what a stranger sends as an id may be a list.
    return tuple(str(headers.get(name)) for name in _TELLING)


class Stage(Enum):
    """Where a delivery is."""

    WAITING = "waiting"
    RUNNING = "running"
    SETTLING = "settling"
    SETTLED = "settled"


class Told(Enum):
    """What monitors have heard of a delivery."""

    NOTHING = "nothing"
    RECEIVED = "received"
    STARTED = "started"


class Delivery:
    """One message that this worker holds.

    `number` names it to the executor that holds it, and is another one each time it is given out, so that what an
    executor says of it too late is not mistaken; `tag` and `epoch` name it to the broker, and change when the
    connection was lost and the broker delivers the message again while its task still runs here.
    """

    __slots__ = (
        "epoch",
        "incoming",
        "last",
        "limits",
        "number",
        "queue",
        "refused",
        "stage",
        "tag",
        "told",
        "unconfirmed",
        "verdict",
    )

    def __init__(self, incoming: Incoming, queue: str) -> None:
        self.number = 0
        self.incoming = incoming
        self.queue = queue
        self.tag = incoming.tag
        self.epoch = incoming.epoch
        self.stage = Stage.WAITING
        self.told = Told.NOTHING
        #: Messages of its outcome that are not confirmed yet.
        self.unconfirmed = 0
        #: Those that are published when the others are confirmed.
        self.last: Sequence[Envelope] = ()
        #: Why one of them was not taken, and will not be.
        self.refused: PublishError | None = None
        #: (hard, soft) seconds that were set for its task while the worker runs.
        self.limits: tuple[float | None, float | None] | None = None
        #: What is decided already: an executor only says so to those who wait.
        self.verdict: Failed | None = None

    @property
    def headers(self) -> dict[str, object]:
        """The message's headers."""
        return self.incoming.properties.headers or {}

    @property
    def key(self) -> Key:
        """What a redelivery of the same message has in common with this one, and no other message has.

        A task may be sent again under its id: by a caller, by a replay, by a retry. Each is another message, told by
        its own counts, and by when it was published. One that came down the delay ladder, or has passed its rate limit,
        is another one than before: that one was moved, this one is to run.
        """
        return key_of(self.headers)

    def is_call(self, task_id: str) -> bool:
        """Whether it is the call of this id, and not decided already."""
        return self.verdict is None and self.headers.get("id") == task_id

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
            None if self.verdict is None else self.verdict.signum,
            self.limits,
        )


def header_verdict(headers: dict[str, object]) -> Failed:
    """What the verdict header says of a chord's body."""
    value = headers.get(VERDICT_HEADER)
    text = str(value[1]) if isinstance(value, list) and len(value) == 2 else "the chord failed"
    return Failed(Reason.FAILED, "ChordError", text)


def failure_event(delivery: Delivery, failed: Failed) -> TaskFailed | TaskRevoked:
    """What the log and the monitors hear of a message that failed without running to its end."""
    headers = delivery.headers
    retries = headers.get("retries")
    task, task_id = str(headers.get("task"))[:200], str(headers.get("id"))[:200]
    attempt = (retries if isinstance(retries, int) else 0) + 1
    if failed.reason in (Reason.REVOKED, Reason.EXPIRED):
        expired = failed.reason is Reason.EXPIRED
        signum = failed.signum
        return TaskRevoked(task, task_id, delivery.queue, attempt, signum is not None, signum, expired, failed.message)
    return TaskFailed(
        task,
        task_id,
        delivery.queue,
        attempt,
        0.0,
        failed.reason,
        failed.message,
        "",
        None,
        expected=True,
    )


def retry_event(delivery: Delivery, retrying: Retrying) -> TaskRetrying:
    """What the log hears of a task that was killed, and runs again."""
    headers = delivery.headers
    attempt = header_retries(headers) + 1
    task, task_id = str(headers.get("task")), str(headers.get("id"))
    return TaskRetrying(task, task_id, delivery.queue, attempt, 0.0, retrying.delay, retrying.message)


def header_crashes(headers: dict[str, object]) -> int:
    """How many executors the message has cost; 0 for a header that is no count."""
    value = headers.get(CRASHES_HEADER)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

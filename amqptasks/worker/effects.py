"""From an outcome to the message that must be durable before the ack. Pure: delivery and outcome in, envelope out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from amqptasks.broker.consumer import Incoming
from amqptasks.message import Envelope
from amqptasks.outcome import (
    Discarded,
    Failed,
    GivenBack,
    Lost,
    Outcome,
    Postponed,
    RateLimited,
    Retrying,
    Succeeded,
)
from amqptasks.protocol.task import PUBLISHED_HEADER
from amqptasks.routing import Route
from amqptasks.topology.delays import delayed
from amqptasks.worker.delivery import (
    CRASHES_HEADER,
    HOME_HEADER,
    PASSED_HEADER,
    TURN_HEADER,
    Delivery,
    header_crashes,
)

__all__ = ["SMALLEST", "TRACEBACK_BYTES", "Effects", "copy_message"]

#: A traceback in a header is cut here: headers travel in one frame with everything else.
TRACEBACK_BYTES = 8 * 1024
_MESSAGE_BYTES = 2 * 1024
#: Steps by which a dead letter becomes smaller: no traceback, no headers of others, nothing that is long.
_NO_TRACEBACK, _NO_FOREIGN, SMALLEST = 1, 2, 3
_SHORT = 255
_MOST_ATTEMPTS = 2**63 - 1
#: The headers of a task message; all others are foreign.
_OWN_HEADERS = frozenset(
    {
        "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id",
        "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "compression", "x-amqptasks-published",
    }
)  # fmt: skip
#: What workers and operators write on a dead letter.
_NOTES = frozenset(
    {
        "x-task-exception", "x-task-exception-message", "x-task-traceback", "x-task-failed-at", "x-task-worker",
        "x-task-attempts", "x-task-reason", "x-task-replays", "x-task-edited-at",
    }
)  # fmt: skip
#: The bits of a retry's delay that count (about 1.6 %): fewer bits, fewer queues on the way.
_RETRY_BITS = 7

# The broker's own notes about the way of a message. Copied to a new publish, RabbitMQ before 4.0 takes `x-death` for
# a cycle and drops the message without a word; CC and BCC would route it to others again.
_BROKER_HEADERS = frozenset(
    {
        "x-death",
        "x-first-death-exchange",
        "x-first-death-queue",
        "x-first-death-reason",
        "x-last-death-exchange",
        "x-last-death-queue",
        "x-last-death-reason",
        "x-delivery-count",
        "x-acquired-count",
        "CC",
        "BCC",
    }
)


def _cut(text: str, size: int) -> str:
    data = text.encode("utf-8", "replace")
    # The end of a traceback names the error, so the front is what goes.
    return text if len(data) <= size else "…" + data[-(size - 3) :].decode("utf-8", "ignore")


@dataclass(frozen=True, slots=True)
class Effects:
    """Builds what is published for an outcome, for the deliveries of one queue."""

    prefix: str
    queue: str
    worker: str
    #: False for a queue without a dead-letter queue: what fails for good is acknowledged and logged.
    dead_letters: bool = True

    def envelopes(self, delivery: Delivery, outcome: Outcome) -> list[Envelope]:
        """What must be confirmed before the delivery is settled."""
        own = self._own(delivery, outcome)
        messages = list(getattr(outcome, "messages", ()))
        return messages if own is None else [*messages, own]

    def _own(self, delivery: Delivery, outcome: Outcome) -> Envelope | None:
        match outcome:
            case Succeeded() | Discarded() | GivenBack():
                return None
            case Retrying():
                return self._retry(delivery, outcome)
            case Postponed(delay):
                return self._delayed(delivery, delay, {}, bits=None)
            case Failed():
                return self._dead_letter(delivery, outcome)
            case RateLimited(queue):
                return self._copy(
                    delivery, self.prefix, queue, {HOME_HEADER: self.queue, TURN_HEADER: str(uuid.uuid4())}
                )
            case Lost():
                return self._again(delivery)

    def _retry(self, delivery: Delivery, outcome: Retrying) -> Envelope:
        eta = datetime.now(UTC) + timedelta(seconds=outcome.delay)
        retries = delivery.headers.get("retries") or 0
        changed: dict[str, Any] = {
            "retries": retries + 1 if isinstance(retries, int) else 1,
            "eta": eta.isoformat(),
            "x-task-exception": outcome.exception,
            "x-task-exception-message": _cut(outcome.message, _MESSAGE_BYTES),
            # A new attempt starts with a clean slate: crashes count for the attempt that crashed.
            CRASHES_HEADER: None,
            # And is another start, which has to pass the rate limit.
            PASSED_HEADER: None,
            **(outcome.headers or {}),
        }
        envelope = self._delayed(delivery, outcome.delay, changed, bits=_RETRY_BITS, queue=outcome.queue)
        if outcome.body is not None:
            envelope.body = outcome.body
        if outcome.priority is not None:
            envelope.priority = outcome.priority
        return envelope

    def _delayed(
        self,
        delivery: Delivery,
        delay: float,
        changed: Mapping[str, Any],
        *,
        bits: int | None,
        queue: str | None = None,
    ) -> Envelope:
        target = queue or self.queue
        route = Route(self.prefix, target, target, None)
        exchange, key = delayed(self.prefix, route, delay, significant_bits=bits)
        return self._copy(delivery, exchange, key, changed)

    def _again(self, delivery: Delivery) -> Envelope:
        changed = {CRASHES_HEADER: header_crashes(delivery.headers) + 1, PASSED_HEADER: None}
        if PUBLISHED_HEADER in delivery.headers:
            changed[PUBLISHED_HEADER] = time.time_ns() // 1_000_000  # it waits anew
        return self._copy(delivery, self.prefix, self.queue, changed)

    def _dead_letter(self, delivery: Delivery, failed: Failed) -> Envelope | None:
        if not self.dead_letters:
            return None
        retries = delivery.headers.get("retries")
        changed: dict[str, Any] = {
            "x-task-exception": failed.exception,
            "x-task-exception-message": _cut(failed.message, _MESSAGE_BYTES),
            "x-task-traceback": _cut(failed.traceback, TRACEBACK_BYTES),
            "x-task-failed-at": datetime.now(UTC).isoformat(),
            "x-task-worker": self.worker,
            "x-task-attempts": min((retries if isinstance(retries, int) else 0) + 1, _MOST_ATTEMPTS),
            "x-task-reason": str(failed.reason),
            PASSED_HEADER: None,
        }
        return self._copy(delivery, f"{self.prefix}.dlx", self.queue, changed)

    def smaller(self, delivery: Delivery, failed: Failed, step: int) -> Envelope | None:
        """The dead letter that is published where a larger one could not be; from step 1 to `SMALLEST`, whose headers
        are few and short, whatever came. Header ``x-task-cut`` says what was left out."""
        letter = self._dead_letter(delivery, replace(failed, traceback=""))
        if letter is None:
            return None
        headers = letter.headers
        if step > _NO_TRACEBACK:
            headers = {name: headers[name] for name in headers if name in _OWN_HEADERS or name in _NOTES}
        if step == SMALLEST:
            letter.reply_to = None
            cut = {
                name: _cut(value, _SHORT)
                for name, value in headers.items()
                if name in _NOTES and isinstance(value, str)
            }
            headers = {name: value for name, value in (headers | cut).items() if _is_short(value)}
        letter.headers = {**headers, "x-task-cut": "traceback" if step == _NO_TRACEBACK else "traceback and headers"}
        return letter

    def _copy(self, delivery: Delivery, exchange: str, key: str, changed: Mapping[str, Any]) -> Envelope:
        return copy_message(delivery.incoming, exchange, key, changed)


def _is_short(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= _SHORT)


def copy_message(incoming: Incoming, exchange: str, key: str, changed: Mapping[str, Any]) -> Envelope:
    """The same message for another queue. Headers in `changed` replace its own; None leaves one out."""
    properties = incoming.properties
    headers = {name: value for name, value in (properties.headers or {}).items() if name not in _BROKER_HEADERS}
    for name, value in changed.items():
        if value is None:
            headers.pop(name, None)
        else:
            headers[name] = value
    return Envelope(
        exchange=exchange,
        routing_key=key,
        body=incoming.body,
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        headers=headers,
        message_id=properties.message_id or properties.correlation_id,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        priority=properties.priority,
        # Never `expiration`: in the ladder it would let the message go early, in the DLQ it would drop it.
        expiration=None,
    )

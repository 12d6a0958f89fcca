"""From an outcome to the message that must be durable before the ack. Pure: delivery and outcome in, envelope out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from amqptasks.message import Envelope
from amqptasks.outcome import Discarded, Failed, GivenBack, Lost, Outcome, Postponed, Retrying, Succeeded
from amqptasks.routing import Route
from amqptasks.topology.delays import delayed
from amqptasks.worker.delivery import CRASHES_HEADER, Delivery, header_crashes

__all__ = ["TRACEBACK_BYTES", "Effects"]

#: A traceback in a header is cut here: headers travel in one frame with everything else.
TRACEBACK_BYTES = 8 * 1024
_MESSAGE_BYTES = 2 * 1024
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
            case Lost():
                return self._again(delivery)

    def _retry(self, delivery: Delivery, outcome: Retrying) -> Envelope:
        eta = datetime.now(UTC) + timedelta(seconds=outcome.delay)
        retries = delivery.headers.get("retries") or 0
        changed = {
            "retries": retries + 1 if isinstance(retries, int) else 1,
            "eta": eta.isoformat(),
            "x-task-exception": outcome.exception,
            "x-task-exception-message": _cut(outcome.message, _MESSAGE_BYTES),
            # A new attempt starts with a clean slate: crashes count for the attempt that crashed.
            CRASHES_HEADER: None,
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
        return self._copy(delivery, self.prefix, self.queue, {CRASHES_HEADER: header_crashes(delivery.headers) + 1})

    def _dead_letter(self, delivery: Delivery, failed: Failed) -> Envelope | None:
        if not self.dead_letters:
            return None
        retries = delivery.headers.get("retries")
        changed = {
            "x-task-exception": failed.exception,
            "x-task-exception-message": _cut(failed.message, _MESSAGE_BYTES),
            "x-task-traceback": _cut(failed.traceback, TRACEBACK_BYTES),
            "x-task-failed-at": datetime.now(UTC).isoformat(),
            "x-task-worker": self.worker,
            "x-task-attempts": (retries if isinstance(retries, int) else 0) + 1,
            "x-task-reason": str(failed.reason),
        }
        return self._copy(delivery, f"{self.prefix}.dlx", self.queue, changed)

    def _copy(self, delivery: Delivery, exchange: str, key: str, changed: Mapping[str, Any]) -> Envelope:
        properties = delivery.incoming.properties
        headers = {name: value for name, value in delivery.headers.items() if name not in _BROKER_HEADERS}
        for name, value in changed.items():
            if value is None:
                headers.pop(name, None)
            else:
                headers[name] = value
        return Envelope(
            exchange=exchange,
            routing_key=key,
            body=delivery.incoming.body,
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

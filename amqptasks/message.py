"""Messages as values: the wire form that is published."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Envelope", "Provenance"]


class Provenance(NamedTuple):
    """Properties that amqptasks never sets, and keeps where somebody else has: AMQP 0-9-1's names."""

    timestamp: int | None = None
    type: str | bytes | None = None
    app_id: str | bytes | None = None


@dataclass(slots=True)
class Envelope:
    """A message in its wire form: body bytes, properties and headers, and where it goes.

    Properties carry AMQP 0-9-1's names (basic properties). `expiration` is in milliseconds, as a string.
    Persistent (`delivery_mode` 2) unless said otherwise.
    """

    exchange: str
    routing_key: str
    body: bytes
    content_type: str = "application/json"
    content_encoding: str = "utf-8"
    headers: dict[str, Any] = field(default_factory=dict)
    message_id: str | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    priority: int | None = None
    expiration: str | None = None
    delivery_mode: int = 2
    #: With ``mandatory`` the broker returns what no queue would get (AMQP 0-9-1, basic.publish).
    mandatory: bool = True
    provenance: Provenance | None = None
    #: Of the messages of one outcome: published when all others are confirmed, and only if they were taken.
    last: bool = False

    @property
    def is_reply(self) -> bool:
        """Whether it goes to a caller's own queue, and may be dropped when that is gone."""
        return not self.mandatory and not self.exchange

"""What of aio-pika the asyncio publisher uses. Heavy: imported when somebody awaits a publish for the first time."""

from __future__ import annotations

from aio_pika import Connection
from aio_pika.connection import make_url
from aiormq import exceptions as errors
from aiormq import spec

from amqptasks.broker.wire import EncodedProperties

__all__ = ["Connection", "Written", "errors", "make_url"]


class Written(spec.Basic.Properties):
    """Properties that are encoded already: pamqp takes several times as long for a task's headers.

    aiormq looks at `message_id`, by which it finds the message that the broker returns.
    """

    def __init__(self, encoded: EncodedProperties, message_id: str | None) -> None:
        super().__init__(message_id=message_id)
        self._data = encoded.data

    def marshal(self) -> bytes:
        """The encoded properties."""
        return self._data

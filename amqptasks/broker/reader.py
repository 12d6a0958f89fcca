"""Reading a queue without taking what is in it: short visits of operators' tools.

Messages are delivered to this connection and held unacknowledged. Those that nobody removed go back when the visit
ends, each to its old place: a classic queue keeps positions, a quorum queue serves what was returned first, in the
order in which it came back.
A visit that is killed gives everything back that was not removed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import pika
from pika import spec
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker
from pika.spec import BasicProperties

from amqptasks.broker.acks import AckWindow
from amqptasks.broker.consumer import Incoming
from amqptasks.broker.inflow import Properties
from amqptasks.broker.visits import connect
from amqptasks.broker.wire import decode_properties, decode_provenance
from amqptasks.config import BrokerSettings
from amqptasks.errors import AccessRefused, BrokerUnreachable, ConfigError
from amqptasks.message import Provenance

__all__ = ["QueueReader", "WholeProperties"]

#: Messages on their way to this process, so that memory is bounded; a channel more for each so many that are held.
_PREFETCH = 1000
#: Large messages: fewer at a time, by what those before them had.
_PREFETCH_BYTES, _FEWEST, _FIRST = 16 << 20, 10, 100
#: A connection has 2047 channels (RabbitMQ's default), so that from here on each takes more.
_MANY_CHANNELS, _PREFETCH_OF_MANY = 1000, 20_000
#: Removed messages that may wait to be acknowledged together: a frame for all, where the run of tags is unbroken.
_GATHERED = 200
_STEP, _LOOK = 0.02, 0.002
#: A queue that has given nothing for so long has nothing more to give; or the broker is slow, and says that some wait.
_IDLE_SECONDS, _SLOW_SECONDS = 2.0, 20.0
#: A queue that is said to be empty may give something all the same: after its leader changed, 0 is no count.
_EMPTY_SECONDS = 0.5
#: What an earlier visit held is back in the queue after so long, or it is gone.
_BACK_SECONDS = 10.0
#: The same at the end of a visit: somebody else may have taken it.
_RETURN_SECONDS = 2.0
#: Of the first byte of the property flags (AMQP 0-9-1, class basic): there are headers.
_HEADERS_FLAG = 0x20
#: What may happen while a visit ends; what went wrong in it was told already.
_FAILURES = (AMQPError, OSError, BrokerUnreachable, ConfigError, AccessRefused)


class WholeProperties(Properties):
    """Properties with those that workers do not read. Never raises."""

    provenance: Provenance | None = None
    #: Whether there are headers that cannot be turned into values: a copy would be another message.
    unreadable = False

    def decode(self, encoded: bytes, offset: int = 0) -> BasicProperties:
        data = encoded[offset:]
        try:
            self.provenance = decode_provenance(data)
            decode_properties(self, data)
        except Exception:
            self.headers = None
            self.unreadable = True
        else:  # headers that cannot be read are left out
            self.unreadable = self.headers is None and bool(data[0] & _HEADERS_FLAG)
        return self


class QueueReader:
    """A visit to one queue.

    Raises:
        ConfigError: there is no such queue. AccessRefused: the user may not read it.
        BrokerUnreachable: no node answers.
    """

    def __init__(self, settings: BrokerSettings, queue: str) -> None:
        self._settings = settings
        self._queue = queue
        self._channels: list[BlockingChannel] = []
        #: The consumer of the last channel: there is one at a time, so that letters come in their order.
        self._tag: str | None = None
        #: By channel: messages that are held, how many it takes, and the removed ones that are not acknowledged yet.
        self._held: list[int] = []
        self._sizes: list[int] = []
        self._windows: list[AckWindow[None]] = []
        self._removed: dict[int, int] = {}
        self._arrived: deque[tuple[int, Incoming]] = deque()
        self._bytes = self._came = 0
        #: Whether the message that came last was given out before.
        self._again = False
        self._connection: pika.BlockingConnection
        self._counting: BlockingChannel | None = None
        self._began = time.monotonic()
        #: Messages that `messages` has given; of these, those that were removed.
        self.seen = self.removed = 0
        #: What waited in the queue when the visit began.
        self.found = 0

    @property
    def seconds(self) -> float:
        """How long the visit lasts already."""
        return time.monotonic() - self._began

    def __enter__(self) -> Self:
        # What pika makes of a content header: it says all that others need, too.
        spec.props[BasicProperties.INDEX] = WholeProperties
        self._connection = connect(self._settings, f"amqptasks/read/{self._queue}")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(*_FAILURES):
            self.flush()
            if self._channels and (kind is None or issubclass(kind, GeneratorExit)):
                self._pass_returned()
            self._give_back()
        with suppress(*_FAILURES):
            for channel in self._channels:
                channel._consumer_infos.clear()  # cancelled or lost: pika would cancel them once more
            self._connection.close()

    def _give_back(self) -> None:
        """Have what is held go back in its order, one channel after the other.

        Nobody consumes any more by then, or would be given again what comes back first. A nack would put letters to the
        end of a quorum queue without a delivery limit (RabbitMQ, "Repeated Requeues"), so the channels are closed. The
        broker notices their ends in any order: so each is closed when what the one before held is back.
        """
        self._stop_consuming()
        back, seconds = self._count(0, 0.0), _RETURN_SECONDS
        for channel, held in zip(self._channels, self._held, strict=True):
            channel._impl.close()
            channel._flush_output(lambda one=channel: one.is_closed)
            back += held
            if held and self._count(back, seconds) < back:
                seconds = 0.0  # somebody else takes them

    def _pass_returned(self) -> None:
        """Take what earlier visits gave back, all of it: a quorum queue puts what comes back behind it, and before what
        was never given out. Who gives back a part of it would change the order."""
        self._arrived.clear()
        while self._again and self._came < self.found and self._more():
            self._arrived.clear()

    def _stop_consuming(self) -> None:
        """Cancel the consumer. What the broker has sent it stays as it is."""
        tag, self._tag = self._tag, None
        if tag is None:
            return
        cancelled: list[object] = []
        inner = self._channels[-1]._impl
        if tag not in inner.consumer_tags:
            return  # the broker has cancelled it, and pika would never call back
        inner.basic_cancel(tag, callback=cancelled.append)
        inner._cancelled.discard(tag)
        while not cancelled and inner.is_open:
            self._connection.process_data_events(time_limit=_STEP)

    @property
    def _ended(self) -> bool:
        """Whether the broker has cancelled the consumer: RabbitMQ 4.3 does so, and takes back what it holds."""
        if self._tag is None:
            return False
        inner = self._channels[-1]._impl
        return bool(inner.is_open and self._tag not in inner.consumer_tags)

    def messages(self, at_least: int = 0) -> Iterator[tuple[int, Incoming]]:
        """What waits in the queue now, oldest first: each with the number that `remove` takes.

        With `at_least`, so many are expected: an earlier visit's are on their way back.
        """
        with self._told():
            left = self.found = self._count(at_least, _BACK_SECONDS)
            self._consume()
            if not left:
                left = self.found = self._not_counted()
            while left > 0 and self._more():
                left -= 1
                self.seen += 1
                yield self._arrived.popleft()

    def _more(self) -> bool:
        """Wait for a message. False when no more come: somebody else took the rest."""
        quiet_since = time.monotonic()
        while not self._arrived or self._ended:
            self.flush()
            self._connection.process_data_events(time_limit=_STEP)
            if self._ended:
                raise BrokerUnreachable(
                    f"reading queue {self._queue!r}: the broker ended the visit. The queue was deleted, or the broker "
                    "takes back what is held for longer than its consumer_timeout, half an hour by default: then what "
                    "was not removed is back in the queue"
                )
            if self._arrived:
                break
            if self._held[-1] >= self._sizes[-1]:
                self._consume()
            elif self._is_silent(time.monotonic() - quiet_since):
                return False
        return True

    def _is_silent(self, seconds: float) -> bool:
        """Whether a queue that has given nothing for so long will give nothing more."""
        return seconds > _SLOW_SECONDS or (seconds > _IDLE_SECONDS and not self._count(0, 0.0))

    def _count(self, at_least: int, seconds: float) -> int:
        """How many wait: so many at least, unless that does not become true in this time."""
        channel = self._counting = self._counting or self._connection.channel()
        until = time.monotonic() + seconds
        while True:
            count = int(channel.queue_declare(self._queue, passive=True).method.message_count)
            if count >= at_least or time.monotonic() > until:
                return count
            self._connection.sleep(_LOOK)

    def _not_counted(self) -> int:
        """How many wait in a queue that was said to be empty."""
        until = time.monotonic() + _EMPTY_SECONDS
        while not self._arrived and time.monotonic() < until:
            self._connection.process_data_events(time_limit=_STEP)
        if not self._arrived:
            return 0
        return self._count(0, 0.0) + len(self._arrived)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """pika's errors in this project's words."""
        try:
            yield
        except AMQPError as error:
            raise self._problem(error) from error

    def _problem(self, error: AMQPError) -> ConfigError | AccessRefused | BrokerUnreachable:
        # Who writes to a channel before it has read why the broker closed it learns only that it is closed.
        reasons = [error, *(channel._closing_reason for channel in self._channels)]
        closed = next((one for one in reasons if isinstance(one, ChannelClosedByBroker)), None)
        reading = f"reading queue {self._queue!r}"
        if closed is None:
            return BrokerUnreachable(
                f"{reading}: the connection was lost ({error!r}). What was not removed is still there"
            )
        if closed.reply_code == 404:
            return ConfigError(f"there is no queue {self._queue!r}")
        if closed.reply_code == 403:
            return AccessRefused(f"{reading}: {closed.reply_text}")
        if closed.reply_code == 406 and (
            "timed out" in closed.reply_text or "unknown delivery tag" in closed.reply_text
        ):
            return BrokerUnreachable(
                f"{reading}: the broker takes back what is held for longer than its consumer_timeout, half an hour by "
                f"default ({closed.reply_text}). What was not removed is back in the queue"
            )
        return ConfigError(f"{reading}: {closed.reply_text}")

    def remove(self, number: int, incoming: Incoming) -> None:
        """Take a message out for good, with the next `flush` at the latest."""
        self._windows[number].finish(incoming.tag, None)
        self.removed += 1
        self._removed[number] = self._removed.get(number, 0) + 1
        if self._removed[number] >= _GATHERED:
            self.flush()

    def flush(self) -> None:
        """Acknowledge what was removed. When this returns the broker has read it: a visit that is killed afterwards
        gives none of it back."""
        for number, count in self._removed.items():
            window, channel = self._windows[number], self._channels[number]
            # pika's blocking channel writes to the socket, and waits for it, with each frame.
            frames = channel._impl
            with self._told():
                last = window.prefix()
                if last is not None:
                    frames.basic_ack(last, multiple=True)
                for tag in window.stragglers():
                    frames.basic_ack(tag)
                # It changes nothing, and is answered when what came before is done (AMQP 0-9-1: a channel keeps order).
                channel.basic_qos(prefetch_count=self._sizes[number])
            self._held[number] -= count
        self._removed.clear()

    def pause(self, seconds: float) -> None:
        """Wait, and keep the connection alive."""
        with self._told():
            self._connection.sleep(seconds)

    def _size(self, number: int) -> int:
        """How many messages a channel takes: the first ones tell how large they are."""
        if number == 0:
            return min(_FIRST, _PREFETCH)
        most = _PREFETCH if number < _MANY_CHANNELS else _PREFETCH_OF_MANY
        return max(min(_FEWEST, most), min(most, _PREFETCH_BYTES * self._came // max(1, self._bytes)))

    def _consume(self) -> None:
        self._stop_consuming()
        channel, number = self._connection.channel(), len(self._channels)
        size = self._size(number)
        channel.basic_qos(prefetch_count=size)
        self._channels.append(channel)
        self._sizes.append(size)
        self._held.append(0)
        self._windows.append(AckWindow(epoch=number))

        def arrived(_channel: object, method: Any, properties: Any, body: bytes) -> None:
            self._held[number] += 1
            self._came += 1
            self._bytes += len(body)
            self._again = method.redelivered
            where = (method.delivery_tag, method.redelivered, method.exchange, method.routing_key)
            self._arrived.append((number, Incoming(0, *where, properties, body)))

        self._tag = channel.basic_consume(self._queue, arrived)

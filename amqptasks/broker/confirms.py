"""The confirm pipeline: messages go out up to a window ahead, and each learns its own fate.

A message is done when the broker confirmed it (basic.ack after a return or without one), refused it (basic.nack), or
its deadline passed. What was on its way when a connection or channel was lost is sent again, with the same id: it may
arrive twice, it is not lost (RabbitMQ, "Publisher Confirms").
"""

from __future__ import annotations

import random
import re
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker

from amqptasks.broker.link import Link
from amqptasks.broker.pending import Declarer, Pending
from amqptasks.broker.wire import EncodedProperties
from amqptasks.errors import (
    AccessRefused,
    AmqpTasksError,
    BrokerBlocked,
    BrokerError,
    BrokerUnreachable,
    Nacked,
    PublishError,
    PublishTimeout,
    Unroutable,
)
from amqptasks.message import Envelope

__all__ = ["ConfirmChannel"]

_SWEEP_SECONDS = 0.05
_EXCHANGE = re.compile(r"exchange '([^']*)'")
_SIZES = re.compile(r"message size (\d+) is larger than (?:configured )?max(?:imum)? (?:allowed )?size (\d+)")


class _Flight:
    """One channel, and what is unconfirmed on it."""

    __slots__ = ("channel", "confirmed", "tag", "unconfirmed")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.tag = 0
        self.unconfirmed: dict[int, Pending] = {}
        self.confirmed = 0


class ConfirmChannel:
    """Publishes with confirms over a link. All methods belong to the loop's thread.

    Args:
        window: most messages unconfirmed at a time.
        blocked_timeout: seconds a message waits under an alarm of the broker before `BrokerBlocked`.
        declarer: declares the topology when an exchange or queue of it turns out to be missing.
    """

    def __init__(
        self, link: Link, *, window: int, blocked_timeout: float | None = None, declarer: Declarer | None = None
    ) -> None:
        self._link = link
        self._window = window
        self._blocked_timeout = blocked_timeout
        self._declarer = declarer
        self._queue: deque[Pending] = deque()
        self._flight: _Flight | None = None
        #: Channels that were replaced, and still wait for confirms.
        self._leaving: list[_Flight] = []
        self._connection: Any = None
        self._sweeping = False
        self._opening = False
        self._last_error: BrokerError | None = None
        link.watch(self._up, self._down)
        link.on_unblocked = self._pump

    def publish(
        self, envelope: Envelope, properties: EncodedProperties, done: Callable[[PublishError | None], None]
    ) -> None:
        """Publish, and try for as long as it takes; `done` is called once."""
        self.submit(Pending(envelope, properties, done))

    def submit(self, *pending: Pending) -> None:
        """Publish these in order; each one's `done` is called once."""
        self._queue.extend(pending)
        if not self._sweeping and any(one.deadline is not None for one in pending):
            self._sweeping = True
            self._link.loop.call_later(_SWEEP_SECONDS, self._sweep)
        if self._flight is None:
            self._link.connect_now()
        self._pump()

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is unconfirmed."""
        return not self._queue and not any(flight.unconfirmed for flight in self._flights())

    def _flights(self) -> list[_Flight]:
        return [*self._leaving, *([self._flight] if self._flight is not None else [])]

    # -- connection, channel --------------------------------------------------------------------------------------

    def _up(self, connection: Any) -> None:
        self._connection = connection
        self._open_channel()

    def _open_channel(self) -> None:
        connection = self._connection
        if connection is not None and connection.is_open and not self._opening:
            self._opening = True
            connection.channel(on_open_callback=self._opened)

    def _opened(self, channel: Channel) -> None:
        flight = _Flight(channel)
        channel.add_on_close_callback(lambda _channel, reason: self._closed(flight, reason))
        channel.add_on_return_callback(lambda _channel, method, props, _body: self._returned(flight, method, props))
        channel.confirm_delivery(
            ack_nack_callback=lambda frame: self._confirmed(flight, frame.method),
            callback=lambda _frame: self._use(flight),
        )

    def _use(self, flight: _Flight) -> None:
        self._opening = False
        if self._flight is not None:
            self._leaving.append(self._flight)
            self._close_when_empty(self._flight)
        self._flight = flight
        self._pump()

    def _close_when_empty(self, flight: _Flight) -> None:
        if flight in self._leaving and not flight.unconfirmed:
            self._leaving.remove(flight)
            if flight.channel.is_open:
                flight.channel.close()

    def _down(self, error: BrokerError | None) -> None:
        self._connection = None
        self._opening = False
        self._last_error = error
        for flight in self._flights():
            self._send_again(flight)
        self._leaving.clear()
        self._flight = None
        if error is None:
            return
        waiting, self._queue = self._queue, deque()
        for pending in waiting:
            # A refused password or virtual host does not heal by waiting; a node that is down may.
            if pending.deadline is not None and (isinstance(error, AccessRefused) or not pending.try_again()):
                self._fail(pending, PublishError(f"the message was not published: {error}", sent=pending.sent), error)
            else:
                self._queue.append(pending)

    def _send_again(self, flight: _Flight) -> None:
        self._queue.extendleft(reversed(flight.unconfirmed.values()))
        flight.unconfirmed = {}

    def _closed(self, flight: _Flight, reason: Exception) -> None:
        current = flight is self._flight
        if current:
            self._flight = None
        elif flight in self._leaving:
            self._leaving.remove(flight)
        if not isinstance(reason, ChannelClosedByBroker):
            self._send_again(flight)
            return
        unconfirmed, flight.unconfirmed = flight.unconfirmed, {}
        again = [pending for pending in unconfirmed.values() if not self._blamed(pending, reason)]
        self._queue.extendleft(reversed(again))
        if current:
            self._open_channel()

    def _blamed(self, pending: Pending, reason: ChannelClosedByBroker) -> bool:
        """Whether the broker closed the channel because of this message; then it is done."""
        envelope, text = pending.envelope, str(reason.reply_text)
        found, sizes = _EXCHANGE.search(text), _SIZES.search(text)
        if reason.reply_code == 404 and found is not None and found[1] == envelope.exchange:
            if self._may_declare(pending, None):
                return False
            missing = Unroutable(f"the exchange {envelope.exchange!r} does not exist ({text})")
            self._fail(pending, missing, pending.problem)
            return True
        if reason.reply_code == 403 and (found is None or found[1] == envelope.exchange):
            cause = AccessRefused(text)
            self._fail(pending, PublishError(f"the broker refused to publish to {envelope.exchange!r}: {text}"), cause)
            return True
        if sizes is not None and len(envelope.body) > int(sizes[2]):
            size = f"the message has {len(envelope.body)} bytes; the broker's limit is {sizes[2]}"
            self._fail(pending, PublishError(f"{size} (max_message_size)"))
            return True
        if not pending.try_again():
            self._fail(pending, PublishError(f"the broker closed the channel: {text}", sent=True))
            return True
        return False

    # -- out ------------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        flight = self._flight
        if flight is None or self._link.blocked_since is not None or not flight.channel.is_open:
            return
        queue, unconfirmed, window = self._queue, flight.unconfirmed, self._window
        publish = flight.channel.basic_publish
        while queue and len(unconfirmed) < window:
            pending = queue.popleft()
            if pending.done is None:
                continue
            envelope = pending.envelope
            flight.tag += 1
            pending.sent, pending.returned = True, None
            unconfirmed[flight.tag] = pending
            publish(envelope.exchange, envelope.routing_key, envelope.body, pending.properties, envelope.mandatory)
            if flight.channel.is_open is False:
                return

    # -- in -------------------------------------------------------------------------------------------------------

    def _confirmed(self, flight: _Flight, method: Any) -> None:
        unconfirmed, tag = flight.unconfirmed, method.delivery_tag
        if method.multiple:
            tags = [one for one in unconfirmed if one <= tag]
            done = [unconfirmed.pop(one) for one in tags]
        else:
            pending = unconfirmed.pop(tag, None)
            done = [pending] if pending is not None else []
        if method.NAME == "Basic.Nack":
            self._nacked(flight, done)
        else:
            flight.confirmed += len(done)
            for pending in done:
                if pending.returned is None:
                    self._finish(pending, None)
                else:
                    self._unroutable(pending)
        self._pump()
        if self._leaving:
            self._close_when_empty(flight)

    def _returned(self, flight: _Flight, method: Any, properties: Any) -> None:
        # basic.return comes before the ack of its message. Of several with one id it is the earliest not yet returned.
        for pending in flight.unconfirmed.values():
            envelope = pending.envelope
            if (
                pending.returned is None
                and envelope.correlation_id == properties.correlation_id
                and envelope.message_id == properties.message_id
                and envelope.routing_key == method.routing_key
                and envelope.exchange == method.exchange
            ):
                pending.returned = str(method.reply_text)
                return

    def _unroutable(self, pending: Pending) -> None:
        envelope = pending.envelope
        if self._may_declare(pending, envelope.routing_key):
            self._queue.append(pending)
            return
        self._fail(
            pending,
            Unroutable(
                f"no queue takes exchange {envelope.exchange!r} with routing key {envelope.routing_key!r} "
                f"({pending.returned}). Is the queue declared? `amqptasks routes test <task>` shows the route"
            ),
            pending.problem,
        )

    def _may_declare(self, pending: Pending, routing_key: str | None) -> bool:
        """Declare what is missing and belongs to the topology, once per message and cause."""
        cause = (pending.envelope.exchange, routing_key)
        if self._declarer is None or pending.declared == cause:
            return False
        pending.declared = cause
        try:
            return self._declarer(*cause)
        except AmqpTasksError as error:
            pending.problem = error
            return False

    def _nacked(self, flight: _Flight, nacked: list[Pending]) -> None:
        if flight is self._flight and flight.confirmed == 0 and nacked:
            # A channel whose first publish fell into a leader election of a quorum queue is nacked for ever
            # (RabbitMQ 3.10); on a new one the same message passes.
            self._open_channel()
        for pending in nacked:
            envelope = pending.envelope
            if pending.try_again():
                pause = pending.pause() * random.uniform(0.5, 1.0)
                self._link.loop.call_later(pause, lambda one=pending: self._resubmit(one))
            else:
                self._fail(
                    pending,
                    Nacked(
                        f"the broker refused the message for exchange {envelope.exchange!r}, routing key "
                        f"{envelope.routing_key!r} (basic.nack): the queue is full (max_length), or has no quorum"
                    ),
                )

    def _resubmit(self, pending: Pending) -> None:
        if pending.done is not None:
            self._queue.append(pending)
            self._pump()

    # -- done -----------------------------------------------------------------------------------------------------

    def _finish(self, pending: Pending, error: PublishError | None) -> None:
        done, pending.done = pending.done, None
        if done is not None:
            done(error)

    def _fail(self, pending: Pending, error: PublishError, cause: BaseException | None = None) -> None:
        if cause is not None:
            error.__cause__ = cause
        self._finish(pending, error)

    def _sweep(self) -> None:
        """Fail what is past its deadline, or waits under an alarm for too long."""
        now = time.monotonic()
        blocked = self._link.blocked_since
        waiting = False
        for pending in [*self._queue, *(one for flight in self._flights() for one in flight.unconfirmed.values())]:
            if pending.done is None or pending.deadline is None:
                continue
            waiting = True
            if (
                blocked is not None
                and self._blocked_timeout is not None
                and now - max(blocked, pending.since) > self._blocked_timeout
            ):
                self._fail(
                    pending,
                    BrokerBlocked(
                        "the broker takes no messages (a memory or disk alarm): see `rabbitmq-diagnostics alarms`",
                        sent=pending.sent,
                    ),
                )
            elif now > pending.deadline:
                self._fail(pending, self._late(pending))
        while self._queue and self._queue[0].done is None:
            self._queue.popleft()
        self._sweeping = waiting
        if waiting:
            self._link.loop.call_later(_SWEEP_SECONDS, self._sweep)

    def _late(self, pending: Pending) -> PublishError:
        if self._link.blocked_since is not None:
            return BrokerBlocked("the broker takes no messages (a memory or disk alarm)", sent=pending.sent)
        if pending.sent:
            return PublishTimeout(
                "the broker did not confirm the message in time; it may or may not have been taken", sent=True
            )
        cause = self._last_error or BrokerUnreachable("no node of the broker answered in time")
        error = PublishTimeout(f"the message was not published in time: {cause}")
        error.__cause__ = cause
        return error

"""The confirm pipeline: messages go out up to a window ahead, and each learns its own fate.

A message is done when the broker confirmed it (basic.ack after a return or without one), refused it (basic.nack), or
its deadline passed. What was on its way when a connection or channel was lost is sent again, with the same id: it may
arrive twice, it is not lost (RabbitMQ, "Publisher Confirms").
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker

from amqptasks.broker import verdicts
from amqptasks.broker.deadlines import Deadlines
from amqptasks.broker.declarer import DELETED_PAUSE, TopologyDeclarer
from amqptasks.broker.flight import Flight
from amqptasks.broker.link import Link
from amqptasks.broker.pending import REPLY, Pending
from amqptasks.broker.silence import Silence
from amqptasks.broker.wire import EncodedProperties
from amqptasks.errors import AccessRefused, AmqpTasksError, BrokerError, PublishError, Unroutable
from amqptasks.message import Envelope

__all__ = ["ConfirmChannel"]

#: At most so often a refused message brings a new channel.
_RENEW_SECONDS = 0.5


class ConfirmChannel:
    """Publishes with confirms over a link. All methods belong to the loop's thread.

    Args:
        window: most messages unconfirmed at a time.
        blocked_timeout: seconds a message waits under an alarm of the broker before `BrokerBlocked`.
        declarer: declares the topology when an exchange or queue of it turns out to be missing.
        prepare: called with each new connection and what to call when messages may be published on it.
    """

    def __init__(
        self,
        link: Link,
        *,
        window: int,
        blocked_timeout: float | None = None,
        declarer: TopologyDeclarer | None = None,
        prepare: Callable[[Any, Callable[[], None]], None] | None = None,
    ) -> None:
        self._link = link
        self._window = window
        self._declarer = declarer
        self._prepare = prepare
        self._queue: deque[Pending] = deque()
        self._flight: Flight | None = None
        #: Channels that were replaced, and still wait for confirms.
        self._leaving: list[Flight] = []
        self._connection: Any = None
        self._opening = False
        #: A channel that is open, and waits for confirm.select-ok.
        self._fresh: Flight | None = None
        self._renewed_at = 0.0
        #: So many at the head of the queue go one by one: with one of them the broker closed the channel.
        self._suspects = 0
        #: Refused messages between two attempts, each with what it was told.
        self._resting: dict[Pending, PublishError] = {}
        #: Messages that wait for the topology to be declared, each with what it was told.
        self._declaring: dict[Pending, Unroutable] = {}
        #: When a waiting message counts its next failed connection: attempts that others ask for cost it nothing.
        self._next_count: dict[Pending, float] = {}
        self._deadlines = Deadlines(
            link.loop,
            blocked_timeout=math.inf if blocked_timeout is None else blocked_timeout,
            blocked_since=lambda: link.blocked_since,
            waiting=self.waiting,
            expire=self._expire,
            swept=self._swept,
        )
        self._silence = Silence(
            link.loop,
            flights=self._flights,
            opening=lambda: self._connection is not None and self._flight is None,
            blocked=lambda: link.blocked_since is not None,
            again=self._sent_for_nothing,
            leave=link.give_up,
        )
        self._last_error: BrokerError | None = None
        self.observe: Callable[[list[Pending], bool], None] | None = None
        link.watch(self._up, self._down)
        link.on_blocked = self._deadlines.plan_blocked
        link.on_unblocked = self._pump

    def publish(
        self, envelope: Envelope, properties: EncodedProperties, done: Callable[[PublishError | None], None]
    ) -> None:
        """Publish, and try for as long as it takes (a reply that is refused: four times); `done` is called once."""
        self.submit(Pending(envelope, properties, done, policy=REPLY if envelope.is_reply else None))

    def submit(self, *pending: Pending) -> None:
        """Publish these in order; each one's `done` is called once."""
        self._queue.extend(pending)
        for one in pending:
            if one.deadline is not None and one.deadline < self._deadlines.due:
                self._deadlines.plan(one.deadline)
        if self._flight is None:
            self._link.connect_within(0.0)
        elif self._link.blocked_since is not None:
            self._deadlines.plan_blocked()
        self._pump()

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is unconfirmed."""
        return all(one.done is None for one in self.waiting())

    @property
    def full(self) -> bool:
        """Whether as many wait to be sent as may be unconfirmed."""
        return len(self._queue) >= self._window

    def fail_all(self, reason: str, *others: Pending) -> None:
        """Nothing more will be published: say so to everybody who waits, and to these others."""
        for pending in [*self.waiting(), *others]:
            text = "the message may or may not have been taken" if pending.sent else "the message was not published"
            self._finish(pending, PublishError(f"{text}: {reason}", sent=pending.sent))

    def _flights(self) -> list[Flight]:
        return [*self._leaving, *([self._flight] if self._flight is not None else [])]

    def waiting(self) -> Iterator[Pending]:
        """All that is not confirmed yet."""
        for flight in self._flights():
            yield from flight.unconfirmed.values()
        yield from self._resting
        yield from self._declaring
        yield from self._queue

    # -- connection, channel --------------------------------------------------------------------------------------

    def _up(self, connection: Any) -> None:
        self._connection = connection
        self._silence.begin()
        self._next_count.clear()
        self._opening = False
        if self._prepare is None:
            self._open_channel()
        else:
            self._prepare(connection, self._open_channel)

    def _open_channel(self) -> None:
        connection = self._connection
        if connection is not None and connection.is_open and not self._opening:
            self._opening = True
            connection.channel(on_open_callback=self._opened)

    def _opened(self, channel: Channel) -> None:
        self._fresh = flight = Flight(channel)
        confirms = channel.connection.inflow.confirms
        confirms[channel.channel_number] = lambda tag, multiple: self._confirmed(flight, tag, multiple)
        channel.add_on_close_callback(lambda _channel, reason: self._closed(flight, reason))
        channel.add_on_return_callback(lambda _channel, method, props, _body: flight.returned(method, props))
        channel.confirm_delivery(
            ack_nack_callback=lambda frame: self._answered(flight, frame.method),
            callback=lambda _frame: self._use(flight),
        )

    def _use(self, flight: Flight) -> None:
        self._opening, self._fresh = False, None
        if self._flight is not None:
            self._leaving.append(self._flight)
            self._close_when_empty(self._flight)
        self._flight = flight
        self._pump()

    def _close_when_empty(self, flight: Flight) -> None:
        if flight in self._leaving and not flight.unconfirmed:
            self._leaving.remove(flight)
            if flight.channel.is_open:
                flight.channel.close()

    def _down(self, error: BrokerError | None) -> None:
        self._connection = None
        self._opening, self._fresh = False, None
        self._last_error = error
        # Once each: a message may be on its way on two channels.
        self._send_again(list(dict.fromkeys(one for flight in self._flights() for one in flight.unconfirmed.values())))
        for flight in self._flights():
            flight.unconfirmed = {}
        self._leaving.clear()
        self._flight = None
        if error is None:
            return
        now = time.monotonic()
        counted, self._next_count = self._next_count, {}
        waiting, self._queue = self._queue, deque()
        self._queue.extend(one for one in waiting if self._goes_on(one, error, now, counted))
        if self._next_count:
            self._link.connect_within(min(self._next_count.values()) - now)

    def _goes_on(self, pending: Pending, error: BrokerError, now: float, counted: dict[Pending, float]) -> bool:
        """Whether a message waits for another connection; else it has failed."""
        if pending.done is None:
            return False
        if pending.deadline is None:
            return True
        once = pending.sent and pending.policy is not None and pending.policy.max_retries == 0
        # A refused password or virtual host does not heal by waiting; a node that is down may.
        if not isinstance(error, AccessRefused):
            if not (self._link.round_over or once):
                return True
            due = counted.get(pending, 0.0)
            if due > now or pending.try_again():
                self._next_count[pending] = due if due > now else now + pending.pause()
                return True
        self._finish(pending, verdicts.lost(error, sent=pending.sent))
        return False

    def _send_again(self, again: Any) -> None:
        self._queue.extendleft(reversed([pending for pending in again if pending.done is not None]))

    def _sent_for_nothing(self, again: list[Pending], renew: bool) -> None:
        self._send_again(again)
        if renew and self._flight is not None:
            self._leaving.append(self._flight)
            self._flight = None
            self._open_channel()
        self._pump()

    def _closed(self, flight: Flight, reason: Exception) -> None:
        flight.channel.connection.inflow.forget(flight.channel.channel_number)
        unconfirmed, flight.unconfirmed = flight.unconfirmed, {}
        current = flight is self._flight
        if current:
            self._flight = None
        elif flight in self._leaving:
            self._leaving.remove(flight)
        if not isinstance(reason, ChannelClosedByBroker):
            self._send_again(unconfirmed.values())
            return
        self._find_culprit([one for one in unconfirmed.values() if one.done is not None], reason)
        if current:
            self._silence.begin()
            self._open_channel()
        elif flight is self._fresh:  # closed before it could be used
            self._opening, self._fresh = False, None
            self._link.loop.call_later(_RENEW_SECONDS, self._open_channel)

    def _find_culprit(self, unconfirmed: list[Pending], reason: ChannelClosedByBroker) -> None:
        """Fail the message that made the broker close the channel; send the others again.

        The broker does not always name it. Then they go one by one, until one of them is alone when it happens again.
        """
        code, text = reason.reply_code, str(reason.reply_text)
        again = []
        for pending in unconfirmed:
            error = verdicts.blame(pending.envelope, code, text)
            if isinstance(error, Unroutable):
                self._missing(pending, None, error)
            elif error is not None:
                self._finish(pending, error)
            elif len(unconfirmed) > 1:
                again.append(pending)
            elif verdicts.is_about_a_message(code):
                self._finish(pending, verdicts.refused(pending.envelope, text))
            elif pending.try_again():
                again.append(pending)
            else:
                self._finish(pending, PublishError(f"the broker closed the channel: {text}", sent=True))
        if len(again) == len(unconfirmed) > 1:
            self._suspects = max(self._suspects, len(again))
        self._send_again(again)

    # -- out ------------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        flight = self._flight
        if flight is None or self._link.blocked_since is not None or not flight.channel.is_open:
            return
        queue, unconfirmed, window = self._queue, flight.unconfirmed, self._window
        if flight.alone:
            if unconfirmed:
                return
            flight.alone = False
        if self._suspects:
            window = 1
        while queue and len(unconfirmed) < window:
            pending = queue.popleft()
            if self._suspects:
                self._suspects -= 1
                flight.alone = True
            if pending.done is None:
                continue
            if not unconfirmed:
                self._silence.begin()
            try:
                flight.add(pending)
            except PublishError as error:
                self._finish(pending, error)
        flight.write()

    # -- in -------------------------------------------------------------------------------------------------------

    def _answered(self, flight: Flight, method: Any) -> None:
        self._confirmed(flight, method.delivery_tag, method.multiple, refused=method.NAME == "Basic.Nack")

    def _confirmed(self, flight: Flight, tag: int, multiple: bool, *, refused: bool = False) -> None:
        self._silence.heard_at = time.monotonic()
        done = flight.settled(tag, multiple)
        if self.observe is not None:
            self.observe(done, refused)
        if refused:
            self._nacked(flight, done)
        else:
            for pending in done:
                if pending.returned is None:
                    self._finish(pending, None)
                else:
                    envelope = pending.envelope
                    self._missing(pending, envelope.routing_key, verdicts.unroutable(envelope, pending.returned))
        self._pump()
        if self._leaving:
            self._close_when_empty(flight)

    def _missing(self, pending: Pending, routing_key: str | None, error: Unroutable) -> None:
        """Exchange or queue is not there: declare it when it belongs to the topology, once per message and cause."""
        cause = (pending.envelope.exchange, routing_key)
        declarer = self._declarer
        if pending.done is None or declarer is None or pending.declared == cause or not declarer.knows(*cause):
            self._finish(pending, _because(error, pending.problem))
            return
        pending.declared = cause
        running = bool(self._declaring)
        self._declaring[pending] = error
        if not running:
            declarer.declare(self._declared, pause=0.0 if routing_key is None else DELETED_PAUSE)

    def _declared(self, problem: AmqpTasksError | None) -> None:
        waiting, self._declaring = self._declaring, {}
        if problem is None:
            self._send_again(list(waiting))
            self._pump()
            return
        for pending, error in waiting.items():
            self._finish(pending, _because(error, problem))

    def _nacked(self, flight: Flight, nacked: list[Pending]) -> None:
        now = time.monotonic()
        if flight is self._flight and nacked and now - self._renewed_at > _RENEW_SECONDS:
            # A channel whose first message for a quorum queue fell into the election of its leader is nacked for ever
            # (RabbitMQ 3.10); on a new one the same message passes.
            self._renewed_at = now
            self._open_channel()
        for pending in nacked:
            error = verdicts.nacked(pending.envelope)
            if pending.done is not None and pending.try_again():
                pause = pending.pause() * random.uniform(0.5, 1.0)
                self._resting[pending] = error
                self._link.loop.call_later(pause, lambda one=pending: self._resubmit(one))
            else:
                self._finish(pending, error)

    def _resubmit(self, pending: Pending) -> None:
        if self._resting.pop(pending, None) is not None and pending.done is not None:
            self._queue.append(pending)
            self._pump()

    def _finish(self, pending: Pending, error: PublishError | None) -> None:
        done, pending.done = pending.done, None
        if done is not None:
            done(error)

    # -- deadlines ------------------------------------------------------------------------------------------------

    def _expire(self, pending: Pending) -> None:
        if self._link.blocked_since is not None:
            error: PublishError = verdicts.blocked(sent=pending.sent)
        else:
            known = self._resting.get(pending) or self._declaring.get(pending)
            error = verdicts.late(self._link.node, self._last_error, sent=pending.sent) if known is None else known
        self._finish(pending, error)

    def _swept(self, expired: int) -> None:
        while self._queue and self._queue[0].done is None:
            self._queue.popleft()
        self._next_count = {one: due for one, due in self._next_count.items() if one.done is not None}
        if expired and self._connection is not None and self._link.blocked_since is None:
            self._silence.deadlines_passed()


def _because(error: PublishError, cause: BaseException | None) -> PublishError:
    if cause is not None:
        error.__cause__ = cause
    return error

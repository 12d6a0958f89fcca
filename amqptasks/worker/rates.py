"""Rate limits: what has not had its turn waits in a queue of its task's own, in the broker.

A leader moves a message of a limited task to its rate queue, where it waits with those of the whole cluster, in order.
One consumer of that queue is active (``x-single-active-consumer``); it sends one message an interval back to the queue
it came from, with a mark that says that its turn has come. Each step is published, confirmed, and only then
acknowledged. When the active consumer dies, the broker activates the next one.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Container
from typing import Any

import structlog

from amqptasks.broker.consumer import Consumer, Incoming
from amqptasks.errors import PublishError, Unroutable
from amqptasks.message import Envelope
from amqptasks.protocol.revokes import Revocable, is_revoked
from amqptasks.worker.delivery import HOME_HEADER, PASSED_HEADER, TURN_HEADER
from amqptasks.worker.effects import copy_message

__all__ = ["RateQueue"]

_RETRY_FIRST, _RETRY_MAX = 0.5, 30.0
#: A queue that nobody routes to after pauses of so many seconds does not come back.
_GIVE_UP_HOME = 3.0
#: A routing key's bytes (AMQP 0-9-1, short string).
_LONGEST_KEY = 255
_REOPEN_SECONDS = 1.0
#: What timers were late, up to so many seconds, is caught up with: else a rate would never quite be reached. It is half
#: of what `10/s` has between two turns: starts, which come after their turns, are eleven in a second at most, too.
_SLACK = 0.05
#: The shortest timer: high rates let several pass at once.
_TIMER = 0.005
#: Another consumer was active before, and may have let one pass just now: wait an interval, but not for hours.
_LONGEST_HANDOVER = 60.0
#: Held unacknowledged: half a second's worth.
_LEAST_PREFETCH, _MOST_PREFETCH, _HELD_SECONDS = 2, 500, 0.5
#: What is held for so long is given back and taken again: RabbitMQ closes channels that hold a message for 30 minutes.
_HOLD_SECONDS = 600.0
_REMEMBERED = 10_000
_log = structlog.get_logger("amqptasks.worker")


class _Moving:
    """A message that is on its way home, by the delivery that will be acknowledged for it."""

    __slots__ = ("epoch", "tag")

    def __init__(self, incoming: Incoming) -> None:
        self.tag, self.epoch = incoming.tag, incoming.epoch


class RateQueue:
    """The messages of one task that wait for their turn. Belongs to a leader's loop.

    Args:
        queue: its name.
        exchange: leads home, by a queue's name.
        home: where a message goes that does not say where it came from.
        rate: messages a second; 0 lets all pass.
        revoked: what will not run, and needs no turn.
        publish: publishes an envelope and calls back with None when it is confirmed, or with the error.
        missing: called with what to do when the queue stands; it makes it.
    """

    def __init__(
        self,
        queue: str,
        exchange: str,
        home: str,
        rate: float,
        *,
        revoked: Container[Revocable],
        publish: Callable[[Envelope, Callable[[PublishError | None], None]], None],
        call_later: Callable[[float, Callable[[], None]], Any],
        missing: Callable[[Callable[[], None]], None],
    ) -> None:
        self.queue = queue
        self._exchange = exchange
        self._home = home
        self.rate = rate
        self._revoked = revoked
        self._publish = publish
        self._call_later = call_later
        self._missing = missing
        self._connection: Any = None
        self._stopped = False
        self._held: deque[Incoming] = deque()
        self._held_since = 0.0
        self._moving: dict[object, _Moving] = {}
        #: Moved and confirmed, but their channel was lost before the acknowledgement.
        self._moved: OrderedDict[object, None] = OrderedDict()
        #: `time.monotonic` from which the next one may pass.
        self._next = 0.0
        self._epoch = -1
        self._timer_due = 0.0
        self._consumer = Consumer(
            queue, _prefetch(rate), on_message=self._message, on_ready=lambda: None, on_lost=self._lost
        )

    # -- life -----------------------------------------------------------------------------------------------------

    def up(self, connection: Any) -> None:
        """Consume on this connection."""
        self._connection = connection
        if not self._stopped:
            self._consumer.open(connection)

    def down(self, reason: str) -> None:
        """The connection is gone."""
        self._connection = None
        self._consumer.connection_lost(reason)

    def stop(self) -> None:
        """Leave what waits to the next consumer, at once."""
        self._stopped = True
        self._consumer.stop(self._give_back)

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._moving

    def set_rate(self, rate: float) -> None:
        """Another rate from now on, in messages a second; 0 lets all pass."""
        self.rate = rate
        if rate:
            self._next = min(self._next, time.monotonic() + 1 / rate)
        prefetch = _prefetch(rate)
        if prefetch == self._consumer.prefetch:
            self._pump()
        elif self._consumer.consuming:
            # The prefetch of a consumer cannot change. What it held goes to whoever is active next.
            self._consumer.pause(lambda: self._resume(prefetch))
        else:
            self._consumer.prefetch = prefetch

    def _resume(self, prefetch: int) -> None:
        self._give_back()
        self._epoch = -1
        self._consumer.prefetch = prefetch
        if not self._stopped:
            self._consumer.resume()

    def _give_back(self) -> None:
        while self._held:
            incoming = self._held.popleft()
            self._consumer.send_requeue(incoming.tag, incoming.epoch)

    def _lost(self, reason: str, missing: bool) -> None:
        self._held.clear()
        if self._connection is None or self._stopped:
            return
        if missing:
            self._missing(self._reopen)
        else:
            self._call_later(_REOPEN_SECONDS, lambda: self._open_again(reason))

    def _open_again(self, reason: str) -> None:
        if self._connection is not None and not self._stopped and not self._consumer.is_open:
            _log.warning("Rate queue lost; trying again", queue=self.queue, reason=reason)
            self._reopen()

    def _reopen(self) -> None:
        if self._connection is not None and not self._stopped:
            self._consumer.open(self._connection)

    # -- one after the other --------------------------------------------------------------------------------------

    def _message(self, incoming: Incoming) -> None:
        if incoming.redelivered:
            key = _turn(incoming)
            moving = self._moving.get(key)
            if moving is not None:
                moving.tag, moving.epoch = incoming.tag, incoming.epoch
                return
            if key in self._moved:
                del self._moved[key]
                self._consumer.send_ack(incoming.tag, incoming.epoch, multiple=False)
                return
            if incoming.epoch != self._epoch and self.rate:
                pause = min(1 / self.rate, _LONGEST_HANDOVER)
                self._next = max(self._next, time.monotonic() + pause)
        self._epoch = incoming.epoch
        if not self._held:
            self._held_since = time.monotonic()
        self._held.append(incoming)
        if self._stopped:
            self._give_back()
        else:
            self._pump()

    def _pump(self) -> None:
        held = self._held
        while held:
            now = time.monotonic()
            incoming = held[0]
            if self.rate and not is_revoked(incoming.properties.headers or {}, self._revoked):
                if now < self._next:
                    self._wait(now)
                    return
                self._next = max(self._next, now - _SLACK) + 1 / self.rate
            held.popleft()
            self._held_since = now
            self._move(incoming)

    def _wait(self, now: float) -> None:
        if now - self._held_since > _HOLD_SECONDS:
            self._held_since = now
            self._give_back()
            return
        due = min(self._next, self._held_since + _HOLD_SECONDS + 1.0)
        if now < self._timer_due <= due:
            return  # a timer is on, and will look again
        pause = max(due - now, _TIMER)
        self._timer_due = now + pause
        self._call_later(pause, self._timer)

    def _timer(self) -> None:
        self._timer_due = 0.0
        self._pump()

    def _move(self, incoming: Incoming) -> None:
        home = (incoming.properties.headers or {}).get(HOME_HEADER)
        if not isinstance(home, str) or len(home.encode()) > _LONGEST_KEY:
            home = self._home
        changed = {HOME_HEADER: None, TURN_HEADER: None, PASSED_HEADER: int(time.time() * 1000)}
        envelope = copy_message(incoming, self._exchange, home, changed)
        key = _turn(incoming)
        moving = _Moving(incoming)
        self._moving[key] = moving
        self._attempt(key, moving, envelope, _RETRY_FIRST)

    def _attempt(self, key: object, moving: _Moving, envelope: Envelope, pause: float) -> None:
        def done(error: PublishError | None) -> None:
            if error is None:
                self._done(key, moving)
                return
            _log.error(
                "A task whose turn has come cannot go back to its queue; trying again",
                queue=envelope.routing_key,
                task_id=envelope.correlation_id,
                error=str(error),
            )
            if isinstance(error, Unroutable) and pause > _GIVE_UP_HOME:
                # It is gone, or was never there: the task is to run, and the others must not wait behind it.
                envelope.routing_key = self._home
            self._call_later(pause, lambda: self._attempt(key, moving, envelope, min(pause * 2, _RETRY_MAX)))

        self._publish(envelope, done)

    def _done(self, key: object, moving: _Moving) -> None:
        if self._moving.get(key) is moving:
            del self._moving[key]
        if moving.epoch == self._consumer.epoch:
            self._consumer.send_ack(moving.tag, moving.epoch, multiple=False)
            return
        # The broker has taken it back, and delivers it once more, here or elsewhere.
        self._moved[key] = None
        if len(self._moved) > _REMEMBERED:
            self._moved.popitem(last=False)


def _prefetch(rate: float) -> int:
    return max(_LEAST_PREFETCH, min(_MOST_PREFETCH, math.ceil(rate * _HELD_SECONDS))) if rate else _MOST_PREFETCH


def _turn(incoming: Incoming) -> object:
    """What names this wait of this message; something that is like nothing else where a stranger sent it."""
    turn = (incoming.properties.headers or {}).get(TURN_HEADER)
    return turn if isinstance(turn, str) and turn else object()

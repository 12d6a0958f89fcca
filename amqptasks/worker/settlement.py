"""Settlement: the one place that acknowledges.

An outcome's message is published and confirmed first, then the delivery is acknowledged. If this process dies in
between, the broker delivers the message again: a duplicate at worst, never a loss. A publish that fails is tried
again in place, for as long as it takes; the delivery stays unacknowledged meanwhile, and prefetch bounds how many do.

What never will be taken (too large, not to be written, for a queue that nobody declares) fails its task instead, and a
dead letter that cannot be written is made smaller until it can: nothing that came in, and nothing that a task asks for,
pins its message or ends the leader.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import structlog

from amqptasks.broker.acks import AckWindow
from amqptasks.errors import MessageTooLarge, Nacked, PublishError, Unroutable, Unwritable
from amqptasks.message import Envelope
from amqptasks.outcome import Discarded, Failed, GivenBack, Outcome, RateLimited, Reason
from amqptasks.protocol.task import PUBLISHED_HEADER
from amqptasks.worker.delivery import Delivery, Key, Stage, key_of
from amqptasks.worker.effects import SMALLEST, Effects
from amqptasks.worker.tally import Tally

__all__ = ["UNROUTABLE_TRIES", "Acknowledger", "Settlement"]

_STRAGGLER_SECONDS = 0.02
_RETRY_FIRST, _RETRY_MAX = 0.5, 30.0
#: What belongs to the topology and is missing is declared meanwhile, which takes a moment: an exchange that stands, and
#: is not bound yet, would hand the message to its alternate exchange.
_RETRY_DECLARED = 5.0
#: A queue that the topology does not know, and nobody has made after so many tries (4 to 8 s), is a mistake.
UNROUTABLE_TRIES = 4
#: Outcomes of deliveries whose channel was lost before they could be settled, by message.
_REMEMBERED = 50_000
#: So many acknowledgements may be on their way when a channel is lost: the most that `prefetch: auto` asks for.
_ON_THE_WAY = 1024
#: The broker gives a message out again within seconds. What was sent anew much later, and looks the same, is not it.
_REMEMBERED_SECONDS = 600.0

_log = structlog.get_logger("amqptasks.worker")


class Acknowledger(Protocol):
    """The consumer, as settlement uses it."""

    epoch: int

    def send_ack(self, tag: int, epoch: int, *, multiple: bool) -> None:
        """basic.ack"""

    def send_requeue(self, tag: int, epoch: int) -> None:
        """basic.nack with requeue"""


class Settlement:
    """Publishes effects, then acknowledges. Belongs to the leader's loop.

    Args:
        publish: publishes an envelope and calls back with None when it is confirmed, or with the error.
        call_later: the loop's timer.
        tally: counts what is settled.
        on_refused: called with what a task's outcome becomes when a message of it cannot be published, now or later.
        declared: whether exchange and routing key belong to the topology, so that what is missing comes back.
        on_settled: called with each delivery, what became of it, and its run time in seconds.
    """

    def __init__(
        self,
        consumer: Acknowledger,
        effects: Effects,
        *,
        publish: Callable[[Envelope, Callable[[PublishError | None], None]], None],
        call_later: Callable[[float, Callable[[], None]], Any],
        on_refused: Callable[[Delivery, Failed], None],
        declared: Callable[[str, str], bool],
        tally: Tally | None = None,
        on_settled: Callable[[Delivery, Outcome, float], None] = lambda *_what: None,
    ) -> None:
        self._on_refused = on_refused
        self._declared = declared
        self._on_settled = on_settled
        self._consumer = consumer
        self._effects = effects
        self._publish = publish
        self._call_later = call_later
        self._window: AckWindow[Delivery] = AckWindow(consumer.epoch)
        self._flush_planned = False
        self._stragglers_planned = False
        #: Deliveries whose effects are not confirmed yet.
        self.settling: set[Delivery] = set()
        #: Headers of what was acknowledged last: the broker may not have heard of it when the channel is lost.
        self._acknowledged: deque[Mapping[str, Any] | None] = deque(maxlen=_ON_THE_WAY)
        #: Each with when it was.
        self._remembered: OrderedDict[Key, tuple[float, Outcome]] = OrderedDict()
        self.tally = tally or Tally()

    # -- the ways in ----------------------------------------------------------------------------------------------

    def settle(self, delivery: Delivery, outcome: Outcome, runtime: float = 0.0, *, known: bool = False) -> None:
        """Make the outcome durable, then settle the delivery.

        `runtime`: seconds; 0 for what did not run. `known`: the outcome was settled for an earlier delivery of it.
        """
        if delivery.stage in (Stage.SETTLING, Stage.SETTLED):
            return
        if not known:
            self.tally.settled(delivery, outcome, runtime)
            self._on_settled(delivery, outcome, runtime)
        if delivery.epoch != self._consumer.epoch and not isinstance(outcome, GivenBack):
            # The broker has taken the message back, and gives it to somebody again. If that is this worker, the task
            # need not run a second time; nothing is published twice.
            delivery.stage = Stage.SETTLED
            self._remember(delivery.key, outcome)
            return
        if isinstance(outcome, GivenBack):
            self._give_back(delivery)
            return
        try:
            envelopes = self._effects.envelopes(delivery, outcome)
        except Exception as error:
            self._cannot_make(delivery, outcome, error)
            return
        if not envelopes:
            self._finish(delivery)
            return
        delivery.last = [one for one in envelopes if one.last]
        if delivery.last:
            envelopes = [one for one in envelopes if not one.last]
        self._send(delivery, outcome, envelopes)

    def remembered(self, delivery: Delivery) -> Outcome | None:
        """The outcome of a redelivered message whose task has ended here already, not long ago."""
        self._current_window()
        oldest = time.monotonic() - _REMEMBERED_SECONDS
        while self._remembered and next(iter(self._remembered.values()))[0] < oldest:
            self._remembered.popitem(last=False)
        found = self._remembered.pop(delivery.key, None) if delivery.incoming.redelivered else None
        return None if found is None else found[1]

    def _send(self, delivery: Delivery, outcome: Outcome, envelopes: Sequence[Envelope]) -> None:
        if not envelopes:
            envelopes, delivery.last = delivery.last, ()
        delivery.stage = Stage.SETTLING
        self.settling.add(delivery)
        delivery.unconfirmed = len(envelopes)
        for envelope in envelopes:
            self._attempt(delivery, outcome, envelope)

    # -- publish, confirm -----------------------------------------------------------------------------------------

    def _attempt(self, delivery: Delivery, outcome: Outcome, envelope: Envelope, tries: int = 0, cut: int = 0) -> None:
        def done(error: PublishError | None) -> None:
            if error is None or self._give_up(delivery, outcome, envelope, tries, cut, error):
                delivery.unconfirmed -= 1
                if delivery.unconfirmed == 0:
                    self.settling.discard(delivery)
                    self._confirmed(delivery, outcome)

        self._publish(envelope, done)

    def _give_up(
        self, delivery: Delivery, outcome: Outcome, envelope: Envelope, tries: int, cut: int, error: PublishError
    ) -> bool:
        """Whether a message that was not taken is done with; else it, or a smaller one, is tried again."""
        if isinstance(outcome, Failed) and all(envelope is not one for one in outcome.messages):
            # Its dead letter: there is nowhere else to go with it.
            smaller = self._effects.smaller(delivery, outcome, cut + 1) if cut < SMALLEST else None
            if isinstance(error, Unwritable) and smaller is not None:
                self._say("A dead letter cannot be written; it is made smaller", envelope, error)
                self._attempt(delivery, outcome, smaller, tries, cut + 1)
                return False
        elif self._is_final(outcome, envelope, tries, error):
            if delivery.verdict is None and (isinstance(error, MessageTooLarge) or not isinstance(outcome, Failed)):
                # When the others are confirmed, the task fails for it.
                delivery.refused = error
            else:
                self._say("What follows a task that failed cannot be sent; dropped", envelope, error)
            return True
        if isinstance(error, Nacked) and envelope.is_reply:
            # A reply to a queue whose node is down. Nobody consumes it there, and its caller was told.
            _log.warning("Reply dropped: its queue refuses it", task_id=envelope.correlation_id, error=str(error))
            return True
        delay = min(_RETRY_FIRST * 2 ** min(tries, 10), _RETRY_MAX)
        if isinstance(error, Unroutable) and self._declared(envelope.exchange, envelope.routing_key):
            delay = max(delay, _RETRY_DECLARED)
        self._say("The outcome of a task cannot be published; trying again", envelope, error, seconds=round(delay, 1))
        pause = delay * random.uniform(0.5, 1.0)
        self._call_later(pause, lambda: self._attempt(delivery, outcome, envelope, tries + 1, cut))
        return False

    def _is_final(self, outcome: Outcome, envelope: Envelope, tries: int, error: PublishError) -> bool:
        """Whether a message never will be taken."""
        if isinstance(error, Unroutable):
            # The queue of a rate limit may have been made while the worker runs; then it is made again.
            ours = isinstance(outcome, RateLimited) or self._declared(envelope.exchange, envelope.routing_key)
            return tries >= UNROUTABLE_TRIES and not ours
        return isinstance(error, MessageTooLarge | Unwritable)

    def _cannot_make(self, delivery: Delivery, outcome: Outcome, error: Exception) -> None:
        """What is published for an outcome cannot even be made: that costs its task, and no other."""
        _log.exception("The outcome of a task cannot be written", queue=delivery.queue, outcome=type(outcome).__name__)
        failed = Failed(Reason.FAILED, type(error).__name__, f"what became of it cannot be written: {error}")
        if delivery.verdict is None and not isinstance(outcome, Failed):
            delivery.stage = Stage.WAITING
            self._on_refused(delivery, failed)
        elif (letter := self._effects.smaller(delivery, failed, SMALLEST)) is None:
            self._finish(delivery)
        else:
            delivery.stage = Stage.SETTLING
            self.settling.add(delivery)
            delivery.unconfirmed = 1
            self._attempt(delivery, failed, letter, cut=SMALLEST)

    def _say(self, what: str, envelope: Envelope, error: PublishError, **more: object) -> None:
        address = {"exchange": envelope.exchange, "routing_key": envelope.routing_key}
        task_id = envelope.correlation_id
        _log.error(what, queue=self._effects.queue, task_id=task_id, **address, error=str(error), **more)

    def _confirmed(self, delivery: Delivery, outcome: Outcome) -> None:
        if delivery.refused is not None:
            error, delivery.refused, delivery.last = delivery.refused, None, ()
            delivery.stage = Stage.WAITING
            text = f"what it returned, or what follows it, cannot be sent: {error}"
            self._on_refused(delivery, Failed(Reason.FAILED, type(error).__name__, text))
            return
        if delivery.last:
            self._send(delivery, outcome, ())
        elif delivery.epoch == self._consumer.epoch:
            self._finish(delivery)
        else:
            # Published and confirmed, but the channel is gone: the redelivery only needs the ack.
            delivery.stage = Stage.SETTLED
            self._remember(delivery.key, Discarded())

    def _remember(self, key: Key, outcome: Outcome) -> None:
        self._remembered.pop(key, None)  # the newest stands last
        self._remembered[key] = time.monotonic(), outcome
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)

    # -- ack ------------------------------------------------------------------------------------------------------

    def _finish(self, delivery: Delivery) -> None:
        delivery.stage = Stage.SETTLED
        window = self._current_window()
        window.finish(delivery.tag, delivery)
        self._acknowledged.append(delivery.incoming.properties.headers)
        if not self._flush_planned:
            # Once a turn of the loop: a batch of outcomes is one frame.
            self._flush_planned = True
            self._call_later(0, self._flush)

    def _give_back(self, delivery: Delivery) -> None:
        delivery.stage = Stage.SETTLED
        if delivery.epoch == self._consumer.epoch and self._current_window().close(delivery.tag):
            self._consumer.send_requeue(delivery.tag, delivery.epoch)

    def _current_window(self) -> AckWindow[Delivery]:
        if self._window.epoch != self._consumer.epoch:
            # Finished, and the channel was lost before the ack: the redelivery needs nothing else.
            for delivery in self._window.rest():
                self._remember(delivery.key, Discarded())
            # So it is when the ack was sent and not heard. Only what says when it was published can be told for certain
            # from another call under the same id.
            for headers in self._acknowledged:
                if headers is not None and PUBLISHED_HEADER in headers:
                    self._remember(key_of(headers), Discarded())
            self._acknowledged.clear()
            self._window = AckWindow(self._consumer.epoch)
        return self._window

    def _flush(self) -> None:
        self._flush_planned = False
        window = self._current_window()
        tag = window.prefix()
        if tag is not None:
            self._consumer.send_ack(tag, window.epoch, multiple=True)
        if window.pending and not self._stragglers_planned:
            self._stragglers_planned = True
            self._call_later(_STRAGGLER_SECONDS, self._flush_stragglers)

    def _flush_stragglers(self) -> None:
        self._stragglers_planned = False
        self.flush()

    def flush(self) -> None:
        """Acknowledge everything that is finished, now."""
        window = self._current_window()
        tag = window.prefix()
        if tag is not None:
            self._consumer.send_ack(tag, window.epoch, multiple=True)
        for straggler in window.stragglers():
            self._consumer.send_ack(straggler, window.epoch, multiple=False)

"""Settlement: the one place that acknowledges.

An outcome's message is published and confirmed first, then the delivery is acknowledged. If this process dies in
between, the broker delivers the message again: a duplicate at worst, never a loss. A publish that fails is tried
again in place, for as long as it takes; the delivery stays unacknowledged meanwhile, and prefetch bounds how many do.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import structlog

from amqptasks.errors import Nacked, PublishError
from amqptasks.message import Envelope
from amqptasks.outcome import Discarded, GivenBack, Outcome
from amqptasks.worker.acks import AckWindow
from amqptasks.worker.delivery import Delivery, Stage
from amqptasks.worker.effects import Effects

__all__ = ["Acknowledger", "Settlement"]

_STRAGGLER_SECONDS = 0.02
_RETRY_FIRST, _RETRY_MAX = 0.5, 30.0
#: Outcomes of deliveries whose channel was lost before they could be settled, by message.
_REMEMBERED = 50_000

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
    """

    def __init__(
        self,
        consumer: Acknowledger,
        effects: Effects,
        *,
        publish: Callable[[Envelope, Callable[[PublishError | None], None]], None],
        call_later: Callable[[float, Callable[[], None]], Any],
    ) -> None:
        self._consumer = consumer
        self._effects = effects
        self._publish = publish
        self._call_later = call_later
        self._window = AckWindow(consumer.epoch)
        self._flush_planned = False
        self._stragglers_planned = False
        #: Deliveries whose effects are not confirmed yet.
        self.settling: set[Delivery] = set()
        self._remembered: OrderedDict[tuple[object, object, int], Outcome] = OrderedDict()

    # -- the ways in ----------------------------------------------------------------------------------------------

    def settle(self, delivery: Delivery, outcome: Outcome) -> None:
        """Make the outcome durable, then settle the delivery."""
        if delivery.stage in (Stage.SETTLING, Stage.SETTLED):
            return
        if delivery.epoch != self._consumer.epoch and not isinstance(outcome, GivenBack):
            # The broker has taken the message back, and gives it to somebody again. If that is this worker, the task
            # need not run a second time; nothing is published twice.
            delivery.stage = Stage.SETTLED
            self._remember(delivery, outcome)
            return
        if isinstance(outcome, GivenBack):
            self._give_back(delivery)
            return
        envelopes = self._effects.envelopes(delivery, outcome)
        if not envelopes:
            self._finish(delivery)
            return
        delivery.stage = Stage.SETTLING
        self.settling.add(delivery)
        delivery.unconfirmed = len(envelopes)
        for envelope in envelopes:
            self._attempt(delivery, envelope, _RETRY_FIRST)

    def remembered(self, delivery: Delivery) -> Outcome | None:
        """The outcome of a redelivered message whose task has ended here already."""
        return self._remembered.pop(delivery.key, None)

    # -- publish, confirm -----------------------------------------------------------------------------------------

    def _attempt(self, delivery: Delivery, envelope: Envelope, delay: float) -> None:
        def done(error: PublishError | None) -> None:
            if error is None:
                delivery.unconfirmed -= 1
                if delivery.unconfirmed == 0:
                    self.settling.discard(delivery)
                    self._confirmed(delivery)
                return
            if isinstance(error, Nacked) and envelope.is_reply:
                # A reply to a queue whose node is down. Nobody consumes it there, and its caller was told.
                _log.warning("Reply dropped: its queue refuses it", task_id=envelope.correlation_id, error=str(error))
                done(None)
                return
            _log.error(
                "The outcome of a task cannot be published; trying again",
                queue=delivery.queue,
                task_id=envelope.correlation_id,
                exchange=envelope.exchange,
                routing_key=envelope.routing_key,
                error=str(error),
                seconds=round(delay, 1),
            )
            pause = delay * random.uniform(0.5, 1.0)
            self._call_later(pause, lambda: self._attempt(delivery, envelope, min(delay * 2, _RETRY_MAX)))

        self._publish(envelope, done)

    def _confirmed(self, delivery: Delivery) -> None:
        if delivery.epoch == self._consumer.epoch:
            self._finish(delivery)
        else:
            # Published and confirmed, but the channel is gone: the redelivery only needs the ack.
            delivery.stage = Stage.SETTLED
            self._remember(delivery, Discarded())

    def _remember(self, delivery: Delivery, outcome: Outcome) -> None:
        self._remembered[delivery.key] = outcome
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)

    # -- ack ------------------------------------------------------------------------------------------------------

    def _finish(self, delivery: Delivery) -> None:
        delivery.stage = Stage.SETTLED
        window = self._current_window()
        window.finish(delivery.tag)
        if not self._flush_planned:
            # Once a turn of the loop: a batch of outcomes is one frame.
            self._flush_planned = True
            self._call_later(0, self._flush)

    def _give_back(self, delivery: Delivery) -> None:
        delivery.stage = Stage.SETTLED
        if delivery.epoch == self._consumer.epoch and self._current_window().close(delivery.tag):
            self._consumer.send_requeue(delivery.tag, delivery.epoch)

    def _current_window(self) -> AckWindow:
        if self._window.epoch != self._consumer.epoch:
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

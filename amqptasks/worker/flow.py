"""How much a leader takes from its queue: the consumer's prefetch, and pauses while every slot has a long task."""

from __future__ import annotations

import time
from collections.abc import Callable

from amqptasks.broker.consumer import Consumer
from amqptasks.broker.link import Link
from amqptasks.worker.autoscale import Autoscaler
from amqptasks.worker.dispatch import Dispatcher
from amqptasks.worker.group import GroupPlan
from amqptasks.worker.prefetch import Prefetch

__all__ = ["Flow"]

#: The mean size of messages follows the last so many.
_WEIGHT = 4


class Flow:
    """One queue's flow. Belongs to the leader's loop.

    Args:
        link: the consumer's connection.
        consumer: gets its first prefetch here.
        give_back: gives back what no executor holds.
    """

    def __init__(
        self, plan: GroupPlan, link: Link, consumer: Consumer, dispatcher: Dispatcher, give_back: Callable[[], None]
    ) -> None:
        self._link = link
        self._prefetch = Prefetch(plan.prefetch, priorities=plan.priorities)
        #: Says how many slots there are; None where their number is fixed.
        self.scaler = Autoscaler(dispatcher, *plan.autoscale) if plan.autoscale else None
        self._consumer = consumer
        self._dispatcher = dispatcher
        self._give_back = give_back
        self._paused = False
        #: Mean bytes of a message, and what had been read of how many messages when it was taken.
        self._size = 0.0
        self._read = self._seen = 0
        consumer.prefetch = self._target()

    def tick(self) -> None:
        """Take more or less, from time to time."""
        consumer, dispatcher = self._consumer, self._dispatcher
        self._weigh()
        if not (consumer.consuming or self._paused):
            return
        if self.scaler is not None:
            self.scaler.tick(consumer.prefetch, paused=self._paused)
        if self._paused:
            if dispatcher.free:
                self._paused = False
                consumer.prefetch = self._target()
                consumer.resume()
            else:
                self._give_back()  # what an executor returned since
            return
        now = time.monotonic()
        if dispatcher.waiting and self._prefetch.auto and dispatcher.stalled:
            # Long tasks everywhere: what waits here would run sooner elsewhere.
            self._paused = True
            dispatcher.runtime = None
            self._prefetch.shrank(now)
            consumer.pause(self._give_back)
            return
        target = self._prefetch.change(consumer.prefetch, dispatcher.runtime, dispatcher.concurrency, now, self._size)
        if target is not None:
            consumer.set_prefetch(target)

    def lost(self) -> None:
        """The channel is gone, and a pause with it: the next one takes what is right by now.

        Paused still, it would give back what the new consumer gets, again and again, and each time it counts as a
        failed delivery (RabbitMQ 4.0 to 4.2).
        """
        self._paused = False
        self._seen, self._read = self._consumer.seen, self._bytes_read()
        self._consumer.prefetch = self._target()

    def _target(self) -> int:
        return self._prefetch.target(self._dispatcher.runtime, self._dispatcher.concurrency, self._size)

    def _bytes_read(self) -> int:
        connection = self._link.connection
        return 0 if connection is None else int(connection.bytes_received)

    def _weigh(self) -> None:
        """The mean size of messages, from what the connection has read: nothing is done for a single one."""
        read, seen = self._bytes_read(), self._consumer.seen
        count, size = seen - self._seen, read - self._read
        if count > 0:
            weight = count / (count + _WEIGHT) if self._size else 1.0
            self._size += (size / count - self._size) * weight
            self._seen, self._read = seen, read

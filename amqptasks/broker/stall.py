"""A consumer that the broker has forgotten: messages wait, there is room for them, and none comes. Or it never begins.

Seen with quorum queues of RabbitMQ 3.10 in a cluster after the leader's node stood still for some seconds: the queue
takes messages, and gives its consumers none for a minute. Nobody closes a channel for it, so somebody has to look.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog
from pika.channel import Channel

from amqptasks.broker.consumer import Consumer
from amqptasks.broker.link import Link
from amqptasks.errors import BrokerError

__all__ = ["StallWatch"]

#: A consumer with nothing to do looks so often whether something waits: one passive queue.declare.
_LOOK_SECONDS = 5.0
_STRIKES = 2
#: So many looks without an answer to channel.open or to a subscription: a minute.
_UNANSWERED = 12
#: Least time between two reconnects; doubled with each until a message comes.
_PAUSE_FIRST, _PAUSE_MOST = 10.0, 600.0

_log = structlog.get_logger("amqptasks.worker")


class StallWatch:
    """Reconnects, to the next node, when twice in a row messages waited for an idle consumer. Belongs to the loop.

    Args:
        idle: whether the worker holds no message of the queue.
    """

    def __init__(self, link: Link, consumer: Consumer, idle: Callable[[], bool]) -> None:
        self._link = link
        self._consumer = consumer
        self._idle = idle
        self._connection: Any = None
        self._channel: Channel | None = None
        self._asked = self._looking = self._forbidden = False
        self._seen = self._strikes = self._unanswered = 0
        self._pause, self._not_before = _PAUSE_FIRST, 0.0
        link.watch(self._up, self._down)

    def _up(self, connection: Any) -> None:
        self._connection = connection
        if not self._looking:
            self._looking = True
            self._link.loop.call_later(_LOOK_SECONDS, self._look)

    def _down(self, _error: BrokerError | None) -> None:
        self._connection = self._channel = None
        self._asked, self._strikes, self._unanswered = False, 0, 0

    def _look(self) -> None:
        if self._connection is None or self._forbidden:
            self._looking = False
            return
        self._link.loop.call_later(_LOOK_SECONDS, self._look)
        self._unanswered = self._unanswered + 1 if self._consumer.asking else 0
        if self._unanswered >= _UNANSWERED:
            self._unanswered = 0
            self._leave("the broker does not answer to a subscription")
        elif self._consumer.seen != self._seen:
            self._seen, self._strikes, self._pause = self._consumer.seen, 0, _PAUSE_FIRST
        elif not self._consumer.consuming or not self._idle():
            self._strikes = 0
        elif self._asked:
            self._strike("the broker does not say how many messages wait")
        elif self._channel is None:
            self._asked = True
            self._connection.channel(on_open_callback=self._opened)
        else:
            self._ask(self._channel)

    def _opened(self, channel: Channel) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._closed)
        self._ask(channel)

    def _closed(self, channel: Channel, reason: Exception) -> None:
        if channel is self._channel:
            self._channel, self._asked = None, False
            self._forbidden = getattr(reason, "reply_code", 0) == 403  # who may not look need not

    def _ask(self, channel: Channel) -> None:
        self._asked = True
        channel.queue_declare(self._consumer.queue, passive=True, callback=self._answered)

    def _answered(self, frame: Any) -> None:
        self._asked = False
        waiting = frame.method.message_count
        if waiting and self._consumer.consuming and self._consumer.seen == self._seen and self._idle():
            self._strike(f"{waiting} messages wait, and none comes")
        else:
            self._strikes = 0

    def _strike(self, what: str) -> None:
        self._strikes += 1
        now = time.monotonic()
        if self._strikes < _STRIKES or now < self._not_before:
            return
        self._strikes = 0
        self._not_before, self._pause = now + self._pause, min(self._pause * 2, _PAUSE_MOST)
        self._leave(what)

    def _leave(self, what: str) -> None:
        _log.warning("The broker has forgotten this consumer; connecting anew", queue=self._consumer.queue, reason=what)
        self._link.give_up(f"queue {self._consumer.queue!r}: {what}")

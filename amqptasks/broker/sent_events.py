"""``task-sent``: the events of processes that call tasks, when `events.send_sent` is set.

One goes out for each call that the broker has confirmed, on the publisher's connection, on a channel of its own without
confirms. Nobody waits for it; what the broker does not take at once is dropped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from amqptasks.broker.event_channel import EventChannel
from amqptasks.broker.link import Link
from amqptasks.broker.publisher import Publisher
from amqptasks.message import Envelope
from amqptasks.protocol.events import described, event, routing_key
from amqptasks.topology.delays import undelayed_key

__all__ = ["SentEvents", "sent_fields"]

_KIND = "task-sent"
#: Events that wait for the channel when the process begins to publish.
_MOST_WAITING = 1000


def sent_fields(envelope: Envelope) -> dict[str, Any]:
    """What ``task-sent`` tells of a task message. `queue` is the name by which it is routed, also after a delay."""
    return {
        **described(envelope.headers),
        "queue": undelayed_key(envelope.routing_key),
        "exchange": envelope.exchange,
        "routing_key": envelope.routing_key,
    }


class SentEvents:
    """Of one publisher. `prepare` and `add` from any thread; the rest is the I/O thread's."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._prepared = 0
        self._link: Link | None = None
        self._channel: EventChannel | None = None
        self._waiting: list[Mapping[str, Any]] = []

    def prepare(self) -> None:
        """A call is about to be published: open the channel, so that it is there when the call is confirmed."""
        pid = os.getpid()
        if self._prepared != pid:
            self._prepared = pid
            self._publisher.on_link(self._on)

    def add(self, envelope: Envelope, called: float) -> None:
        """A message was confirmed. `called`: when (`time.time`), for a worker may have it before the confirm comes."""
        origin = str(envelope.headers.get("origin") or "")
        # Receivers count on from their own clock: who only calls sees no other.
        made = event(_KIND, origin, os.getpid(), 0, sent_fields(envelope), called)
        self._publisher.on_link(lambda link: self._send(link, made))

    def _on(self, link: Link) -> EventChannel:
        if self._channel is None or self._link is not link:
            self._link, self._waiting = link, []
            self._channel = EventChannel(link, self._publisher.name, on_open=self._opened)
            self._channel.open()
        return self._channel

    def _send(self, link: Link, made: Mapping[str, Any]) -> None:
        channel = self._on(link)
        if not channel.opening:
            channel.send(routing_key(_KIND), made)
        elif len(self._waiting) < _MOST_WAITING:
            self._waiting.append(made)

    def _opened(self) -> None:
        waiting, self._waiting = self._waiting, []
        for made in waiting:
            if self._channel is not None:
                self._channel.send(routing_key(_KIND), made)

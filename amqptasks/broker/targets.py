"""Whether the queue of a delayed message is there: the delay ladder takes every message, and says nothing later.

Without a delay the broker returns what no queue would get. With one, it goes up the ladder, and at its end stands among
what nobody could route, where nobody who waits hears of it. So a leader looks first, where its own topology does not
name the queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pika.channel import Channel

from amqptasks.broker.link import Link
from amqptasks.errors import BrokerError, Unroutable
from amqptasks.message import Envelope
from amqptasks.topology.delays import EXCHANGE_MARK, LADDER_LEVELS, level_name, undelayed_key
from amqptasks.topology.entities import Topology

__all__ = ["Targets"]

#: What was found is believed for so long; of so many queues at most. An answer may take so long.
_BELIEVED_SECONDS, _BELIEVED, _ANSWER_SECONDS = 30.0, 1_000, 10.0

_Then = Callable[[Unroutable | None], None]


class Targets:
    """The queues of delayed messages. Belongs to the leader's loop.

    Args:
        link: a connection to look by: a passive queue.declare, for which no permission is needed.
        topology: what this worker declares.
    """

    def __init__(self, link: Link, topology: Topology, prefix: str) -> None:
        self._link = link
        self._routes = topology.routes
        self._known = frozenset(queue.name for queue in topology.queues)
        #: The ladder's exchanges.
        self.levels = frozenset(level_name(prefix, level) for level in range(LADDER_LEVELS))
        self._prefix = prefix
        self._connection: Any = None
        self._found: dict[str, float] = {}
        self._asked: dict[str, list[_Then]] = {}
        link.watch(self._up, self._down)

    def declared(self, exchange: str, routing_key: str) -> bool:
        """Whether exchange and routing key belong to the topology; of a delayed message those at the ladder's end."""
        queue = self._queue(exchange, routing_key)
        return self._routes(exchange, routing_key) if queue is None else self._is_known(queue)

    def look(self, envelope: Envelope, then: _Then) -> bool:
        """Whether the queue of this message has to be looked for first. Then `then` is called: with why the message
        cannot be sent, or with None, and for a while after that nothing has to be looked for."""
        queue = self._queue(envelope.exchange, envelope.routing_key) if envelope.mandatory else None
        connection = self._connection
        if queue is None or connection is None or not connection.is_open or self._is_known(queue):
            return False
        if self._found.get(queue, 0.0) > time.monotonic():
            return False
        waiting = self._asked.setdefault(queue, [])
        waiting.append(then)
        if len(waiting) == 1:
            self._ask(connection, queue, waiting)
        return True

    def _queue(self, exchange: str, routing_key: str) -> str | None:
        """The queue at the end of the ladder; None for what goes another way, or to an exchange."""
        if exchange not in self.levels:
            return None
        target = routing_key.split(".", LADDER_LEVELS)[-1]
        return None if target.startswith(EXCHANGE_MARK) else undelayed_key(routing_key)

    def _is_known(self, queue: str) -> bool:
        return queue in self._known or self._routes(self._prefix, queue)

    # -- looking --------------------------------------------------------------------------------------------------

    def _up(self, connection: Any) -> None:
        self._connection = connection

    def _down(self, _error: BrokerError | None) -> None:
        self._connection = None
        for queue, waiting in list(self._asked.items()):
            self._answer(queue, waiting, None)

    def _ask(self, connection: Any, queue: str, waiting: list[_Then]) -> None:
        def opened(channel: Channel) -> None:
            channel.add_on_close_callback(closed)
            channel.queue_declare(queue, passive=True, callback=lambda _frame: found(channel))

        def found(channel: Channel) -> None:
            self._answer(queue, waiting, None)
            channel.close()

        def closed(_channel: Channel, reason: Exception) -> None:
            # A queue whose node is down is "not found" too, but there.
            text = str(getattr(reason, "reply_text", ""))
            missing = getattr(reason, "reply_code", 0) == 404 and "no queue" in text
            problem = f"no queue takes messages for {queue!r} when their delay is over: it does not exist"
            self._answer(queue, waiting, Unroutable(problem) if missing else None)

        self._link.loop.call_later(_ANSWER_SECONDS, lambda: self._answer(queue, waiting, None))
        connection.channel(on_open_callback=opened)

    def _answer(self, queue: str, waiting: list[_Then], problem: Unroutable | None) -> None:
        """What cannot be told is believed to be there: the ladder keeps a message, at worst, for an operator."""
        if self._asked.get(queue) is waiting:
            del self._asked[queue]
            if problem is None:
                if len(self._found) >= _BELIEVED:
                    self._found.clear()
                self._found[queue] = time.monotonic() + _BELIEVED_SECONDS
            for then in waiting:
                then(problem)

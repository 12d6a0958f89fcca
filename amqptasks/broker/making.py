"""Making one queue from the loop, when it turns out to be needed: the rest of the topology is declared before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pika.channel import Channel

from amqptasks.topology.entities import Binding, Queue

__all__ = ["make_queue"]


def make_queue(connection: Any, queue: Queue, binding: Binding, done: Callable[[str | None], None]) -> None:
    """Declare and bind a queue on a channel of its own. `done` is called once, with what went wrong."""
    answered = False

    def answer(problem: str | None) -> None:
        nonlocal answered
        if not answered:
            answered = True
            done(problem)

    def opened(channel: Channel) -> None:
        channel.add_on_close_callback(lambda _channel, reason: answer(str(getattr(reason, "reply_text", reason))))

        def bound(_frame: object) -> None:
            answer(None)
            if channel.is_open:
                channel.close()

        def declared(_frame: object) -> None:
            channel.queue_bind(queue.name, binding.source, binding.routing_key, callback=bound)

        channel.queue_declare(queue.name, durable=queue.durable, arguments=dict(queue.arguments), callback=declared)

    connection.channel(on_open_callback=opened)

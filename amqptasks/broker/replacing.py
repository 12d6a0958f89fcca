"""Replacing a queue by another one of the same name: the operations on the broker, on one connection.

The connection holds an exclusive queue while it lives: nobody else replaces the same queue meanwhile. RabbitMQ removes
it with the connection, whatever ends that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker

from amqptasks.broker.versions import accepted_arguments
from amqptasks.broker.visits import connect
from amqptasks.config import BrokerSettings
from amqptasks.errors import AccessRefused, AlreadyRunning, BrokerUnreachable, ConfigError
from amqptasks.topology.entities import Binding, Queue

__all__ = ["Replacing"]

_LOCKED, _REFUSED = 405, 403
#: The broker may need a moment to see that who held the lock is gone.
_LOCK_SECONDS = 5.0


class Replacing:
    """The operations, under a lock of the name `lock`.

    Raises:
        AlreadyRunning: somebody else holds the lock. AccessRefused: a permission is missing.
        BrokerUnreachable: no node answers, or the connection was lost.
        ConfigError: the broker refuses what it is asked for.
    """

    def __init__(self, settings: BrokerSettings, lock: str) -> None:
        self._settings = settings
        self._lock = lock
        self._connection: pika.BlockingConnection
        self._open: BlockingChannel | None = None

    def __enter__(self) -> Self:
        self._connection = connect(self._settings, f"amqptasks/{self._lock}")
        try:
            self._take_lock()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(AMQPError, OSError):
            self._connection.close()

    def _take_lock(self) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                self._channel.queue_declare(self._lock, exclusive=True)
                return
            except ChannelClosedByBroker as closed:
                if closed.reply_code != _LOCKED:
                    raise _translated(closed, "locking") from closed
                if time.monotonic() > deadline:
                    raise AlreadyRunning(
                        f"another process holds {self._lock!r}: this queue is being migrated by it now"
                    ) from closed
            self._connection.sleep(0.2)

    @property
    def _channel(self) -> BlockingChannel:
        if self._open is None or not self._open.is_open:
            self._open = self._connection.channel()
        return self._open

    @contextmanager
    def _asking(self, what: str) -> Iterator[BlockingChannel]:
        try:
            yield self._channel
        except ChannelClosedByBroker as closed:
            raise _translated(closed, what) from closed
        except (AMQPError, OSError) as error:
            raise BrokerUnreachable(f"{what}: the connection was lost: {error or type(error).__name__}") from error

    def keep_alive(self) -> None:
        """Send and receive heartbeats."""
        with self._asking("waiting"):
            self._connection.process_data_events(0)

    # -- before ---------------------------------------------------------------------------------------------------

    def rehearse(self, wanted: Queue, name: str, standing: Sequence[Binding]) -> None:
        """Find out whether everything that follows is permitted and accepted, on a queue `name` that is deleted again.

        Also binds `standing` bindings once more, which changes nothing, and asks for permission on the queue itself.
        """
        with self._asking(f"declaring a queue like {wanted.name!r} is to be") as channel:
            channel.queue_delete(name)
            channel.queue_declare(name, durable=wanted.durable, arguments=self._accepted(wanted))
        try:
            self._publish_once(name)
            for one in standing:
                self._bind(one)
        finally:
            with self._asking(f"deleting {name!r}") as channel:
                channel.queue_delete(name)
        with suppress(ConfigError), self._asking(f"declaring {wanted.name!r}") as channel:
            # It stands with other arguments: that is what the broker says, unless the permission is missing.
            channel.queue_declare(wanted.name, durable=wanted.durable, arguments=self._accepted(wanted))

    def _publish_once(self, name: str) -> None:
        """Messages go by the default exchange, as they do when a call names a queue without exchange."""
        with self._asking("publishing to the default exchange") as channel:
            channel.confirm_delivery()
            channel.basic_publish("", name, b"", mandatory=False)
            channel.close()

    def _bind(self, one: Binding) -> None:
        with self._asking(f"binding {one.destination!r} to {one.source!r}") as channel:
            channel.queue_bind(one.destination, one.source, one.routing_key, dict(one.arguments))

    def _accepted(self, queue: Queue) -> dict[str, Any]:
        # pika's blocking connection keeps what the server said of itself to itself.
        return accepted_arguments(queue, self._connection._impl.server_properties)

    # -- steps ----------------------------------------------------------------------------------------------------

    def declare(self, queue: Queue) -> None:
        """queue.declare."""
        with self._asking(f"declaring {queue.name!r}") as channel:
            channel.queue_declare(queue.name, durable=queue.durable, arguments=self._accepted(queue))

    def lead(self, one: Binding, old: str, new: str) -> None:
        """Have a binding lead to queue `new` instead of `old`, without a gap.

        What is published between the two goes to both queues. They leave together, so that this is about a millisecond;
        when this process is killed in it, the broker may carry out the first alone.
        """
        table = dict(one.arguments)
        with self._asking(f"binding {new!r} to {one.source!r}") as channel:
            channel._impl.queue_bind(new, one.source, one.routing_key, table)  # without waiting for the answer
            channel.queue_unbind(old, one.source, one.routing_key, table)

    def swap(self, wanted: Queue, *, if_empty: bool) -> bool:
        """Delete the queue and declare it as `wanted`. False when it holds messages, with `if_empty`.

        The broker has both frames before it begins, so that the name is free for as long as it takes to carry them out;
        when this process is killed in that moment, it may carry out the first alone.
        """
        try:
            with self._asking(f"replacing {wanted.name!r}") as channel:
                channel._impl.queue_delete(wanted.name, if_empty=if_empty)  # without waiting for the answer
                channel.queue_declare(wanted.name, durable=wanted.durable, arguments=self._accepted(wanted))
        except ConfigError as error:
            if if_empty and "not empty" in str(error):
                return False
            raise
        return True

    def delete(self, name: str) -> None:
        """queue.delete."""
        with self._asking(f"deleting {name!r}") as channel:
            channel.queue_delete(name)

    def count(self, name: str) -> tuple[int, int]:
        """(messages that wait, consumers), as the queue itself says (passive queue.declare); 0 when it is slow to."""
        with self._asking(f"counting {name!r}") as channel:
            found = channel.queue_declare(name, passive=True).method
            return int(found.message_count), int(found.consumer_count)


def _translated(closed: ChannelClosedByBroker, what: str) -> Exception:
    if closed.reply_code == _REFUSED:
        return AccessRefused(f"{what}: {closed.reply_text}")
    return ConfigError(f"{what}: the broker refuses it: {closed.reply_text}")

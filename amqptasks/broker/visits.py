"""Short visits to the broker, on a connection of their own to the first node that answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError

from amqptasks.broker.failures import translate
from amqptasks.broker.parameters import connection_parameters
from amqptasks.config.models import BrokerSettings
from amqptasks.errors import AmqpTasksError, BrokerUnreachable

__all__ = ["Channels", "connect", "on_some_node"]

T = TypeVar("T")
#: A node that takes the connection and says nothing raises the second, which is no AMQPError.
_FAILURES = (AMQPError, AMQPConnectorException, OSError)


def on_some_node(settings: BrokerSettings, name: str, visit: Callable[[pika.BlockingConnection, str], T]) -> T:
    """Run a visit on the first node that answers; a connection lost on the way is tried again on the next node."""
    failures: list[AmqpTasksError] = []
    for parameters in connection_parameters(settings, name):
        try:
            with _connected(parameters) as connection:
                return visit(connection, parameters.virtual_host)
        except _FAILURES as error:
            failures.append(translate(error, parameters))
    raise _all_of(failures)


def connect(settings: BrokerSettings, name: str) -> pika.BlockingConnection:
    """A connection to the first node that answers. Raises AccessRefused and BrokerUnreachable."""
    failures: list[AmqpTasksError] = []
    for parameters in connection_parameters(settings, name):
        try:
            return _open(parameters)
        except _FAILURES as error:
            failures.append(translate(error, parameters))
    raise _all_of(failures)


def _open(parameters: pika.ConnectionParameters) -> pika.BlockingConnection:
    try:
        return pika.BlockingConnection(parameters)
    except ValueError as error:  # pika's, for a connection that was made and reset at once
        raise ConnectionResetError(str(error)) from error


def _all_of(failures: list[AmqpTasksError]) -> AmqpTasksError:
    """What to raise when no node did it: what a node refused, before what did not answer."""
    refused = next((failure for failure in failures if not isinstance(failure, BrokerUnreachable)), None)
    if refused is not None:
        return refused
    return failures[0] if len(failures) == 1 else BrokerUnreachable("; ".join(map(str, failures)))


@contextmanager
def _connected(parameters: pika.ConnectionParameters) -> Iterator[pika.BlockingConnection]:
    connection = _open(parameters)
    try:
        yield connection
    finally:
        if connection.is_open:
            with suppress(AMQPError, OSError):
                connection.close()


class Channels:
    """A channel to work on: the same one until the broker closes it, then a new one."""

    def __init__(self, connection: pika.BlockingConnection) -> None:
        self._connection = connection
        self._channel: BlockingChannel | None = None

    def get(self) -> BlockingChannel:
        if self._channel is None or not self._channel.is_open:
            self._channel = self._connection.channel()
        return self._channel

"""Every exception of the AMQP clients becomes one of ours, in words that help and hold no password."""

from __future__ import annotations

import inspect
import socket
import ssl
from types import ModuleType

import aiormq.exceptions
import pika
import pika.exceptions
import pytest
from pika.adapters.utils.connection_workflow import AMQPConnectionWorkflowFailed, AMQPConnectorSocketConnectError

from amqptasks.broker.failures import KINDS, translate
from amqptasks.broker.parameters import connection_parameters
from amqptasks.config import BrokerSettings
from amqptasks.errors import AccessRefused, BrokerUnreachable

NODE = connection_parameters(BrokerSettings.model_validate({"url": "amqp://ann:s3cret@rabbit:5673/shop"}), "t")[0]


def exceptions_of(module: ModuleType) -> list[type[Exception]]:
    return [one for _, one in inspect.getmembers(module, inspect.isclass) if issubclass(one, Exception)]


@pytest.mark.parametrize("module", [pika.exceptions, aiormq.exceptions], ids=lambda module: module.__name__)
def test_no_exception_of_the_clients_is_unknown(module: ModuleType) -> None:
    found = {one.__name__ for one in exceptions_of(module) if one.__module__ == module.__name__}
    assert len(found) > 20
    assert found <= KINDS.keys()


@pytest.mark.parametrize(
    "kind", exceptions_of(pika.exceptions) + exceptions_of(aiormq.exceptions), ids=lambda kind: kind.__qualname__
)
def test_each_becomes_an_error_that_names_the_node_and_no_password(kind: type[Exception]) -> None:
    error = kind.__new__(kind)  # each has arguments of its own
    error.args = (403, "it said so")
    told = translate(error, NODE)
    assert isinstance(told, AccessRefused | BrokerUnreachable)
    assert str(told).startswith("rabbit:5673/shop: ")
    assert "s3cret" not in str(told)


def wrapped(error: Exception) -> Exception:
    """As pika wraps what happens to a socket."""
    inside = AMQPConnectionWorkflowFailed([AMQPConnectorSocketConnectError(error)])
    return pika.exceptions.AMQPConnectionError(inside)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (wrapped(ConnectionRefusedError(111, "Connection refused")), BrokerUnreachable, "is RabbitMQ running there"),
        (wrapped(TimeoutError()), BrokerUnreachable, "no answer in time"),
        (wrapped(socket.gaierror(-2, "Name or service not known")), BrokerUnreachable, "cannot be resolved"),
        (wrapped(OSError(113, "No route to host")), BrokerUnreachable, "No route to host"),
        (wrapped(ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong")), BrokerUnreachable, "TLS failed"),
        (
            pika.exceptions.IncompatibleProtocolError(
                "StreamLostError: (\"Lost: SSLEOFError(8, 'EOF occurred in violation of protocol')\",)"
            ),
            BrokerUnreachable,
            "a client's certificate",
        ),
        (pika.exceptions.AMQPHeartbeatTimeout("late"), BrokerUnreachable, "no answer in time"),
        (pika.exceptions.IncompatibleProtocolError("EOF"), BrokerUnreachable, "Is this the AMQP port"),
        (
            pika.exceptions.ConnectionClosedByBroker(320, "CONNECTION_FORCED - shutdown"),
            BrokerUnreachable,
            "closed the connection: CONNECTION_FORCED",
        ),
        (pika.exceptions.ConnectionClosedByBroker(403, "ACCESS_REFUSED"), AccessRefused, "user name or password"),
        (pika.exceptions.ProbableAuthenticationError("?"), AccessRefused, "user name or password of 'ann'"),
        (
            pika.exceptions.ConnectionClosedByBroker(530, "NOT_ALLOWED - vhost shop not found"),
            AccessRefused,
            "virtual host 'shop' does not exist",
        ),
        (
            pika.exceptions.ConnectionClosedByBroker(530, "NOT_ALLOWED - access to vhost 'shop' refused"),
            AccessRefused,
            "may not use the virtual host 'shop'",
        ),
        (pika.exceptions.ChannelClosedByBroker(403, "ACCESS_REFUSED - x"), AccessRefused, "lacks a permission"),
        (aiormq.exceptions.ProbableAuthenticationError("ACCESS_REFUSED"), AccessRefused, "user name or password"),
        (aiormq.exceptions.ConnectionNotAllowed("vhost shop not found"), AccessRefused, "does not exist"),
        (
            aiormq.exceptions.InvalidFrameError("Expected one of ['Connection.OpenOk'], got <Connection.Close>"),
            AccessRefused,
            "virtual host 'shop'",
        ),
        (aiormq.exceptions.AMQPConnectionError(111, "Connect call failed"), BrokerUnreachable, "Connect call failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_people_are_told_what_to_do(error: Exception, kind: type[Exception], words: str) -> None:
    told = translate(error, NODE)
    assert type(told) is kind
    assert words in str(told)

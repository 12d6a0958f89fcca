"""The clients' exceptions as ours, in sentences for people. This is the only place that knows them all.

pika and aiormq (under aio-pika) have classes of the same names. They are told apart by name, so that reading an
exception of one does not import the other.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from enum import Enum

import pika

from amqptasks.broker.parameters import node_name
from amqptasks.errors import AccessRefused, BrokerError, BrokerUnreachable

__all__ = ["KINDS", "Kind", "translate"]

_ACCESS_REFUSED, _NOT_ALLOWED = 403, 530
#: pika passes some exceptions on as the text of their representation.
_QUOTED = re.compile(r"""^\w+: \((?:\d+\) )?(['"])(.*)\1""")
#: How OpenSSL says that the other side ended the connection in the middle of things.
_TLS_ENDED = re.compile(r"SSLEOFError|EOF occurred in violation")


class Kind(Enum):
    """What an exception of a client library says."""

    LOGIN = "user name or password refused"
    VHOST = "virtual host missing or forbidden"
    PERMISSION = "an operation was refused"
    TIMEOUT = "no answer"
    PROTOCOL = "the other side speaks no AMQP 0-9-1"
    CLOSED = "closed, with a reason"
    LOST = "gone, without a reason"


#: Each exception class of pika and of aiormq. A test fails when a release brings one that is not here.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("AuthenticationError", "ProbableAuthenticationError"), Kind.LOGIN),
    **dict.fromkeys(("ProbableAccessDeniedError", "ConnectionNotAllowed"), Kind.VHOST),
    "ChannelAccessRefused": Kind.PERMISSION,
    **dict.fromkeys(("AMQPHeartbeatTimeout", "AMQPConnectorStackTimeout", "ConnectionBlockedTimeout"), Kind.TIMEOUT),
    **dict.fromkeys(
        (
            "IncompatibleProtocolError",
            "InvalidFieldTypeException",
            "InvalidFrameError",
            "ProtocolSyntaxError",
            "ProtocolVersionMismatch",
            "UnexpectedFrameError",
            "UnsupportedAMQPFieldException",
        ),
        Kind.PROTOCOL,
    ),
    **dict.fromkeys(
        (
            "ChannelClosed",
            "ChannelClosedByBroker",
            "ChannelLockedResource",
            "ChannelNotFoundEntity",
            "ChannelPreconditionFailed",
            "ConnectionChannelError",
            "ConnectionClosed",
            "ConnectionClosedByBroker",
            "ConnectionCommandInvalid",
            "ConnectionFrameError",
            "ConnectionInternalError",
            "ConnectionNotImplemented",
            "ConnectionResourceError",
            "ConnectionSyntaxError",
            "ConnectionUnexpectedFrame",
        ),
        Kind.CLOSED,
    ),
    # Of the connection as such, or of an operation that does not fit its state: a new connection starts afresh.
    **dict.fromkeys(
        (
            "AMQPChannelError",
            "AMQPConnectionError",
            "AMQPError",
            "BodyTooLongError",
            "ChannelClosedByClient",
            "ChannelError",
            "ChannelInvalidStateError",
            "ChannelWrongStateError",
            "ConnectionClosedByClient",
            "ConnectionOpenAborted",
            "ConnectionWrongStateError",
            "ConsumerCancelled",
            "DeliveryError",
            "DuplicateConsumerTag",
            "DuplicateGetOkCallback",
            "InvalidChannelNumber",
            "MethodNotImplemented",
            "NackError",
            "NoFreeChannels",
            "PublishError",
            "ReentrancyError",
            "ShortStringTooLong",
            "StreamLostError",
            "UnroutableError",
        ),
        Kind.LOST,
    ),
}


def translate(error: object, parameters: pika.ConnectionParameters) -> BrokerError:
    """What went wrong with the connection to a node. Never names the password."""
    node = node_name(parameters)
    chain = list(_unwrap(error))
    return _access(chain, node, parameters) or _network(chain, node) or _said(chain, node)


def _access(chain: list[object], node: str, parameters: pika.ConnectionParameters) -> AccessRefused | None:
    user = getattr(parameters.credentials, "username", "?")
    vhost = parameters.virtual_host
    for one in chain:
        kind, code, text = _kind(one), getattr(one, "reply_code", None), _text(one)
        about_channel = type(one).__name__.startswith("Channel")
        if kind is Kind.PERMISSION or (about_channel and code == _ACCESS_REFUSED):
            return AccessRefused(f"{node}: user {user!r} lacks a permission: {text}")
        # aiormq drops the broker's reason; a connection.open is refused for its virtual host only.
        unread = "Connection.OpenOk" in text and "Connection.Close" in text
        if unread:
            text = "connection.open was refused"
        if kind is Kind.VHOST or code == _NOT_ALLOWED or unread:
            if "not found" in text or "down" in text:
                return AccessRefused(f"{node}: the virtual host {vhost!r} does not exist ({text})")
            return AccessRefused(
                f"{node}: user {user!r} may not use the virtual host {vhost!r}, or it does not exist ({text}). "
                f"See: rabbitmqctl list_permissions -p {vhost}"
            )
        if kind is Kind.LOGIN or (not about_channel and code == _ACCESS_REFUSED):
            return AccessRefused(f"{node}: the broker refused the user name or password of {user!r}")
    return None


def _network(chain: list[object], node: str) -> BrokerUnreachable | None:
    for one in chain:
        if isinstance(one, ssl.SSLCertVerificationError):
            why = getattr(one, "verify_message", one)
            return BrokerUnreachable(f"{node}: the certificate is not trusted: {why}. Check broker.tls.ca_file")
        if isinstance(one, ssl.SSLError):
            why = getattr(one, "reason", None) or one
            return BrokerUnreachable(f"{node}: TLS failed: {why}. Check broker.tls and the port")
        if isinstance(one, TimeoutError) or _kind(one) is Kind.TIMEOUT or "Timeout while" in _text(one):
            return BrokerUnreachable(f"{node}: no answer in time. Is this the AMQP port, and is it reachable?")
        if isinstance(one, ConnectionRefusedError):
            return BrokerUnreachable(f"{node}: connection refused: is RabbitMQ running there?")
        if isinstance(one, socket.gaierror):
            return BrokerUnreachable(f"{node}: the host name cannot be resolved ({one.strerror}). Check broker.url")
        if isinstance(one, OSError) and one.strerror:
            return BrokerUnreachable(f"{node}: {one.strerror}")
    return None


def _said(chain: list[object], node: str) -> BrokerUnreachable:
    for one in chain:
        if _TLS_ENDED.search(_text(one)):
            # Its alert may say why, when we read before we write (TLS 1.3 has the client's certificate last).
            return BrokerUnreachable(
                f"{node}: the broker ended TLS at once ({_text(one)}). Does it want a client's certificate "
                "(broker.tls.cert_file)? Is this the AMQP port?"
            )
        if _kind(one) is Kind.PROTOCOL:
            return BrokerUnreachable(f"{node}: no AMQP 0-9-1 there ({_text(one)}). Is this the AMQP port?")
        if _kind(one) is Kind.CLOSED:
            return BrokerUnreachable(f"{node}: the broker closed the connection: {_text(one)}")
    detail = next((_text(one) for one in chain if _text(one)), type(chain[-1]).__name__)
    return BrokerUnreachable(f"{node}: connection lost: {detail}")


def _kind(error: object) -> Kind | None:
    """The kind of an exception's class, or of the nearest base that is known."""
    kinds = (KINDS[base.__name__] for base in type(error).__mro__ if base.__name__ in KINDS)
    return next(kinds, None) if isinstance(error, BaseException) else None


def _text(error: object) -> str:
    """The broker's or the system's words, without the name of an exception class."""
    reply = getattr(error, "reply_text", None)
    if reply:
        return str(reply)
    words = [str(one) for one in getattr(error, "args", ()) if isinstance(one, str) and one]
    quoted = _QUOTED.search(words[-1]) if words else None
    return quoted[2] if quoted is not None else words[-1] if words else ""


def _unwrap(error: object, depth: int = 0) -> Iterator[object]:
    """The exception and all that it wraps, innermost first: pika packs the cause several levels deep."""
    if depth > 6:
        return
    if isinstance(error, BaseException):
        for inner in (
            *error.args,
            *getattr(error, "exceptions", ()),
            error.__cause__,
            getattr(error, "exception", None),
        ):
            if isinstance(inner, BaseException) and inner is not error:
                yield from _unwrap(inner, depth + 1)
    yield error

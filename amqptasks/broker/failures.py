"""The clients' exceptions as ours, in sentences for people. This is the only place that knows them."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import pika
from pika import exceptions as pika_errors

from amqptasks.broker.parameters import node_name
from amqptasks.errors import AccessRefused, BrokerError, BrokerUnreachable

__all__ = ["translate"]

_ACCESS_REFUSED, _NOT_ALLOWED = 403, 530


def translate(error: object, parameters: pika.ConnectionParameters) -> BrokerError:
    """What went wrong with the connection to a node. Never names the password."""
    node = node_name(parameters)
    user = getattr(parameters.credentials, "username", "?")
    chain = list(_unwrap(error))
    for one in chain:
        code, text = getattr(one, "reply_code", None), str(getattr(one, "reply_text", one))
        if code == _NOT_ALLOWED or isinstance(one, pika_errors.ProbableAccessDeniedError):
            if "not found" in text or "down" in text:
                return AccessRefused(f"{node}: the virtual host {parameters.virtual_host!r} does not exist ({text})")
            return AccessRefused(
                f"{node}: user {user!r} may not use the virtual host {parameters.virtual_host!r}, or it does not exist "
                f"({text}). See: rabbitmqctl list_permissions -p {parameters.virtual_host}"
            )
        if code == _ACCESS_REFUSED or isinstance(
            one, pika_errors.ProbableAuthenticationError | pika_errors.AuthenticationError
        ):
            return AccessRefused(f"{node}: the broker refused the user name or password of {user!r}")
    for one in chain:
        if isinstance(one, ssl.SSLError):
            return BrokerUnreachable(f"{node}: TLS failed: {one.reason or one}. Check broker.tls and the port")
        if isinstance(one, TimeoutError) or "timeout" in type(one).__name__.lower():
            return BrokerUnreachable(f"{node}: no answer in time")
        if isinstance(one, ConnectionRefusedError):
            return BrokerUnreachable(f"{node}: connection refused: is RabbitMQ running there?")
        if isinstance(one, OSError) and one.strerror:
            return BrokerUnreachable(f"{node}: {one.strerror}")
    detail = next((str(one) for one in chain if str(one)), type(error).__name__)
    return BrokerUnreachable(f"{node}: connection lost: {detail}")


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

"""What becomes of a message that was not confirmed, as the error that its caller gets. Pure."""

from __future__ import annotations

import re

from amqptasks.errors import (
    AccessRefused,
    BrokerBlocked,
    BrokerError,
    BrokerUnreachable,
    MessageTooLarge,
    Nacked,
    PublishError,
    PublishTimeout,
    Unroutable,
)
from amqptasks.message import Envelope

__all__ = ["blame", "blocked", "is_about_a_message", "late", "lost", "nacked", "refused", "too_long", "unroutable"]

_EXCHANGE = re.compile(r"exchange '([^']*)'")
_TOPIC = re.compile(r"topic '([^']*)'")
_SIZES = re.compile(r"message size (\d+) is larger than (?:configured )?max(?:imum)? (?:allowed )?size (\d+)")
#: AMQP's channel errors; the others (500 and up) are about the connection or the broker.
_ABOUT_A_MESSAGE = frozenset({311, 313, 403, 404, 405, 406})


def is_about_a_message(code: int) -> bool:
    """Whether a channel that was closed with this code was closed because of one of its messages."""
    return code in _ABOUT_A_MESSAGE


def blame(envelope: Envelope, code: int, text: str) -> PublishError | None:
    """The error of this message when the broker, closing the channel, named it; else None.

    `Unroutable` means that the exchange does not exist.
    """
    exchange, sizes, topic = _EXCHANGE.search(text), _SIZES.search(text), _TOPIC.search(text)
    named = exchange is not None and exchange[1] == envelope.exchange
    if code == 404 and named:
        return Unroutable(f"the exchange {envelope.exchange!r} does not exist ({text})")
    if code == 403 and named and (topic is None or topic[1] == envelope.routing_key):
        error = PublishError(f"the broker refused to publish to {envelope.exchange!r}: {text}")
        error.__cause__ = AccessRefused(text)
        return error
    if sizes is not None and len(envelope.body) > int(sizes[2]):
        size = len(envelope.body)
        return MessageTooLarge(f"the message has {size} bytes; the broker's limit is {sizes[2]} (max_message_size)")
    return None


def refused(envelope: Envelope, text: str) -> PublishError:
    """It was alone on its channel when the broker closed it."""
    where = f"exchange {envelope.exchange!r}, routing key {envelope.routing_key!r}"
    return PublishError(f"the broker refused the message for {where}: {text}")


def unroutable(envelope: Envelope, text: str) -> Unroutable:
    """It was returned."""
    return Unroutable(
        f"no queue takes exchange {envelope.exchange!r} with routing key {envelope.routing_key!r} ({text}). "
        "Is the queue declared? `amqptasks routes test <task>` shows the route"
    )


def nacked(envelope: Envelope) -> Nacked:
    """It was nacked."""
    return Nacked(
        f"the broker refused the message for exchange {envelope.exchange!r}, routing key {envelope.routing_key!r} "
        "(basic.nack): the queue is full (max_length), or has no quorum"
    )


def blocked(*, sent: bool) -> BrokerBlocked:
    """It waited under an alarm."""
    return BrokerBlocked(
        "the broker takes no messages (a memory or disk alarm): see `rabbitmq-diagnostics alarms`", sent=sent
    )


def lost(error: BrokerError, *, sent: bool) -> PublishError:
    """There is no connection for it."""
    if sent:
        text = "the connection was lost before the confirm; the message may or may not have been taken"
    else:
        text = "the message was not published"
    made = PublishError(f"{text}: {error}", sent=sent)
    made.__cause__ = error
    return made


def late(node: str, error: BrokerError | None, *, sent: bool) -> PublishTimeout:
    """Its deadline passed. `error` is the last one of the connection."""
    if sent:
        made = PublishTimeout(
            f"{node}: the broker did not confirm the message in time; it may or may not have been taken", sent=True
        )
    else:
        error = error or BrokerUnreachable(f"{node}: no answer in time")
        made = PublishTimeout(f"the message was not published in time: {error}")
    made.__cause__ = error
    return made


def too_long(envelope: Envelope) -> str | None:
    """What of the address AMQP cannot carry, or None."""
    for what, value in (("exchange", envelope.exchange), ("routing key", envelope.routing_key)):
        # Most are short: 63 characters have at most 252 bytes.
        size = len(value) if len(value) < 64 else len(value.encode("utf-8", "surrogatepass"))
        if size > 255:
            return f"the {what} {value[:40]!r}… has {size} bytes; AMQP allows 255"
    return None

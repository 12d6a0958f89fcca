"""Messages on their way out, told to the handlers of `before_task_publish` and `after_task_publish`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from amqptasks.errors import ConfigError, SerializationError
from amqptasks.message import Envelope
from amqptasks.signals import after_task_publish, before_task_publish

__all__ = ["Announced", "announce", "announce_published"]

#: (args, kwargs, embed)
Announced = tuple[Sequence[Any], Mapping[str, Any], Mapping[str, Any]]
#: What is decided before the message is announced: a call's options are the place to change it.
_DECIDED = ("lang", "task", "id", "retries", "eta", "expires", "timelimit", "compression", "ignore_result")


def announce(envelope: Envelope, body: Announced, retry_policy: Mapping[str, Any] | None) -> None:
    """Tell the handlers of `before_task_publish`, who may change headers.

    Raises:
        ConfigError: they changed a header that is decided already.
        SerializationError: what they added, or the caller gave, cannot be an AMQP header.
    """
    headers = envelope.headers
    name, given = headers["task"], set(headers)
    decided = [repr(headers.get(one)) for one in _DECIDED]
    before_task_publish.send(
        sender=name,
        body=body,
        exchange=envelope.exchange,
        routing_key=envelope.routing_key,
        headers=headers,
        properties=MappingProxyType(_properties(envelope)),
        declare=(),
        retry_policy=retry_policy,
    )
    changed = [one for one, was in zip(_DECIDED, decided, strict=True) if repr(headers.get(one)) != was]
    if changed:
        raise ConfigError(
            f"task {name}: a handler of before_task_publish changed {', '.join(changed)}; "
            "headers may be added, but what the call decides belongs into its options"
        )
    plain = {}
    for header, value in headers.items():
        try:
            plain.update(_plain_table({header: value}))
        except (TypeError, ValueError) as error:
            whose = "" if header in given else "a handler of before_task_publish added "
            raise SerializationError(f"task {name}: {whose}{error}") from None
    envelope.headers = plain


def announce_published(envelope: Envelope, body: Announced) -> None:
    """Tell the handlers of `after_task_publish`."""
    after_task_publish.send(
        sender=envelope.headers["task"],
        body=body,
        headers=envelope.headers,
        exchange=envelope.exchange,
        routing_key=envelope.routing_key,
    )


def _properties(envelope: Envelope) -> dict[str, Any]:
    names = ("content_type", "content_encoding", "correlation_id", "reply_to", "priority", "expiration")
    return {name: getattr(envelope, name) for name in names}


def _plain_table(table: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
    plain = {}
    for name, value in table.items():
        if not isinstance(name, str) or len(name.encode()) > 255:
            raise TypeError(f"header {where + str(name)!r:.80}: a name is a string of at most 255 bytes")
        plain[str.__str__(name)] = _plain(value, f"{where}{name}")
    return plain


def _plain(value: Any, name: str) -> Any:
    """The value as exactly a type that every process on its way can carry."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        if not -(2**63) < value < 2**63:
            raise ValueError(f"header {name!r}: {value:.3e} does not fit 64 bits")
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, Mapping):
        return _plain_table(value, f"{name}.")
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    raise TypeError(f"header {name!r}: a {type(value).__qualname__} cannot be an AMQP header; give its text")

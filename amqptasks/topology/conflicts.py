"""What to say when the broker holds something else than the settings declare.

RabbitMQ freezes a queue's and an exchange's arguments at the first declaration and answers later differences with 406
and a text. The texts were read from 3.10 to 4.3; they come in three forms::

    inequivalent arg 'x-max-priority' for queue 'email' in vhost '/': received '10' but current is '5'
    … received none but current is the value '5' of type 'signedint'
    … received the value '10' of type 'signedint' but current is none
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from amqptasks.topology.entities import Exchange, Queue, freeze_arguments

__all__ = ["MAX_DIFFERENCES", "Conflict", "adopted", "explain", "parse_conflict", "telling"]

_INEQUIVALENT = re.compile(
    r"inequivalent arg '(?P<argument>[^']*)' for (?P<kind>queue|exchange) '(?P<name>.*)' in vhost '.*': "
    r"received (?P<declared>.+?) but current is (?P<live>.+?)\s*$",
    re.DOTALL,
)
_TYPED_VALUE = re.compile(r"the value '(.*)' of type '(\w+)'", re.DOTALL)
_BARE_VALUE = re.compile(r"'(.*)'", re.DOTALL)

#: Arguments in the YAML's words, and whether the YAML counts in seconds what AMQP counts in milliseconds.
_QUEUE_KEYS: dict[str, tuple[str, bool]] = {
    "durable": ("durable", False),
    "x-queue-type": ("type", False),
    "x-max-priority": ("max_priority", False),
    "x-delivery-limit": ("delivery_limit", False),
    "x-message-ttl": ("message_ttl", True),
    "x-expires": ("expires", True),
    "x-max-length": ("max_length", False),
    "x-max-length-bytes": ("max_length_bytes", False),
    "x-overflow": ("overflow", False),
    "x-consumer-timeout": ("consumer_timeout", True),
}
_LETTER_KEYS: dict[str, tuple[str, bool]] = {
    "x-queue-type": ("type", False),
    "x-message-ttl": ("ttl", True),
    "x-max-length": ("max_length", False),
}
_EXCHANGE_KEYS: dict[str, tuple[str, bool]] = {
    "type": ("type", False),
    "durable": ("durable", False),
    "auto_delete": ("auto_delete", False),
}
_NONE = "none"
#: More arguments than a queue can have that RabbitMQ compares.
MAX_DIFFERENCES = 20


@dataclass(frozen=True, slots=True)
class Conflict:
    """One argument that differs; values in the broker's words, ``none`` where an argument is absent."""

    entity: Exchange | Queue
    argument: str
    declared: str
    live: str
    #: The live value's AMQP type as the broker names it; empty where it does not.
    live_type: str = field(default="", compare=False)

    @property
    def kind(self) -> str:
        return "exchange" if isinstance(self.entity, Exchange) else "queue"


def parse_conflict(entity: Exchange | Queue, reply_text: str) -> Conflict | None:
    """The conflict that a 406 tells of; None when it tells of something else (an argument that is not valid)."""
    found = _INEQUIVALENT.search(reply_text)
    if found is None:
        return None
    declared, _ = _value(found["declared"])
    live, live_type = _value(found["live"])
    return Conflict(entity, found["argument"], declared, live, live_type)


def _value(text: str) -> tuple[str, str]:
    if typed := _TYPED_VALUE.fullmatch(text):
        return typed[1], typed[2]
    bare = _BARE_VALUE.fullmatch(text)
    return (bare[1] if bare else text), ""


def adopted(conflict: Conflict) -> Exchange | Queue | None:
    """The entity with the live value instead of the declared one; None when that value cannot be told from the text.

    The broker names one difference an answer. Asking again with the live value leads to the next one.
    """
    entity, name = conflict.entity, conflict.argument
    table = dict(entity.arguments)
    declared = getattr(entity, name, None) if name in _PROPERTIES else table.get(name)
    live = _python_value(conflict, declared)
    if live is None and conflict.live != _NONE:
        return None
    if name in _PROPERTIES:
        changed: dict[str, Any] = {name: live}
        return None if live is None else replace(entity, **changed)
    return replace(entity, arguments=freeze_arguments(table | {name: live}))


_PROPERTIES = frozenset({"type", "durable", "auto_delete", "internal"})


def _python_value(conflict: Conflict, declared: Any) -> bool | int | str | None:
    text, kind = conflict.live, conflict.live_type
    if text == _NONE and not kind:
        return None
    if kind == "bool" or isinstance(declared, bool):
        return text == "true"
    if kind == "longstr" or isinstance(declared, str):
        return text
    return int(text) if text.lstrip("-").isdigit() else None


def telling(conflicts: Sequence[Conflict]) -> list[Conflict]:
    """The conflicts of one entity that are worth telling: another type brings other arguments with it."""
    types = [conflict for conflict in conflicts if conflict.argument in ("x-queue-type", "type")]
    return types or list(conflicts)


def explain(conflicts: Sequence[Conflict], vhost: str = "/") -> str:
    """What differs in one entity, why it cannot be changed in place, and the ways out."""
    first = conflicts[0]
    differences = ", and ".join(map(_difference, conflicts))
    settings = _in_yaml(conflicts)
    deletion = _deletion(first, vhost)
    ways = f"Either {settings}, or {deletion}" if settings else deletion[0].upper() + deletion[1:]
    return f"{first.kind} {first.entity.name!r} exists {differences}: AMQP freezes arguments. {ways} and start again"


def _difference(conflict: Conflict) -> str:
    declared = "without" if conflict.declared == _NONE else conflict.declared
    if conflict.live == _NONE:
        return f"without {conflict.argument}, declared {declared}"
    return f"with {conflict.argument}={conflict.live}, declared {declared}"


def _deletion(conflict: Conflict, vhost: str) -> str:
    name = conflict.entity.name
    if conflict.kind == "exchange":
        return "delete the exchange (management UI; its bindings go with it, and publishing fails meanwhile)"
    if _is_users(conflict.entity):
        return f"replace it and keep its messages (`amqptasks topology migrate {shlex.quote(name)}`)"
    option = "" if vhost == "/" else f"-p {shlex.quote(vhost)} "
    command = f"rabbitmqctl {option}delete_queue {shlex.quote(name)}"
    return f"delete the queue once it is empty (management UI, or `{command}`)"


def _is_users(entity: Exchange | Queue) -> bool:
    """Whether it is a work queue of the settings, or its dead-letter queue."""
    return entity.origin in (f"queues.{entity.name}", f"queues.{entity.name.removesuffix('.dlq')}.dead_letter")


def _in_yaml(conflicts: Sequence[Conflict]) -> str | None:
    """How to write the live values into the settings; None for what has no setting."""
    entity = conflicts[0].entity
    if entity.origin == f"exchanges.{entity.name}":
        keys = _EXCHANGE_KEYS
    elif entity.origin == f"queues.{entity.name}":
        keys = _QUEUE_KEYS
    elif entity.origin == f"queues.{entity.name.removesuffix('.dlq')}.dead_letter":
        keys = _LETTER_KEYS
    else:
        return "set another topology.prefix"
    steps: list[str] = []
    arguments: list[str] = []
    letters_off = any(c.argument == "x-dead-letter-exchange" and c.live == _NONE for c in conflicts)
    if letters_off:
        steps.append("set dead_letter: {enabled: false}")
    for conflict in conflicts:
        if letters_off and conflict.argument.startswith("x-dead-letter-"):
            continue
        step = _step(conflict, keys)
        if step is not None:
            steps.append(step)
        elif keys is _LETTER_KEYS:
            return None
        else:  # An argument of null is one that is not sent.
            arguments.append(f"{conflict.argument}: {'null' if conflict.live == _NONE else conflict.live}")
    if arguments:
        steps.append(f"set arguments: {{{', '.join(arguments)}}}")
    return f"{' and '.join(steps)} in the YAML ({entity.origin})"


def _step(conflict: Conflict, keys: dict[str, tuple[str, bool]]) -> str | None:
    """The change of one key; None for an argument that has no key of its own, or whose key has a default."""
    if conflict.argument not in keys:
        return None
    key, in_seconds = keys[conflict.argument]
    if conflict.live != _NONE:
        value = f"{int(conflict.live) / 1000:g}" if in_seconds and conflict.live.isdigit() else conflict.live
        return f"set {key}: {value}"
    if key == "type":
        return "set type: classic"
    return None if key == "overflow" else f"leave out {key}"

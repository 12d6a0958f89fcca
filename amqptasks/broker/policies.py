"""Policies: which are in effect on a queue, and what they come to together. Pure.

A queue has one policy of its users and one operator policy at most, of each the matching one of highest priority. Where
both name a limit, the smaller one counts (RabbitMQ, "Operator Policies").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from amqptasks.topology.build import TOO_FEW_DELIVERIES
from amqptasks.topology.entities import Queue

__all__ = ["Policy", "effective", "losing", "losses"]

#: A policy with a key that a queue's type does not know is passed over for it.
_UNKNOWN = {
    "classic": frozenset({"delivery-limit"}),
    "stream": frozenset({"delivery-limit", "expires", "message-ttl", "max-length"}),
}
_OF_ALL_TYPES = frozenset({"expires", "message-ttl", "max-length", "max-length-bytes"})
#: Types that do not refuse these know them.
_CERTAIN = _OF_ALL_TYPES | {"delivery-limit"}
#: RabbitMQ 4's own limit. -1 is none.
_FEW_DELIVERIES = 20


@dataclass(frozen=True, slots=True)
class Policy:
    """What is in effect on a queue: names of its policy and operator policy ("" for none), and both together."""

    name: str = ""
    operator: str = ""
    definition: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> str:
        """Both names, as people are told."""
        return " and ".join(filter(None, [self.name, self.operator and f"operator policy {self.operator}"]))


def effective(
    queue: str, kind: str, own: tuple[str, Mapping[str, Any]] | None, operators: Iterable[Mapping[str, Any]]
) -> Policy:
    """What is in effect on a queue of this type, worked out.

    Args:
        own: name and definition of its users' policy.
        operators: the operator policies as the management API lists them. Of one whose keys not every type knows, and
            of an expression that Python does not know, it is taken that it applies.
    """
    name, definition = own or ("", {})
    result, names = dict(definition), []
    for one in sorted(operators, key=lambda one: -int(one.get("priority", 0))):
        if one.get("apply-to", "all") not in ("all", "queues", f"{kind}_queues") or not _matches(one, queue):
            continue
        if _UNKNOWN.get(kind, frozenset()) & set(one["definition"]):
            continue
        names.append(str(one["name"]))
        for key, value in one["definition"].items():
            result[key] = min(result[key], value) if isinstance(result.get(key), int) else value
        if _CERTAIN.issuperset(one["definition"]):
            break
    return Policy(name, ", ".join(names), result)


def _matches(policy: Mapping[str, Any], queue: str) -> bool:
    try:
        return re.search(str(policy["pattern"]), queue) is not None
    except re.error:
        return True  # Erlang's expressions know more than Python's


def losing(definition: Mapping[str, Any]) -> list[str]:
    """Keys of a policy by which a queue loses messages that only wait: they expire, are too many, or are taken back too
    often."""
    found = set(_OF_ALL_TYPES & set(definition))
    limit = definition.get("delivery-limit")
    if isinstance(limit, int) and 0 <= limit < _FEW_DELIVERIES:
        found.add("delivery-limit")
    return sorted(found)


def losses(queue: Queue, definition: Mapping[str, Any]) -> dict[str, str]:
    """Key of a policy -> how this queue loses messages by it. A queue with dead letters keeps what expires there."""
    arguments = dict(queue.arguments)
    found = {}
    if "expires" in definition:
        found["expires"] = f"the queue goes with its messages when unused for {_seconds(definition['expires'])}"
    if queue.kind == "stream" or "x-dead-letter-exchange" in arguments or "dead-letter-exchange" in definition:
        return found
    if "message-ttl" in definition:
        found["message-ttl"] = f"what waits longer than {_seconds(definition['message-ttl'])} is dropped"
    overflow = arguments.get("x-overflow", definition.get("overflow", "drop-head"))
    for key in ("max-length", "max-length-bytes"):
        if key in definition and overflow == "drop-head":
            found[key] = f"over {definition[key]} the oldest is dropped"
    limit = definition.get("delivery-limit")
    if isinstance(limit, int) and 0 <= limit <= TOO_FEW_DELIVERIES:
        found["delivery-limit"] = f"what came back more than {limit} times is dropped"
    return found


def _seconds(milliseconds: Any) -> str:
    return f"{milliseconds / 1000:g} s" if isinstance(milliseconds, int) else str(milliseconds)

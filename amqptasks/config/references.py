"""What names what: routes, bindings and tasks must name declared queues and exchanges, and names must be free."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from amqptasks.config.models import TopologySettings
from amqptasks.config.schema import Path

__all__ = ["broken_references"]

_MAX_NAME_BYTES = 200
#: Every virtual host has them (AMQP 0-9-1).
_BUILT_IN_EXCHANGES = ("amq.direct", "amq.topic", "amq.fanout", "amq.headers", "amq.match")
_TOPOLOGY = TopologySettings()


def broken_references(data: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """The key and the sentence for each name that points at nothing, or that the broker or the topology needs.

    `data` is as it was read: what has a wrong type is passed over, the models report it.
    """
    topology = _table(data, "topology")
    prefix = _text(topology.get("prefix")) or _TOPOLOGY.prefix
    default = _text(topology.get("default_queue")) or _TOPOLOGY.default_queue
    queues = [*_table(data, "queues"), default]
    exchanges = [*_table(data, "exchanges"), prefix]
    for path, kind, name in _names(data):
        declared = queues if kind == "queue" else exchanges
        if name not in declared and not (kind == "exchange" and name in _BUILT_IN_EXCHANGES):
            yield path, _undeclared(kind, name, list(dict.fromkeys(declared)))
    for name in _table(data, "queues"):
        problem = _bad_name(name, prefix)
        if problem:
            yield ("queues", name), problem
    if default not in _table(data, "queues"):
        problem = _bad_name(default, prefix)
        if problem:
            yield ("topology", "default_queue"), problem
    for name in _table(data, "exchanges"):
        problem = _bad_name(name, prefix)
        if problem:
            yield ("exchanges", name), problem


def _names(data: Mapping[str, Any]) -> Iterator[tuple[Path, str, str]]:
    """Every place that names a queue or exchange: path, kind, name."""
    routes = data.get("routes")
    for index, route in enumerate(routes if isinstance(routes, list | tuple) else ()):
        for kind in ("queue", "exchange"):
            name = _text(route.get(kind)) if isinstance(route, Mapping) else None
            if name is not None:
                yield ("routes", index, kind), kind, name
    for pattern in _table(data, "tasks"):
        name = _text(_table(data["tasks"], pattern).get("queue"))
        if name is not None:
            yield ("tasks", pattern, "queue"), "queue", name
    for queue in _table(data, "queues"):
        bindings = _table(data["queues"], queue).get("bindings")
        for index, binding in enumerate(bindings if isinstance(bindings, list | tuple) else ()):
            name = _text(binding.get("exchange")) if isinstance(binding, Mapping) else None
            if name is not None:
                yield ("queues", queue, "bindings", index, "exchange"), "exchange", name
    for entry in _table(data, "schedule"):
        for kind in ("queue", "exchange"):
            name = _text(_table(_table(data["schedule"], entry), "options").get(kind))
            if name is not None:
                yield ("schedule", entry, "options", kind), kind, name


def _table(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _undeclared(kind: str, name: str, declared: list[str]) -> str:
    near = get_close_matches(name, declared, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"declared: {', '.join(sorted(declared))}"
    return f"{kind} {name!r} is not declared; {hint}"


def _bad_name(name: str, prefix: str) -> str | None:
    """Why no queue or exchange can have this name."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "the name is not Unicode text (a lone surrogate)"
    if not name:
        return "the name is empty"
    if size > _MAX_NAME_BYTES:
        return f"the name has {size} bytes in UTF-8; {_MAX_NAME_BYTES} are the most"
    if any(unicodedata.category(character) == "Cc" for character in name):
        return "the name has a control character"
    if name.startswith("amq."):
        return "names that begin with 'amq.' belong to the broker"
    if name == prefix:
        return f"{prefix!r} is the name of the task exchange (topology.prefix)"
    if name.startswith(f"{prefix}."):
        return f"names that begin with '{prefix}.' belong to the topology (topology.prefix)"
    if name.endswith(".dlq"):
        return "names that end in '.dlq' belong to dead-letter queues"
    if name.startswith("@"):
        return "names that begin with '@' belong to the delay ladder, where they mark exchanges"
    if any(word in ("*", "#") for word in name.split(".")):
        return "'*' and '#' between dots are wildcards of topic exchanges"
    return None

"""`task_routes` and `task_annotations`: rules by the name of a task."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from amqptasks.config.models import TaskSettings
from amqptasks.conversion.values import literal, plain

__all__ = ["add_annotations", "add_routes", "need_queue"]

Say = Callable[[str, str], None]
_ROUTE_KEYS = ("queue", "exchange", "routing_key", "priority")


def need_queue(document: dict[str, Any], name: str) -> None:
    """A queue that something is sent to is declared."""
    document.setdefault("queues", {}).setdefault(name, {})


def add_routes(routes: Any, document: dict[str, Any], lost: Say) -> None:
    """Write `routes`. Within a table Celery looks for the very name first, and then for patterns in their order."""
    rules: list[dict[str, Any]] = []
    for router in [routes] if isinstance(routes, Mapping | str) or callable(routes) else list(routes or ()):
        if isinstance(router, str) or callable(router):
            name = router if isinstance(router, str) else getattr(router, "__qualname__", repr(router))
            lost("task_routes", f"the function {name} decides by itself; write its rules as routes")
            continue
        pairs = list(router.items() if isinstance(router, Mapping) else router)
        for pattern, options in sorted(pairs, key=lambda pair: _is_pattern(pair[0])):
            rule = _rule(pattern, {"queue": options} if isinstance(options, str) else dict(options or {}), lost)
            if rule is not None:
                rules.append(rule)
                if "queue" in rule:
                    need_queue(document, rule["queue"])
    if rules:
        document["routes"] = rules


def _is_pattern(name: Any) -> bool:
    return isinstance(name, re.Pattern) or "*" in name


def _rule(pattern: Any, options: dict[str, Any], lost: Say) -> dict[str, Any] | None:
    rule: dict[str, Any] = {}
    if isinstance(pattern, re.Pattern):
        flags = "i" if pattern.flags & re.IGNORECASE else ""
        rule["regex"] = f"^(?{flags}:{pattern.pattern})"  # Celery's match is at the beginning of the name
        shown = pattern.pattern
    else:
        shown = str(pattern)
        rule["match"] = shown if "*" in shown else literal(shown)
    for key, value in options.items():
        if key not in _ROUTE_KEYS:
            lost("task_routes", f"{shown}: {key}; options of a task stand in `tasks`")
        elif value is not None:
            rule[key] = plain(getattr(value, "name", value))  # a queue or an exchange may be kombu's object
    if "exchange" in rule and "queue" not in rule:
        lost("task_routes", f"{shown}: is the exchange {rule['exchange']} among `exchanges`?")
    if not rule.keys() & {"queue", "exchange", "priority"}:
        lost("task_routes", f"{shown}: it names no queue, exchange or priority")
        return None
    return rule


def add_annotations(annotations: Any, document: dict[str, Any], lost: Say) -> None:
    """Write `tasks`. Options for all tasks stand first: later patterns win."""
    for table in [annotations] if isinstance(annotations, Mapping) else list(annotations or ()):
        if not isinstance(table, Mapping):
            lost("task_annotations", f"{type(table).__name__} decides by itself; write its options in `tasks`")
            continue
        for name, options in sorted(table.items(), key=lambda pair: pair[0] != "*"):
            pattern = name if name == "*" else literal(name)  # nothing else is a pattern in Celery
            for option, value in options.items():
                if option == "acks_late":
                    lost("task_annotations", f"{name}: acks_late; tasks are always acknowledged after their outcome")
                elif option in TaskSettings.model_fields:
                    document.setdefault("tasks", {}).setdefault(pattern, {})[option] = plain(value)
                else:
                    lost("task_annotations", f"{name}: {option} has no counterpart in `tasks`")

"""`task_queues` and what belongs to it: queues, and the exchanges that they are bound to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from amqptasks.conversion.values import plain, seconds

__all__ = ["add_queues"]

Say = Callable[[str, str], None]
_KEY = "task_queues"
#: Argument of queue.declare -> key of a queue here, and how many of its units are one of theirs.
_ARGUMENTS = {
    "x-max-priority": ("max_priority", 1),
    "x-queue-type": ("type", 1),
    "x-message-ttl": ("message_ttl", 1000),
    "x-expires": ("expires", 1000),
    "x-max-length": ("max_length", 1),
    "x-max-length-bytes": ("max_length_bytes", 1),
    "x-delivery-limit": ("delivery_limit", 1),
    "x-overflow": ("overflow", 1),
    "x-consumer-timeout": ("consumer_timeout", 1000),
}
_DEAD_LETTERS = ("x-dead-letter-exchange", "x-dead-letter-routing-key", "x-dead-letter-strategy")
#: Attributes of kombu's Queue, in its units, which are ours.
_ATTRIBUTES = ("max_priority", "message_ttl", "expires", "max_length", "max_length_bytes")


def add_queues(found: Mapping[str, Any], document: dict[str, Any], look: Say, lost: Say) -> None:
    """Write queues, exchanges and the default queue."""
    default = str(found.get("task_default_queue", "celery"))
    queues: dict[str, Any] = {default: {}}
    for name, declared in _named(found.get(_KEY)):
        queues[name] = _queue(name, declared, document, look, lost)
    if "task_queue_max_priority" in found:
        for queue in queues.values():
            queue.setdefault("max_priority", int(found["task_queue_max_priority"]))
    if any(queue.get("max_priority", 0) > 10 for queue in queues.values()):
        look(_KEY, "more than ten priorities cost the broker memory and time in each queue")
    document["topology"] = {"default_queue": default}
    document["queues"] = queues


def _named(declared: Any) -> Iterator[tuple[str, Any]]:
    """Names, with a kombu Queue or a table of options: both forms of the setting."""
    if isinstance(declared, Mapping):
        yield from ((str(name), options or {}) for name, options in declared.items())
    else:
        yield from ((str(one) if isinstance(one, str) else str(one.name), one) for one in declared or ())


def _queue(name: str, declared: Any, document: dict[str, Any], look: Say, lost: Say) -> dict[str, Any]:
    if isinstance(declared, str):
        return {}
    table = isinstance(declared, Mapping)
    get: Callable[[str], Any] = declared.get if table else lambda key: getattr(declared, key, None)
    queue: dict[str, Any] = {}
    for key in _ATTRIBUTES:
        if (value := get(key)) is not None:
            queue[key] = plain(value)
    for key, value in (get("queue_arguments") or {}).items():
        _argument(name, key, value, queue, look)
    if get("auto_delete") or get("exclusive"):
        lost(
            _KEY,
            f"{name}: auto_delete and exclusive; a queue that holds work stays. `expires` deletes what nobody uses",
        )
    if get("durable") is False:
        lost(_KEY, f"{name}: durable is false; a queue that holds work survives the broker")
    _binding(name, get, queue, document)
    for one in get("bindings") or ():
        _bind(queue, document, one.exchange, one.routing_key)
    return queue


def _argument(name: str, key: str, value: Any, queue: dict[str, Any], look: Say) -> None:
    if key in _DEAD_LETTERS:
        look(_KEY, f"{name}: {key} = {value!r}; here {name}.dlq holds what fails for good, and what the broker drops")
    elif key in _ARGUMENTS:
        ours, unit = _ARGUMENTS[key]
        queue[ours] = value if unit == 1 else seconds(value / unit)
    else:
        queue.setdefault("arguments", {})[key] = plain(value)


def _binding(name: str, get: Callable[[str], Any], queue: dict[str, Any], document: dict[str, Any]) -> None:
    exchange, key = get("exchange"), get("routing_key") or get("binding_key")
    if isinstance(exchange, str):
        exchange = SimpleNamespace(name=exchange, type=get("exchange_type"))
    if exchange is not None and exchange.name not in ("", name):
        _bind(queue, document, exchange, key or "")


def _bind(queue: dict[str, Any], document: dict[str, Any], exchange: Any, routing_key: str) -> None:
    """So that whoever sends to that exchange today, reaches the queue."""
    document.setdefault("exchanges", {})[exchange.name] = {"type": str(exchange.type or "direct")}
    binding = {"exchange": exchange.name, "routing_key": routing_key}
    bindings = queue.setdefault("bindings", [])
    if binding not in bindings:
        bindings.append(binding)

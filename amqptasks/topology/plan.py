"""The way from what stands in the broker to what the settings declare, as a list of changes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from amqptasks.topology.build import DELIVERY_LIMIT, TOO_FEW_DELIVERIES, due_queue
from amqptasks.topology.entities import Binding, Exchange, Queue, Topology

__all__ = ["Change", "compare", "parking_queue", "queue_differences"]

Action = Literal["create", "bind", "unbind", "change", "foreign"]


@dataclass(frozen=True, slots=True)
class Change:
    """One difference.

    `create`, `bind`: `apply` makes it. `unbind`: `apply` removes it when told so. `change`: AMQP freezes arguments, so
    the queue or exchange must be replaced. `foreign`: it belongs to somebody else, and no difference.
    """

    action: Action
    kind: Literal["exchange", "queue", "binding"]
    name: str
    detail: str = ""
    binding: Binding | None = None

    @property
    def differs(self) -> bool:
        """Whether the broker is other than declared for it."""
        return self.action != "foreign"


def parking_queue(prefix: str, queue: str) -> str:
    """Name of the queue in which messages wait while theirs is replaced by ``amqptasks topology migrate``."""
    return f"{prefix}.migrating.{queue}"


def compare(desired: Topology, live: Topology, sent: Mapping[str, Mapping[str, Any]]) -> list[Change]:
    """What lies between `live` and `desired`, in the order in which it is carried out.

    Args:
        sent: the arguments that this broker is sent for each queue, which may be less than declared.
    """
    parked = _parked(desired, live)
    changes = [*_exchanges(desired, live), *_queues(desired, live, sent, parked), *_bindings(desired, live, parked)]
    return sorted(changes, key=lambda change: _ORDER.index(change.action))


_ORDER: list[Action] = ["create", "bind", "unbind", "change", "foreign"]


def _exchanges(desired: Topology, live: Topology) -> list[Change]:
    standing = {one.name: one for one in live.exchanges}
    changes = []
    for exchange in desired.exchanges:
        found = standing.pop(exchange.name, None)
        if exchange.name.startswith("amq."):
            continue
        if found is None:
            changes.append(Change("create", "exchange", exchange.name, exchange.type))
        elif found != exchange:
            changes.append(Change("change", "exchange", exchange.name, _exchange_difference(exchange, found)))
    return changes + [Change("foreign", "exchange", name, one.type) for name, one in standing.items()]


def _exchange_difference(wanted: Exchange, found: Exchange) -> str:
    names = ("type", "durable", "auto_delete", "internal")
    parts = [
        f"{name}: {getattr(found, name)} → {getattr(wanted, name)}"
        for name in names
        if getattr(found, name) != getattr(wanted, name)
    ]
    return ", ".join(parts + _arguments(dict(wanted.arguments), dict(found.arguments), frozenset()))


def _parked(desired: Topology, live: Topology) -> dict[str, str]:
    """Parking queue -> the queue that is being replaced."""
    endings = {parking_queue("", queue.name): queue.name for queue in desired.queues}
    found = {one.name: one.name.find(parking_queue("", "")) for one in live.queues}
    return {name: endings[name[at:]] for name, at in found.items() if at > 0 and name[at:] in endings}


def _queues(
    desired: Topology, live: Topology, sent: Mapping[str, Mapping[str, Any]], parked: Mapping[str, str]
) -> list[Change]:
    standing = {one.name: one for one in live.queues}
    changes = []
    for queue in desired.queues:
        found = standing.pop(queue.name, None)
        if found is None and queue.name in parked.values():
            changes.append(Change("change", "queue", queue.name, "deleted to be replaced: a migration is under way"))
            continue
        if found is None:
            changes.append(Change("create", "queue", queue.name, queue.kind))
            continue
        parts = queue_differences(queue, found, sent.get(queue.name, dict(queue.arguments)))
        if queue.name in parked.values():
            parts.append("a migration is under way")
        if parts:
            changes.append(Change("change", "queue", queue.name, ", ".join(parts)))
    others = [one for one in standing.values() if not one.exclusive and one.name not in parked]
    return changes + [Change("foreign", "queue", one.name, one.kind) for one in others]


def queue_differences(queue: Queue, found: Queue, sent: Mapping[str, Any]) -> list[str]:
    """What AMQP has frozen otherwise than `queue` declares it; `sent` are the arguments that this broker is sent."""
    parts = [f"durable: {found.durable} → {queue.durable}"] if found.durable != queue.durable else []
    live, taken = dict(found.arguments), queue.defaults
    few = live.get(DELIVERY_LIMIT)
    if isinstance(few, int) and 0 <= few <= TOO_FEW_DELIVERIES:
        taken -= {DELIVERY_LIMIT}  # so few looks at what must not be lost are no matter of taste
    return parts + _arguments({"x-queue-type": "classic", **sent}, live, taken)


def _arguments(wanted: Mapping[str, Any], found: Mapping[str, Any], defaults: frozenset[str]) -> list[str]:
    return [
        f"{name}: {found.get(name, 'none')} → {wanted.get(name, 'none')}"
        for name in sorted({*wanted, *found})
        if wanted.get(name) != found.get(name) and name not in defaults
    ]


def _bindings(desired: Topology, live: Topology, parked: Mapping[str, str]) -> list[Change]:
    wanted = {repr(_bare(one)): one for one in desired.bindings}
    standing = {repr(_bare(one)): one for one in live.bindings}
    # What leads to a parking queue meanwhile, the migration leads back: bound now, it would lead to both.
    diverted = {
        repr(_bare(replace(one, destination=parked[one.destination])))
        for one in live.bindings
        if one.destination in parked
    }
    changes = [
        Change("bind", "binding", _binding(one), binding=one)
        for key, one in wanted.items()
        if key not in standing and key not in diverted
    ]
    for key, one in standing.items():
        if key not in wanted:
            action: Action = "unbind" if _is_ours(desired, one) else "foreign"
            changes.append(Change(action, "binding", _binding(one), binding=one))
    return changes


def _is_ours(desired: Topology, one: Binding) -> bool:
    """Whether a binding leads from an exchange to a queue or exchange that both are declared here.

    Another application's queues may be bound to the same exchanges, and so are those that wait for what a rate limit
    lets pass, which code tells that may not be at hand, and a migration's parking queue.
    """
    if one.source.startswith("amq.") or desired.exchange(one.source) is None:
        return False
    if one.destination_type == "exchange":
        return desired.exchange(one.destination) is not None
    # What a queue without a length limit needs no more would give it each delayed message twice.
    _prefix, due, limited = one.destination.partition(due_queue("", ""))
    return desired.queue(one.destination) is not None or (bool(due) and desired.queue(limited) is not None)


def _bare(one: Binding) -> tuple[object, ...]:
    return one.source, one.destination, one.destination_type, one.routing_key, one.arguments


def _binding(one: Binding) -> str:
    target = "" if one.destination_type == "queue" else "exchange "
    return f"{one.source} — {one.routing_key or '(any)'} → {target}{one.destination}"

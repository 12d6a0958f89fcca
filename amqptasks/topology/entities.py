"""What stands in the broker, as values: exchanges, queues, bindings and their arguments.

An `origin` says which key of the YAML file an entity comes from, so that errors can name it. It takes no part in
comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Arguments", "Binding", "Exchange", "Queue", "Topology", "freeze_arguments"]

#: AMQP arguments as sorted (name, value) pairs: hashable as long as the values are, and stable in texts.
Arguments = tuple[tuple[str, Any], ...]


def freeze_arguments(table: Mapping[str, Any]) -> Arguments:
    """The table's pairs, sorted by name; those whose value is None are left out."""
    return tuple(sorted((key, value) for key, value in table.items() if value is not None))


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange (AMQP 0-9-1, exchange.declare)."""

    name: str
    type: str = "direct"
    durable: bool = True
    auto_delete: bool = False
    internal: bool = False
    arguments: Arguments = ()
    origin: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue (AMQP 0-9-1, queue.declare). `arguments` holds its type: ``x-queue-type``.

    Those named in `defaults` nobody asked for: a queue that stands with other values of them is taken as it is.
    """

    name: str
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Arguments = ()
    defaults: frozenset[str] = field(default=frozenset(), compare=False)
    origin: str = field(default="", compare=False)

    @property
    def kind(self) -> str:
        """``quorum``, ``classic`` or ``stream``."""
        return str(dict(self.arguments).get("x-queue-type", "classic"))


@dataclass(frozen=True, slots=True)
class Binding:
    """A binding from an exchange to a queue (queue.bind) or to another exchange (exchange.bind)."""

    source: str
    destination: str
    destination_type: Literal["queue", "exchange"] = "queue"
    routing_key: str = ""
    arguments: Arguments = ()
    origin: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything that an application needs in the broker, in an order in which it can be declared."""

    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()

    def queue(self, name: str) -> Queue | None:
        """The queue of that name."""
        return next((queue for queue in self.queues if queue.name == name), None)

    def exchange(self, name: str) -> Exchange | None:
        """The exchange of that name."""
        return next((exchange for exchange in self.exchanges if exchange.name == name), None)

    def routes(self, exchange: str, routing_key: str | None) -> bool:
        """Whether a message with this key finds a queue once the topology is declared.

        Exact for direct exchanges; any exchange of another type that has a binding counts. Without a key: whether the
        exchange belongs to the topology.
        """
        found = self.exchange(exchange)
        if found is None or routing_key is None:
            return found is not None
        bindings = [binding for binding in self.bindings if binding.source == exchange]
        if found.type == "direct":
            return any(binding.routing_key == routing_key for binding in bindings)
        return bool(bindings)

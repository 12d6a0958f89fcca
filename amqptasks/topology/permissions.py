"""Who needs what in the broker: the least that each role works with, as RabbitMQ's regular expressions.

RabbitMQ asks for *configure* to declare and delete, *write* to publish to an exchange and to bind a queue, *read* to
consume and to bind from an exchange (RabbitMQ, "Access Control"). A topology that stands is not declared again by a
user who may not: so only the operator configures it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from amqptasks.topology.build import dead_letter_exchange, joins_queue
from amqptasks.topology.delays import unroutable_exchange
from amqptasks.topology.entities import Topology

__all__ = ["NOTHING", "Permission", "permissions"]

NOTHING = "^$"
#: Every process that calls tasks has one queue for replies: <app>.reply.<host>.<pid>.<random>.
_REPLIES = r".+\.reply\..+"


@dataclass(frozen=True, slots=True)
class Permission:
    """One user's rights in a virtual host, and the tag for the management UI that goes with them."""

    configure: str
    write: str
    read: str
    tag: str = ""


def permissions(topology: Topology, prefix: str) -> dict[str, Permission]:
    """Role -> what it needs, for this topology. Roles: ``producer``, ``worker``, ``operator``, ``monitor``."""
    own = re.escape(prefix)
    inner = {dead_letter_exchange(prefix), unroutable_exchange(prefix)}
    ladder = rf"{own}\.delay\.\d\d"
    exchanges = [one.name for one in topology.exchanges if not one.name.startswith(f"{prefix}.delay.")]
    published = [ladder, *(re.escape(name) for name in exchanges if name not in inner)]
    queues = [queue.name for queue in topology.queues if not queue.name.startswith(f"{prefix}.")]
    work = [re.escape(name) for name in queues if not name.endswith(".dlq")]
    worker_reads = [*work, re.escape(joins_queue(prefix)), _REPLIES]
    # Replies go to the caller's queue by the default exchange, as Celery's do.
    worker_writes = [*published, re.escape(dead_letter_exchange(prefix)), r"amq\.default", _REPLIES]
    users = [re.escape(name) for name in exchanges if name != prefix and not name.startswith(f"{prefix}.")]
    everything = _any([rf"{own}(\..+)?", *users, *(re.escape(name) for name in queues), _REPLIES])
    return {
        "producer": Permission(_any([_REPLIES]), _any([*published, _REPLIES]), _any([_REPLIES])),
        "worker": Permission(_any([_REPLIES]), _any(worker_writes), _any(worker_reads)),
        "operator": Permission(everything, everything, everything, tag="management"),
        "monitor": Permission(NOTHING, NOTHING, NOTHING, tag="monitoring"),
    }


def _any(patterns: Iterable[str]) -> str:
    return f"^({'|'.join(dict.fromkeys(patterns))})$"

"""Who needs what in the broker: the least that each role works with, as RabbitMQ's regular expressions.

RabbitMQ asks for *configure* to declare and delete, *write* to publish to an exchange and to bind a queue, *read* to
consume and to bind from an exchange (RabbitMQ, "Access Control"). A topology that stands is not declared again by a
user who may not: so only the operator configures it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from amqptasks.topology.build import beat_queue, dead_letter_exchange, joins_queue, revoked_queue
from amqptasks.topology.delays import deliver_exchange, unroutable_exchange
from amqptasks.topology.entities import Topology

__all__ = ["NOTHING", "Needs", "Permission", "needs", "permissions"]

NOTHING = "^$"
_DEFAULT = r"amq\.default"
#: Every process that calls tasks has one queue for replies: <app>.reply.<host>.<pid>.<random>.
_REPLIES = r".+\.reply\..+"
#: Celery's exchange for events. Whoever is the first to send one declares it.
_EVENTS = "celeryev"
#: Remote control: the exchanges of requests and answers, and the queue of each worker's desk.
_REQUESTS, _ANSWERS, _DESKS = r"celery\.pidbox", r"reply\.celery\.pidbox", r".+\.celery\.pidbox"


@dataclass(frozen=True, slots=True)
class Permission:
    """One user's rights in a virtual host, and the tag for the management UI that goes with them."""

    configure: str
    write: str
    read: str
    tag: str = ""


def permissions(topology: Topology, prefix: str) -> dict[str, Permission]:
    """Role -> what it needs, for this topology. Roles: ``producer``, ``worker``, ``beat``, ``operator``,
    ``monitor``. A worker may be a beat too (``worker -B``).
    """
    own = re.escape(prefix)
    inner = {dead_letter_exchange(prefix), unroutable_exchange(prefix)}
    ladder = rf"{own}\.delay\.\d\d"
    exchanges = [one.name for one in topology.exchanges if not one.name.startswith(f"{prefix}.delay.")]
    published = [ladder, *(re.escape(name) for name in exchanges if name not in inner)]
    queues = [queue.name for queue in topology.queues if not queue.name.startswith(f"{prefix}.")]
    work = [re.escape(name) for name in queues if not name.endswith(".dlq")]
    # Which tasks have a rate limit is in their code, which may not be at hand.
    inner_queues = [re.escape(joins_queue(prefix)), re.escape(revoked_queue(prefix)), rf"{own}\.rate\..+"]
    beat_reads = re.escape(beat_queue(prefix))
    # Answers to commands go to the queue of who asks.
    beat_writes = [*published, *(re.escape(one(prefix)) for one in (deliver_exchange, unroutable_exchange)), _DEFAULT]
    worker_reads = [*work, *inner_queues, beat_reads, _REPLIES]
    # Replies go to the caller's queue by the default exchange, as Celery's do.
    worker_writes = [*beat_writes, re.escape(dead_letter_exchange(prefix)), _REPLIES]
    users = [re.escape(name) for name in exchanges if name != prefix and not name.startswith(f"{prefix}.")]
    all_of_it = [rf"{own}(\..+)?", *users, *(re.escape(name) for name in queues), _REPLIES, _REQUESTS, _ANSWERS]
    everything = _any(all_of_it)
    return {
        "producer": Permission(_any([_REPLIES, _EVENTS]), _any([*published, _REPLIES, _EVENTS]), _any([_REPLIES])),
        "worker": Permission(
            _any([_REPLIES, _EVENTS, _REQUESTS, _ANSWERS, _DESKS]),
            _any([*worker_writes, _EVENTS, _ANSWERS, _DESKS]),
            _any([*worker_reads, _REQUESTS, _DESKS]),
        ),
        "beat": Permission(NOTHING, _any(beat_writes), _any([beat_reads])),
        # Edited and imported dead letters, and the messages of a queue that is migrated, go by the default exchange.
        "operator": Permission(everything, _any([*all_of_it, _DEFAULT]), everything, tag="management"),
        "monitor": Permission(NOTHING, NOTHING, NOTHING, tag="monitoring"),
    }


@dataclass(frozen=True, slots=True)
class Needs:
    """Names of what a role cannot work without."""

    configure: tuple[str, ...]
    write: tuple[str, ...]
    read: tuple[str, ...]


def needs(topology: Topology, prefix: str) -> dict[str, Needs]:
    """What ``producer`` and ``worker`` need by all means, by name. What they can do without is not here: remote control
    and events."""
    reply = "app.reply.host.1.a"
    inner = {dead_letter_exchange(prefix), unroutable_exchange(prefix), deliver_exchange(prefix)}
    published = [one.name for one in topology.exchanges if one.name not in inner]
    own = (f"{prefix}.rate.", joins_queue(prefix), revoked_queue(prefix))
    read = [one.name for one in topology.queues if one.name.startswith(own)]
    read += [
        one.name for one in topology.queues if not one.name.startswith(f"{prefix}.") and not one.name.endswith(".dlq")
    ]
    return {
        "producer": Needs((reply,), tuple(published), (reply,)),
        "worker": Needs((reply,), (*published, dead_letter_exchange(prefix), "amq.default"), (*read, reply)),
    }


def _any(patterns: Iterable[str]) -> str:
    return f"^({'|'.join(dict.fromkeys(patterns))})$"

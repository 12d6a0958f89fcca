"""The delay ladder: any delay, durable, with a fixed number of queues and no plugin.

A delay is a whole number of ticks (1/8 s) in binary. Level *n* of the ladder holds a message for 2\\ :sup:`n` ticks: a
topic exchange looks at bit *n* of the routing key and sends the message either into the level's queue (bit 1, whose
messages expire into the next level) or straight on to the next level (bit 0). After level 0 the rest of the key
selects the target. The algorithm is the one of NServiceBus and kombu; ours enters at the highest set bit, and binds
targets exactly, so that ``orders`` does not also receive what is meant for ``eu.orders``.

Everything here is pure: names and keys, no broker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from amqptasks.topology.entities import Arguments, Binding, Exchange, Queue, freeze_arguments

__all__ = [
    "LADDER_LEVELS",
    "LADDER_MAX_SECONDS",
    "TARGET_MAX_BYTES",
    "TICK_SECONDS",
    "Ladder",
    "Target",
    "delay_key",
    "delayed",
    "deliver_exchange",
    "deliver_pattern",
    "exchange_target",
    "ladder",
    "level_name",
    "queue_target",
    "ticks",
    "undelayed_key",
    "unroutable_exchange",
]

LADDER_LEVELS = 25
#: 1/8 s is a power of two, so that the arithmetic below is exact in floating point; whole seconds need no extra hop.
TICK_SECONDS = 0.125
MAX_TICKS = (1 << LADDER_LEVELS) - 1
#: 48.5 days. Later ones keep their `eta` header, and the worker sends them up the ladder again.
LADDER_MAX_SECONDS = MAX_TICKS * TICK_SECONDS
#: AMQP's routing keys are short strings, 255 bytes; the bits and their dots take two bytes a level.
TARGET_MAX_BYTES = 255 - 2 * LADDER_LEVELS
#: First letter of a target that names an exchange; names of queues may not begin with it.
EXCHANGE_MARK = "@"


class Target(Protocol):
    """Where a message goes without a delay; `amqptasks.routing.Route` is one."""

    @property
    def exchange(self) -> str: ...
    @property
    def routing_key(self) -> str: ...
    @property
    def queue(self) -> str | None: ...


# --- names -----------------------------------------------------------------------------------------------------------


def level_name(prefix: str, level: int) -> str:
    """Name of a level's exchange and of its queue: ``amqptasks.delay.07``."""
    return f"{prefix}.delay.{level:02d}"


def deliver_exchange(prefix: str) -> str:
    """Name of the exchange at the ladder's foot, on which the targets are bound."""
    return f"{prefix}.delay.deliver"


def unroutable_exchange(prefix: str) -> str:
    """Name of the exchange and queue that keep what no target takes."""
    return f"{prefix}.unroutable"


# --- keys ------------------------------------------------------------------------------------------------------------


def ticks(seconds: float, *, significant_bits: int | None = None) -> int:
    """The delay in ticks, rounded up and capped at the ladder's maximum; 0 for a delay that is not positive.

    With `significant_bits` (7 is within 1.6 %) it is rounded up further, so that a message passes at most as many
    queues: right for retries, where nobody counts milliseconds.
    """
    if math.isnan(seconds):
        raise ValueError("a delay must be a number of seconds, not nan")
    if seconds <= 0:
        return 0
    if seconds >= LADDER_MAX_SECONDS:
        return MAX_TICKS
    count = math.ceil(seconds / TICK_SECONDS)
    if significant_bits is not None:
        grain = 1 << max(0, count.bit_length() - significant_bits)
        count = -(-count // grain) * grain
    return min(count, MAX_TICKS)


def queue_target(queue: str) -> str:
    """The target part of a ladder key for a queue, or for a key of the task exchange.

    Raises ValueError for a name that the ladder cannot carry: empty, over `TARGET_MAX_BYTES` in UTF-8, beginning with
    ``@`` (which marks exchanges), or with a word ``*`` or ``#`` (which a topic exchange takes for a wildcard).
    """
    if not queue:
        raise ValueError("a delayed message needs a queue, or an exchange with a routing key")
    if queue.startswith(EXCHANGE_MARK):
        raise ValueError(f"{queue!r} cannot be delayed: a name that begins with {EXCHANGE_MARK!r} marks an exchange")
    return _checked(queue, queue)


def exchange_target(exchange: str, routing_key: str) -> str:
    """The target part of a ladder key for an exchange of the user: ``@exchange.key``, or ``@exchange``.

    Dots in the exchange's name are escaped, so that exchange ``a`` with key ``b.c`` differs from ``a.b`` with ``c``.
    Raises ValueError as `queue_target` does.
    """
    word = EXCHANGE_MARK + exchange.replace("%", "%25").replace(".", "%2E")
    return _checked(f"{word}.{routing_key}" if routing_key else word, f"{exchange}:{routing_key}")


def _checked(target: str, what: str) -> str:
    size = len(target.encode())
    if size > TARGET_MAX_BYTES:
        raise ValueError(
            f"{what!r} cannot be delayed: its name takes {size} bytes, and a routing key in the delay ladder has "
            f"room for {TARGET_MAX_BYTES}"
        )
    wildcard = next((word for word in target.split(".") if word in ("*", "#")), None)
    if wildcard is not None:
        raise ValueError(f"{what!r} cannot be delayed: a topic exchange takes the word {wildcard!r} for a wildcard")
    return target


def delay_key(count: int, target: str) -> str:
    """The routing key for a delay of `count` ticks: 25 bits, the highest first, then the target."""
    if not 0 <= count <= MAX_TICKS:
        raise ValueError(f"a delay has 0 to {MAX_TICKS} ticks, not {count}")
    return f"{'.'.join(f'{count:0{LADDER_LEVELS}b}')}.{target}"


def undelayed_key(routing_key: str) -> str:
    """The key that a message had before its delay: the target's queue, or the key on the target's exchange.

    A key that did not come down the ladder is returned as it is.
    """
    words = routing_key.split(".", LADDER_LEVELS)
    if len(words) <= LADDER_LEVELS or any(word not in ("0", "1") for word in words[:LADDER_LEVELS]):
        return routing_key
    target = words[LADDER_LEVELS]
    return target.partition(".")[2] if target.startswith(EXCHANGE_MARK) else target


def delayed(
    prefix: str,
    route: Target,
    seconds: float,
    *,
    exchange_type: str | None = None,
    significant_bits: int | None = None,
) -> tuple[str, str]:
    """Where to publish so that the message reaches the route `seconds` from now: (exchange, routing key).

    Never early, and at most one tick late by design. No delay gives the route itself; one beyond
    `LADDER_MAX_SECONDS` is cut to that (keep the `eta` header: the worker delays the rest). A route that names a
    queue goes to this queue alone; one that names only an exchange passes the exchange's bindings at the end.

    `exchange_type` is the type of the route's exchange where it is known. Raises ValueError for what the ladder
    cannot carry: a headers exchange, since it routes by headers and not by keys, and keys as in `queue_target`.
    """
    count = ticks(seconds, significant_bits=significant_bits)
    if count == 0:
        return route.exchange, route.routing_key
    if route.queue is not None:
        target = queue_target(route.queue)
    elif route.exchange in ("", prefix):
        target = queue_target(route.routing_key)
    elif exchange_type == "headers":
        raise ValueError(
            f"a message to the headers exchange {route.exchange!r} cannot be delayed: the delay ladder routes by key. "
            "Name a queue, or a direct, topic or fanout exchange"
        )
    else:
        target = exchange_target(route.exchange, route.routing_key)
    return level_name(prefix, count.bit_length() - 1), delay_key(count, target)


# --- what stands in the broker ---------------------------------------------------------------------------------------


def deliver_pattern(target: str) -> str:
    """The binding key on the deliver exchange for a target or a target's pattern.

    One star a bit and nothing looser: ``#.orders`` would also match ``eu.orders``.
    """
    return "*." * LADDER_LEVELS + target


@dataclass(frozen=True, slots=True)
class Ladder:
    """The ladder's own entities, without its targets."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]


def ladder(prefix: str) -> Ladder:
    """The 25 levels and the deliver exchange, from the foot up, so that each level's next one already stands."""
    alternate: Arguments = freeze_arguments({"alternate-exchange": unroutable_exchange(prefix)})
    origin = "topology.prefix"
    following = deliver_exchange(prefix)
    exchanges = [Exchange(following, "topic", arguments=alternate, origin=origin)]
    queues: list[Queue] = []
    bindings: list[Binding] = []
    for level in range(LADDER_LEVELS):
        name = level_name(prefix, level)
        skipped = "*." * (LADDER_LEVELS - 1 - level)
        exchanges.append(Exchange(name, "topic", arguments=alternate, origin=origin))
        arguments = freeze_arguments(
            {
                "x-queue-type": "quorum",
                "x-message-ttl": round(TICK_SECONDS * 1000) << level,
                # No x-dead-letter-routing-key: the key with the remaining bits must stay.
                "x-dead-letter-exchange": following,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            }
        )
        queues.append(Queue(name, arguments=arguments, origin=origin))
        bindings.append(Binding(name, following, "exchange", f"{skipped}0.#", origin=origin))
        bindings.append(Binding(name, name, "queue", f"{skipped}1.#", origin=origin))
        following = name
    return Ladder(tuple(exchanges), tuple(queues), tuple(bindings))

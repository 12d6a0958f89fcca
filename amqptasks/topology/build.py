"""Settings into topology: every exchange, queue and binding that an application needs, in the order of declaring.

The order keeps messages safe while a topology comes up: a queue is bound to the task exchange last, when its way out
(dead letters, unroutable) stands already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from amqptasks.config.models import QueueSettings, Settings
from amqptasks.errors import ConfigError
from amqptasks.topology.delays import (
    deliver_exchange,
    deliver_pattern,
    exchange_target,
    ladder,
    queue_target,
    unroutable_exchange,
)
from amqptasks.topology.entities import Arguments, Binding, Exchange, Queue, Topology, freeze_arguments

__all__ = [
    "beat_queue",
    "build_topology",
    "dead_letter_exchange",
    "dead_letter_queue",
    "due_entity",
    "due_queue",
    "exact_limits",
    "joins_queue",
    "queue_arguments",
    "rate_entities",
    "rate_queue",
    "refuses_when_full",
    "revoked_queue",
]

#: Types of the exchanges that every virtual host has.
BUILT_IN_EXCHANGES = {
    "amq.direct": "direct",
    "amq.topic": "topic",
    "amq.fanout": "fanout",
    "amq.headers": "headers",
    "amq.match": "headers",
}
CONSUMER_TIMEOUT, DELIVERY_LIMIT = "x-consumer-timeout", "x-delivery-limit"
#: -1 says the same to RabbitMQ 4 only.
_NO_LIMIT = 1_000_000
#: People look at dead letters more often than this.
TOO_FEW_DELIVERIES = 1000
#: 30 days for the parts of a chord, which are acknowledged when it is complete.
_JOIN_SECONDS = 30 * 86400
#: RabbitMQ 4.3 refuses them, and 3.12 and later need neither.
REMOVED_ARGUMENTS = frozenset({"x-queue-mode", "x-queue-version"})


def dead_letter_exchange(prefix: str) -> str:
    """Name of the exchange that takes dead letters; the key is the work queue's name."""
    return f"{prefix}.dlx"


def dead_letter_queue(queue: str) -> str:
    """Name of the queue that keeps a work queue's dead letters."""
    return f"{queue}.dlq"


def due_queue(prefix: str, queue: str) -> str:
    """Name of the queue in which delayed messages wait for room in a queue that has a length limit."""
    return f"{prefix}.due.{queue}"


def joins_queue(prefix: str) -> str:
    """Name of the queue in which the parts of chords meet."""
    return f"{prefix}.joins"


def beat_queue(prefix: str) -> str:
    """Name of the queue that holds the schedule's state, and whose active consumer is the beat that leads."""
    return f"{prefix}.beat"


def revoked_queue(prefix: str) -> str:
    """Name of the stream that keeps the revokes."""
    return f"{prefix}.revoked"


def rate_queue(prefix: str, task: str, scope: str) -> str:
    """Name of the queue in which a task's messages wait for what its rate limit lets pass."""
    return f"{prefix}.rate.{task}" if scope == "cluster" else f"{prefix}.rate.@{scope}.{task}"


def rate_entities(prefix: str, task: str, scope: str) -> tuple[Queue, Binding]:
    """That queue, and what leads to it. Raises ConfigError for a task whose name is too long."""
    name = rate_queue(prefix, task, scope)
    if len(name.encode()) > 255:
        raise ConfigError(f"task {task:.60}…: a name with a rate limit has {255 - len(prefix) - 14} bytes at most")
    table = {
        "x-queue-type": "quorum",
        # What is held when its holder dies comes back, however often.
        "x-delivery-limit": 1_000_000,
        "x-single-active-consumer": True if scope == "cluster" else None,
    }
    origin = f"tasks.{task}.rate_limit"
    queue = Queue(name, arguments=freeze_arguments(table), origin=origin)
    return queue, Binding(prefix, name, routing_key=name, origin=origin)


def exact_limits(settings: Settings) -> dict[str, str]:
    """Task -> scope of the rate limits that the settings give to whole names, without a glob: all that is known of
    tasks where their code is not."""
    return {
        name: task.rate_limit_scope
        for name, task in settings.tasks.items()
        if task.rate_limit is not None and not any(sign in name for sign in "*?[")
    }


def build_topology(settings: Settings, limited: Mapping[str, str] = MappingProxyType({})) -> Topology:
    """The topology of these settings. The same settings give the same topology, in the same order.

    `limited` names the tasks with a rate limit and its scope, ``cluster`` or ``worker``.

    Raises ConfigError when a queue's or exchange's name is one that amqptasks needs for itself, or when the delay
    ladder cannot carry a queue's name.
    """
    prefix = settings.topology.prefix
    for name in settings.queues:
        _check_name(name)
    rungs = ladder(prefix)
    exchanges = [*_own_exchanges(prefix), *rungs.exchanges, *_user_exchanges(settings)]
    held = (joins_queue(prefix), beat_queue(prefix))
    queues = [_unroutable_queue(prefix), *rungs.queues, *map(_held_queue, held), _revoked_queue(prefix)]
    for name, queue in settings.queues.items():
        queues.extend(_queues_of(prefix, name, queue))
    bindings = [Binding(unroutable_exchange(prefix), unroutable_exchange(prefix), origin="topology.prefix")]
    bindings += rungs.bindings
    for name, queue in settings.queues.items():
        if queue.dead_letter.enabled:
            dlx, dlq = dead_letter_exchange(prefix), dead_letter_queue(name)
            bindings.append(Binding(dlx, dlq, routing_key=name, origin=f"queues.{name}.dead_letter"))
    work = list(_work_bindings(settings))
    for inner in (*held, revoked_queue(prefix)):
        bindings.append(Binding(prefix, inner, routing_key=inner, origin="topology.prefix"))
    for task, scope in sorted(limited.items()):
        waiting, way = rate_entities(prefix, task, scope)
        queues.append(waiting)
        bindings.append(way)
    bindings += [mirror for binding in work if (mirror := _mirror(settings, binding)) is not None]
    bindings += work
    _refuse_double(exchanges, "exchange")
    _refuse_double(queues, "queue")
    # By text, since the user's arguments may hold lists. A route often repeats what a queue's bindings say.
    unique = {repr(replace(binding, origin="")): binding for binding in reversed(bindings)}
    return Topology(tuple(exchanges), tuple(queues), tuple(reversed(unique.values())))


# --- exchanges -------------------------------------------------------------------------------------------------------


def _own_exchanges(prefix: str) -> Iterator[Exchange]:
    origin = "topology.prefix"
    unroutable = unroutable_exchange(prefix)
    alternate = freeze_arguments({"alternate-exchange": unroutable})
    yield Exchange(unroutable, "fanout", origin=origin)
    yield Exchange(dead_letter_exchange(prefix), arguments=alternate, origin=origin)
    # No alternate exchange here: it would make `mandatory` succeed silently, and callers must get Unroutable.
    yield Exchange(prefix, origin=origin)


def _user_exchanges(settings: Settings) -> Iterator[Exchange]:
    for name, exchange in settings.exchanges.items():
        yield Exchange(
            name,
            exchange.type,
            durable=exchange.durable,
            auto_delete=exchange.auto_delete,
            arguments=freeze_arguments(exchange.arguments),
            origin=f"exchanges.{name}",
        )


def _exchange_type(settings: Settings, name: str) -> str | None:
    if name == settings.topology.prefix:
        return "direct"
    declared = settings.exchanges.get(name)
    return declared.type if declared is not None else BUILT_IN_EXCHANGES.get(name)


# --- queues ----------------------------------------------------------------------------------------------------------


def queue_arguments(prefix: str, name: str, queue: QueueSettings) -> Arguments:
    """A work queue's arguments: type, dead-lettering, limits, then the user's own `arguments`, which win.

    Classic queues refuse ``x-dead-letter-strategy`` and ``x-delivery-limit`` (406), quorum queues ``x-max-priority``.
    What a version of RabbitMQ refuses is left out when it is declared (`amqptasks.broker.versions`).
    """
    quorum = queue.kind == "quorum"
    limited = queue.max_length is not None or queue.max_length_bytes is not None
    overflow = queue.overflow or ("reject-publish" if quorum or limited else None)
    table: dict[str, object] = {
        "x-queue-type": queue.kind,
        "x-max-priority": queue.max_priority,
        "x-message-ttl": _milliseconds(queue.message_ttl),
        "x-expires": _milliseconds(queue.expires),
        "x-max-length": queue.max_length,
        "x-max-length-bytes": queue.max_length_bytes,
        "x-overflow": overflow,
        CONSUMER_TIMEOUT: _milliseconds(queue.consumer_timeout),
    }
    if quorum:
        table[DELIVERY_LIMIT] = queue.delivery_limit
    if queue.dead_letter.enabled:
        table["x-dead-letter-exchange"] = dead_letter_exchange(prefix)
        # A message that came down the ladder carries the ladder's key, which the exchange could not route.
        table["x-dead-letter-routing-key"] = name
        if quorum:
            # at-least-once needs reject-publish: with drop-head RabbitMQ would fall back silently.
            reject = overflow == "reject-publish"
            table["x-dead-letter-strategy"] = "at-least-once" if reject else "at-most-once"
    table.update(queue.arguments)
    return freeze_arguments({key: value for key, value in table.items() if key not in REMOVED_ARGUMENTS})


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def refuses_when_full(arguments: Arguments) -> bool:
    """Whether a queue with these refuses what it has no room for."""
    table = dict(arguments)
    limited = "x-max-length" in table or "x-max-length-bytes" in table
    return limited and table.get("x-overflow", "drop-head") != "drop-head"


def _unroutable_queue(prefix: str) -> Queue:
    return _kept(unroutable_exchange(prefix), {"x-queue-type": "quorum"}, "topology.prefix")


def _kept(name: str, table: Mapping[str, object], origin: str) -> Queue:
    """A queue whose messages people look at, and put back.

    RabbitMQ 4.0 to 4.2 count that as a failed delivery, and drop a quorum queue's message at the 21st look.
    """
    if table["x-queue-type"] != "quorum":
        return Queue(name, arguments=freeze_arguments(table), origin=origin)
    arguments = freeze_arguments({**table, DELIVERY_LIMIT: _NO_LIMIT})
    return Queue(name, arguments=arguments, defaults=frozenset({DELIVERY_LIMIT}), origin=origin)


def _held_queue(name: str) -> Queue:
    """A queue whose messages one process holds unacknowledged, all of them.

    Parts of chords until their chord is complete, since they must meet in one process; the schedule's state always.
    """
    table = {
        "x-queue-type": "quorum",
        "x-single-active-consumer": True,
        # Each process that dies while it holds messages counts as a failed delivery; RabbitMQ 4.0 drops them at 20.
        DELIVERY_LIMIT: _NO_LIMIT,
        CONSUMER_TIMEOUT: _JOIN_SECONDS * 1000,
    }
    defaults = frozenset({CONSUMER_TIMEOUT})
    return Queue(name, arguments=freeze_arguments(table), defaults=defaults, origin="topology.prefix")


def _revoked_queue(prefix: str) -> Queue:
    """A stream: every worker reads all of it. What is too old or too much goes, a segment of a megabyte at a time."""
    table = {
        "x-queue-type": "stream",
        "x-max-age": "60D",
        "x-max-length-bytes": 32 * 1024 * 1024,
        "x-stream-max-segment-size-bytes": 1024 * 1024,
    }
    return Queue(revoked_queue(prefix), arguments=freeze_arguments(table), origin="topology.prefix")


def _queues_of(prefix: str, name: str, queue: QueueSettings) -> Iterator[Queue]:
    letters = queue.dead_letter
    if letters.enabled:
        # No dead-letter exchange of its own, so that nothing goes round; over its length the oldest letter is dropped.
        table = {
            "x-queue-type": letters.type,
            "x-message-ttl": _milliseconds(letters.ttl),
            "x-max-length": letters.max_length,
        }
        origin = f"queues.{name}.dead_letter"
        yield _kept(dead_letter_queue(name), table, origin)
    arguments = queue_arguments(prefix, name, queue)
    if refuses_when_full(arguments):
        yield due_entity(prefix, name)
    asked = "consumer_timeout" in queue.model_fields_set or CONSUMER_TIMEOUT in queue.arguments
    defaults = frozenset() if asked else frozenset({CONSUMER_TIMEOUT})
    yield Queue(name, durable=queue.durable, arguments=arguments, defaults=defaults, origin=f"queues.{name}")


def due_entity(prefix: str, name: str) -> Queue:
    """Takes due messages off the ladder for a queue that may be full.

    Each level has one dead-letter worker with 32 messages in flight: 32 messages that their target refuses would
    block the level for everybody. Here they wait where they hold up nobody else.
    """
    table = {
        "x-queue-type": "quorum",
        "x-message-ttl": 0,
        "x-dead-letter-exchange": prefix,
        "x-dead-letter-routing-key": name,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    return Queue(due_queue(prefix, name), arguments=freeze_arguments(table), origin=f"queues.{name}")


# --- bindings --------------------------------------------------------------------------------------------------------


def _work_bindings(settings: Settings) -> Iterator[Binding]:
    """What leads to the work queues: each one's name on the task exchange, the routes' keys, the queues' bindings."""
    prefix = settings.topology.prefix
    for name, queue in settings.queues.items():
        yield Binding(prefix, name, routing_key=name, origin=f"queues.{name}")
        for index, binding in enumerate(queue.bindings):
            yield Binding(
                binding.exchange,
                name,
                routing_key=binding.routing_key,
                arguments=freeze_arguments(binding.arguments),
                origin=f"queues.{name}.bindings[{index}]",
            )
    for index, rule in enumerate(settings.routes):
        if rule.queue is None or (rule.routing_key is None and rule.exchange is None):
            continue
        if rule.queue not in settings.queues:
            raise ConfigError(f"routes[{index}]: queue {rule.queue!r} is not one of `queues`")
        exchange = rule.exchange or prefix
        if _exchange_type(settings, exchange) == "headers":
            continue  # A binding without arguments would match every message.
        # The key that the router publishes with.
        key = rule.routing_key or rule.queue
        yield Binding(exchange, rule.queue, routing_key=key, origin=f"routes[{index}]")


def _mirror(settings: Settings, binding: Binding) -> Binding | None:
    """The same binding at the ladder's foot, so that a delayed message goes where it would have gone without.

    None for what `delayed` refuses too: headers exchanges, and keys that the ladder cannot carry.
    """
    prefix = settings.topology.prefix
    kind = _exchange_type(settings, binding.source)
    try:
        if binding.source == prefix:
            target = queue_target(binding.routing_key)
        elif kind == "direct":
            target = exchange_target(binding.source, binding.routing_key)
        elif kind == "topic":
            # The pattern's own wildcards are welcome; only its length counts.
            target = _join(exchange_target(binding.source, ""), binding.routing_key)
        elif kind == "fanout":
            target = _join(exchange_target(binding.source, ""), "#")
        else:
            return None
    except ValueError:
        return None
    pattern = deliver_pattern(target)
    if len(pattern.encode()) > 255:
        return None
    queue = settings.queues[binding.destination]
    full = refuses_when_full(queue_arguments(prefix, binding.destination, queue))
    destination = due_queue(prefix, binding.destination) if full else binding.destination
    return Binding(deliver_exchange(prefix), destination, routing_key=pattern, origin=binding.origin)


def _join(word: str, pattern: str) -> str:
    return f"{word}.{pattern}" if pattern else word


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_name(name: str) -> None:
    try:
        queue_target(name)
    except ValueError as error:
        raise ConfigError(f"queues.{name}: {error}. Rename the queue") from error


def _refuse_double(entities: Iterable[Exchange | Queue], kind: str) -> None:
    seen: dict[str, str] = {}
    for entity in entities:
        other = seen.setdefault(entity.name, entity.origin)
        if other != entity.origin:
            first, second = sorted((other, entity.origin), key=lambda origin: origin != f"{kind}s.{entity.name}")
            raise ConfigError(
                f"{first}: the {kind} {entity.name!r} is also what {second} declares. Rename it"
                + (", or set another topology.prefix" if second == "topology.prefix" else "")
            )

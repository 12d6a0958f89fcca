"""Depths and consumers: work that nobody takes, letters that nobody looks at."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from amqptasks.broker.counts import queue_counts
from amqptasks.broker.management import ManagementApi
from amqptasks.config import BrokerSettings, Settings
from amqptasks.doctor.findings import Finding, Level, counted
from amqptasks.errors import AmqpTasksError
from amqptasks.topology import dead_letter_queue, unroutable_exchange
from amqptasks.topology.build import dead_letter_exchange
from amqptasks.topology.entities import Topology

__all__ = ["check_queues"]

Queues = Mapping[str, Mapping[str, Any]]


def check_queues(api: ManagementApi, settings: Settings, topology: Topology) -> Iterator[Finding]:
    """Messages without a consumer, dead letters, also of queues that are not in the settings any more, unroutable
    messages. What the broker does not count is said to be unknown."""
    live = _counted_by_amqp(settings.broker, api.queues(), list(settings.queues))
    for name in settings.queues:
        if name in live:
            yield from _consumers(name, live[name], settings.app)
            yield from _letters(name, live.get(dead_letter_queue(name), {}))
    yield from _removed(api, live, settings, topology)
    yield from _turns(live, f"{settings.topology.prefix}.rate.")
    unroutable = unroutable_exchange(settings.topology.prefix)
    lost = live.get(unroutable, {}).get("messages", 0)
    if lost:
        yield Finding(
            Level.ERROR,
            "unroutable",
            f"{counted(lost, 'message')} in {unroutable}",
            "dead letters and delayed messages whose queue was gone",
            "amqptasks dlq list --unroutable",
        )


def _counted_by_amqp(broker: BrokerSettings, live: Queues, names: list[str]) -> Queues:
    """Consumers, which a broker without statistics does not tell, and of a new queue not at once."""
    unknown = [name for name in names if name in live and live[name].get("consumers") is None]
    found: dict[str, Mapping[str, Any]] = dict(live)
    with suppress(AmqpTasksError):
        for name, counts in queue_counts(broker, unknown).items() if unknown else ():
            if counts is not None:
                found[name] = {"messages_ready": counts[0], **live[name], "consumers": counts[1]}
    return found


def _consumers(name: str, queue: Mapping[str, Any], app: str | None) -> Iterator[Finding]:
    ready, consumers = queue.get("messages_ready"), queue.get("consumers")
    command = shlex.join(["amqptasks", *(["-A", app] if app else []), "worker", "-Q", name])
    if consumers is None or ready is None:
        yield Finding(
            Level.UNKNOWN,
            "consumers",
            f"queue {name}: how much waits and who consumes is not known",
            "the broker keeps no statistics, and tells this user no counts by AMQP",
            "rabbitmq.conf: management_agent.disable_metrics_collector = false",
        )
    elif not consumers:
        waiting = f"{counted(ready, 'message')} wait{'s' if ready == 1 else ''}, and " if ready else ""
        yield Finding(
            Level.WARNING if ready else Level.INFO,
            "consumers",
            f"queue {name}: {waiting}nobody consumes",
            "they wait until a worker starts" if ready else "what is sent there waits until a worker starts",
            command,
        )


def _letters(name: str, queue: Mapping[str, Any]) -> Iterator[Finding]:
    if queue and queue.get("messages") is None:
        yield Finding(
            Level.UNKNOWN,
            "dead letters",
            f"queue {name}: how many dead letters there are is not known",
            "the broker counts nothing for the management API",
            shlex.join(["amqptasks", "dlq", "list", "-Q", name]),
        )
    elif queue.get("messages"):
        yield Finding(
            Level.WARNING,
            "dead letters",
            f"queue {name}: {counted(queue['messages'], 'dead letter')}",
            "tasks failed for good, and nobody has looked",
            shlex.join(["amqptasks", "dlq", "list", "-Q", name]),
        )


def _turns(live: Queues, prefix: str) -> Iterator[Finding]:
    for name in sorted(one for one in live if one.startswith(prefix)):
        ready = live[name].get("messages_ready")
        if ready and live[name].get("consumers") == 0:
            yield Finding(
                Level.WARNING,
                "rate limits",
                f"{counted(ready, 'message')} of a limited task wait{'s' if ready == 1 else ''} in {name}, and nobody "
                "gives turns",
                "a worker does that knows of the limit; where the limit was taken away, what waits stays: lift it by 0",
                f"tasks: {{{name.removeprefix(prefix)}: {{rate_limit: 0}}}}",
            )


def _removed(api: ManagementApi, live: Queues, settings: Settings, topology: Topology) -> Iterator[Finding]:
    exchange = dead_letter_exchange(settings.topology.prefix)
    bound = {one.destination for one in api.topology().bindings if one.source == exchange}
    for letters in sorted(bound):
        name, depth = letters.removesuffix(".dlq"), live.get(letters, {}).get("messages")
        # Another application on the same prefix has workers.
        if topology.queue(letters) is not None or not depth or live.get(name, {}).get("consumers"):
            continue
        yield Finding(
            Level.WARNING,
            "dead letters",
            f"{letters}: {counted(depth, 'dead letter')} of a queue that the settings do not name",
            "nobody looks at them: without its name `amqptasks dlq` leaves them out",
            shlex.join(["amqptasks", "dlq", "list", "-Q", letters]),
        )

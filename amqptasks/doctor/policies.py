"""Policies that make queues lose messages, and delivery limits by which dead letters go when they are looked at."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from amqptasks.broker.management import ManagementApi
from amqptasks.broker.policies import Policy, losses
from amqptasks.doctor.findings import Finding, Level
from amqptasks.topology.build import DELIVERY_LIMIT, TOO_FEW_DELIVERIES
from amqptasks.topology.entities import Queue, Topology

__all__ = ["check_delivery_limits", "check_policies"]

_SHOWN = 3
_ENOUGH = 1_000_000
#: What quorum queues have from RabbitMQ 4.0 on when nobody says anything.
_DEFAULT_LIMIT = 20


def check_policies(api: ManagementApi, topology: Topology) -> Iterator[Finding]:
    """Policies by which a queue without dead letters loses messages, or is deleted with them."""
    found: dict[tuple[str, str, str], list[str]] = {}
    given = api.policies()
    for name, policy in given.items():
        queue = topology.queue(name)
        for key, text in losses(queue, policy.definition).items() if queue is not None else ():
            if key != "delivery-limit" or not _is_looked_at(queue):
                found.setdefault((policy.names, key, text), []).append(name)
    for (names, key, text), queues in found.items():
        more = f" and {len(queues) - _SHOWN} more" if len(queues) > _SHOWN else ""
        yield Finding(
            Level.WARNING,
            "policies",
            f"{', '.join(queues[:_SHOWN])}{more}: {key} of the policy {names}: {text}",
            "messages are lost, and no dead letter is kept",
            _without(api, given[queues[0]], key),
        )


def _is_looked_at(queue: Queue | None) -> bool:
    return queue is not None and DELIVERY_LIMIT in queue.defaults


def check_delivery_limits(api: ManagementApi, topology: Topology, version: tuple[int, int]) -> Iterator[Finding]:
    """Queues of dead letters that drop one after so many looks. Of argument and policy the smaller limit counts."""
    live, policies = api.topology(), api.policies()
    for queue in topology.queues:
        standing = live.queue(queue.name)
        if not _is_looked_at(queue) or standing is None or standing.kind != "quorum":
            continue
        policy = policies.get(queue.name, Policy())
        argument, limit = dict(standing.arguments).get(DELIVERY_LIMIT), policy.definition.get("delivery-limit")
        given = [one for one in (argument, limit) if isinstance(one, int)]
        effective = min((one for one in given if one >= 0), default=_ENOUGH)
        if not given and version >= (4, 0):
            effective = _DEFAULT_LIMIT
        if effective > TOO_FEW_DELIVERIES:
            continue
        by_argument = argument is not None and effective == argument
        source = (
            "an argument of the queue" if by_argument else f"policy {policy.names}" if given else "RabbitMQ's default"
        )
        yield Finding(
            Level.ERROR,
            "delivery limit",
            f"queue {queue.name}: a delivery limit of {effective} ({source})",
            f"each look at a dead letter counts as a delivery: after {effective} of them it is dropped",
            _anew(queue) if by_argument else _raised(api, queue.name, policy),
        )


# --- commands --------------------------------------------------------------------------------------------------------


def _anew(queue: Queue) -> str:
    if queue.origin == "topology.prefix":
        name = shlex.quote(queue.name)
        return f"rabbitmqctl delete_queue --if-empty {name} && amqptasks topology apply"
    return shlex.join(["amqptasks", "topology", "migrate", queue.name])


def _raised(api: ManagementApi, queue: str, policy: Policy) -> str:
    """A policy of its own for the queue, above the one that is in effect."""
    operator = "delivery-limit" in _definition(api, policy.operator, operator=True)
    kind = "operator-policies" if operator else "policies"
    above = max((int(one.get("priority", 0)) for one in api.get(f"{kind}/{{vhost}}")), default=0) + 1
    own = _definition(api, policy.operator if operator else policy.name, operator=operator)
    definition = {**own, "delivery-limit": _ENOUGH}
    name = f"looks-at-{queue}"
    return _set(api, name, f"^{re.escape(queue)}$", definition, above, "queues", operator=operator)


def _without(api: ManagementApi, policy: Policy, key: str) -> str:
    """The same policy without a key, or none where nothing is left."""
    operator = key in _definition(api, policy.operator, operator=True)
    name = policy.operator.partition(", ")[0] if operator else policy.name
    record = _record(api, name, operator=operator)
    rest = {one: value for one, value in record.get("definition", {}).items() if one != key}
    if not rest:
        return shlex.join(["rabbitmqctl", f"clear{'_operator' if operator else ''}_policy", "-p", api.vhost, name])
    pattern, priority, applies = record["pattern"], int(record.get("priority", 0)), record.get("apply-to", "all")
    return _set(api, name, pattern, rest, priority, applies, operator=operator)


def _record(api: ManagementApi, name: str, *, operator: bool) -> Mapping[str, Any]:
    known = api.get(f"{'operator-' if operator else ''}policies/{{vhost}}")
    return next((one for one in known if one["name"] == name), {})


def _definition(api: ManagementApi, name: str, *, operator: bool) -> Mapping[str, Any]:
    found: Mapping[str, Any] = _record(api, name, operator=operator).get("definition", {}) if name else {}
    return found


def _set(
    api: ManagementApi,
    name: str,
    pattern: str,
    definition: Mapping[str, Any],
    priority: int,
    to: str,
    *,
    operator: bool,
) -> str:
    command = f"set{'_operator' if operator else ''}_policy"
    options = ["-p", api.vhost, "--priority", str(priority), "--apply-to", to]
    return shlex.join(["rabbitmqctl", command, *options, name, pattern, json.dumps(definition)])

"""A topology for those who declare with other tools: RabbitMQ's definitions, Kubernetes manifests. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from amqptasks.topology.entities import Topology

__all__ = ["definitions", "manifests"]

#: A Kubernetes object's name (RFC 1123 subdomain) may have 253 characters; these leave room for a kind and a digest.
_LONGEST = 200

Sent = Mapping[str, Mapping[str, Any]]


def definitions(topology: Topology, vhost: str, sent: Sent) -> dict[str, Any]:
    """What ``rabbitmqctl import_definitions`` and ``POST /api/definitions`` take.

    Importing makes what is missing. What stands with other arguments RabbitMQ leaves as it is.

    Args:
        sent: queue -> the arguments that the broker takes, which may be less than declared.
    """
    return {
        "vhosts": [{"name": vhost}],
        "exchanges": [
            {
                "name": one.name,
                "vhost": vhost,
                "type": one.type,
                "durable": one.durable,
                "auto_delete": one.auto_delete,
                "internal": one.internal,
                "arguments": dict(one.arguments),
            }
            for one in topology.exchanges
            if not _built_in(one.name)
        ],
        "queues": [
            {
                "name": one.name,
                "vhost": vhost,
                "durable": one.durable,
                "auto_delete": one.auto_delete,
                "arguments": dict(sent.get(one.name, dict(one.arguments))),
            }
            for one in topology.queues
        ],
        "bindings": [
            {
                "source": one.source,
                "vhost": vhost,
                "destination": one.destination,
                "destination_type": one.destination_type,
                "routing_key": one.routing_key,
                "arguments": dict(one.arguments),
            }
            for one in topology.bindings
        ],
    }


def manifests(topology: Topology, vhost: str, sent: Sent, cluster: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Custom resources of the Messaging Topology Operator, ``rabbitmq.com/v1beta1``: exchanges, queues, bindings.

    A queue's resource says ``deletionPolicy: retain``: deleting it deletes no messages.

    Args:
        sent: as for `definitions`. cluster: the ``rabbitmqClusterReference``: ``name``, and ``namespace`` if another.
    """
    for exchange in topology.exchanges:
        if not _built_in(exchange.name):
            spec: dict[str, Any] = {
                "name": exchange.name,
                "type": exchange.type,
                "durable": exchange.durable,
                "autoDelete": exchange.auto_delete,
                **_arguments(dict(exchange.arguments)),
            }
            yield _resource("Exchange", exchange.name, spec, vhost, cluster)
    for queue in topology.queues:
        spec = {
            "name": queue.name,
            "type": queue.kind,
            "durable": queue.durable,
            "autoDelete": queue.auto_delete,
            "deletionPolicy": "retain",
            **_arguments(sent.get(queue.name, dict(queue.arguments))),
        }
        yield _resource("Queue", queue.name, spec, vhost, cluster)
    for binding in topology.bindings:
        spec = {
            "source": binding.source,
            "destination": binding.destination,
            "destinationType": binding.destination_type,
            "routingKey": binding.routing_key,
            **_arguments(dict(binding.arguments)),
        }
        rest = repr((binding.routing_key, binding.arguments, binding.destination_type))
        yield _resource("Binding", f"{binding.source}--{binding.destination}", spec, vhost, cluster, salt=rest)


def _resource(
    kind: str, name: str, spec: dict[str, Any], vhost: str, cluster: Mapping[str, str], *, salt: str = ""
) -> dict[str, Any]:
    return {
        "apiVersion": "rabbitmq.com/v1beta1",
        "kind": kind,
        "metadata": {"name": _kubernetes_name(name, vhost + salt)},
        "spec": {**spec, "vhost": vhost, "rabbitmqClusterReference": dict(cluster)},
    }


def _kubernetes_name(name: str, salt: str) -> str:
    """Lower-case letters, digits, dashes and dots; a digest at its end, since several names would become the same."""
    plain = re.sub(r"[^a-z0-9.-]+", "-", name.lower())
    # Between dots there must be something that begins and ends with a letter or digit.
    words = [word.strip("-") for word in plain[:_LONGEST].split(".")]
    digest = hashlib.sha256(f"{name}\n{salt}".encode()).hexdigest()[:8]
    return "-".join([".".join(word for word in words if word), digest]).lstrip("-")


def _arguments(table: Mapping[str, Any]) -> dict[str, Any]:
    return {"arguments": dict(table)} if table else {}


def _built_in(exchange: str) -> bool:
    return exchange.startswith("amq.")

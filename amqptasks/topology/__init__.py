"""What stands in the broker, as pure values: settings to entities, and the delay ladder."""

from __future__ import annotations

from amqptasks.topology.build import (
    build_topology,
    dead_letter_exchange,
    dead_letter_queue,
    due_queue,
    queue_arguments,
)
from amqptasks.topology.delays import LADDER_MAX_SECONDS, delay_key, delayed, undelayed_key, unroutable_exchange
from amqptasks.topology.entities import Arguments, Binding, Exchange, Queue, Topology, freeze_arguments

__all__ = [
    "LADDER_MAX_SECONDS",
    "Arguments",
    "Binding",
    "Exchange",
    "Queue",
    "Topology",
    "build_topology",
    "dead_letter_exchange",
    "dead_letter_queue",
    "delay_key",
    "delayed",
    "due_queue",
    "freeze_arguments",
    "queue_arguments",
    "undelayed_key",
    "unroutable_exchange",
]

"""What a parking queue says of the migration that made it."""

from __future__ import annotations

import pytest

from amqptasks.config import Settings
from amqptasks.errors import ConfigError
from amqptasks.migration.state import former_queue, look_at, parking
from amqptasks.topology import Binding, Queue, build_topology, freeze_arguments
from amqptasks.topology.entities import Topology


def test_a_parking_queue_tells_what_the_queue_was() -> None:
    former = Queue("email", durable=False, arguments=freeze_arguments({"x-max-priority": 5, "x-queue-type": "classic"}))
    wanted = build_topology(Settings.model_validate({"queues": {"default": {}, "email": {}}})).queue("email")
    assert wanted is not None
    parked = parking("parked", former, wanted)
    arguments = dict(parked.arguments)
    assert parked.kind == "quorum"
    assert arguments["x-dead-letter-routing-key"] == "email"
    assert arguments["x-dead-letter-strategy"] == "at-least-once"
    assert "x-message-ttl" not in arguments
    assert former_queue(parked, "email") == former


def test_without_dead_letters_the_parking_queue_has_none_either() -> None:
    assert "x-dead-letter-strategy" not in dict(parking("parked", Queue("email"), Queue("email")).arguments)


@pytest.mark.parametrize("value", [None, "", "[]", "{}", '{"durable": true}', 7])
def test_a_queue_of_that_name_that_no_migration_made_is_left_alone(value: object) -> None:
    with pytest.raises(ConfigError, match="that no migration made"):
        former_queue(Queue("parked", arguments=freeze_arguments({"x-amqptasks-replaces": value})), "email")


def test_a_look_takes_the_bindings_of_queues_and_not_of_exchanges_of_the_same_name() -> None:
    bindings = (Binding("tasks", "email"), Binding("tasks", "email", "exchange"), Binding("tasks", "parked"))
    look = look_at(Topology((), (Queue("email"),), bindings), {"email": (3, "a node")}, "email", "parked")
    assert (look.queue, look.parked) == (Queue("email"), None)
    assert (look.bound, look.diverted) == (bindings[:1], bindings[2:])
    assert (look.depth("email"), look.depth("parked")) == (3, 0)

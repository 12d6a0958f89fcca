"""The plan, as far as it needs no broker."""

from __future__ import annotations

from dataclasses import replace

from amqptasks.config import Settings
from amqptasks.topology import Binding, Queue, build_topology
from amqptasks.topology.entities import Topology
from amqptasks.topology.plan import compare, parking_queue


def test_a_migration_that_is_under_way_is_a_change_of_its_queue_and_what_leads_to_its_parking_queue_stays() -> None:
    desired = build_topology(Settings.model_validate({"queues": {"default": {}, "email": {}}}))
    parked = parking_queue("amqptasks", "email")
    gone = [one for one in desired.bindings if one.destination == "email"]
    stray = Binding("amqptasks", "amqptasks.migrating.nosuch", routing_key="x")
    live = Topology(
        desired.exchanges,
        (*desired.queues, Queue(parked), Queue("amqptasks.migrating.nosuch")),
        (
            *(one for one in desired.bindings if one not in gone),
            *(Binding(one.source, parked, routing_key=one.routing_key) for one in gone),
            stray,
        ),
    )
    # What the migration leads back is nothing to bind, also between the old queue and the new one.
    without = replace(live, queues=tuple(one for one in live.queues if one.name != "email"))
    for seen in (live, without):
        changes = compare(desired, seen, {})
        assert {(one.action, one.name) for one in changes} == {
            ("foreign", "amqptasks — x → amqptasks.migrating.nosuch"),
            ("change", "email"),
            ("foreign", "amqptasks.migrating.nosuch"),
            *(("foreign", f"{one.source} — {one.routing_key} → {parked}") for one in gone),
        }
        assert ["a migration is under way" in one.detail for one in changes if one.action == "change"] == [True]


def test_a_binding_that_is_missing_during_a_migration_though_nothing_was_led_elsewhere_is_told() -> None:
    desired = build_topology(Settings.model_validate({"queues": {"email": {}}}))
    parked = Queue(parking_queue("amqptasks", "email"))
    live = Topology(
        desired.exchanges,
        (*desired.queues, parked),
        tuple(one for one in desired.bindings if one.source != "amqptasks" or one.destination != "email"),
    )
    changes = {(one.action, one.name) for one in compare(desired, live, {})}
    assert ("bind", "amqptasks — email → email") in changes

"""Settings into topology, without a broker."""

from __future__ import annotations

from typing import Any

import pytest

from amqptasks.config.models import Settings
from amqptasks.errors import ConfigError
from amqptasks.topology import Binding, Exchange, Topology, build_topology, delayed
from amqptasks.topology.build import exact_limits
from amqptasks.topology.delays import deliver_pattern
from amqptasks.topology.plan import compare


def built(**data: Any) -> Topology:
    data.setdefault("queues", {"default": {}})
    return build_topology(Settings.model_validate(data))


def arguments(topology: Topology, name: str) -> dict[str, Any]:
    queue = topology.queue(name)
    assert queue is not None, f"{name} is not declared"
    return dict(queue.arguments)


def of_queue(**queue: Any) -> dict[str, Any]:
    return arguments(built(queues={"email": queue}), "email")


def keys(topology: Topology, source: str, destination: str) -> list[str]:
    return [b.routing_key for b in topology.bindings if (b.source, b.destination) == (source, destination)]


def test_a_work_queue_is_quorum_and_keeps_its_dead_letters_at_least_once():
    assert of_queue() == {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "amqptasks.dlx",
        "x-dead-letter-routing-key": "email",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-consumer-timeout": 30 * 86_400_000,
    }


def test_a_priority_queue_is_classic_and_carries_no_argument_that_classic_queues_refuse():
    assert of_queue(max_priority=10) == {
        "x-queue-type": "classic",
        "x-max-priority": 10,
        "x-dead-letter-exchange": "amqptasks.dlx",
        "x-dead-letter-routing-key": "email",
        "x-consumer-timeout": 30 * 86_400_000,
    }


def test_limits_and_times_become_arguments_in_the_brokers_units():
    declared = of_queue(
        message_ttl=1.5,
        expires=3600,
        max_length=100,
        max_length_bytes=10**10,
        delivery_limit=5,
        consumer_timeout=60,
    )
    assert declared == of_queue() | {
        "x-message-ttl": 1500,
        "x-expires": 3_600_000,
        "x-max-length": 100,
        "x-max-length-bytes": 10**10,
        "x-delivery-limit": 5,
        "x-consumer-timeout": 60_000,
    }


def test_drop_head_is_allowed_and_then_dead_letters_are_at_most_once():
    declared = of_queue(overflow="drop-head", max_length=5)
    assert (declared["x-overflow"], declared["x-dead-letter-strategy"]) == ("drop-head", "at-most-once")


def test_a_limited_classic_queue_refuses_messages_too_unless_told_otherwise():
    assert of_queue(type="classic", max_length=5)["x-overflow"] == "reject-publish"
    assert of_queue(type="classic", max_length=5, overflow="drop-head")["x-overflow"] == "drop-head"
    assert "x-overflow" not in of_queue(type="classic")


def test_without_dead_letters_there_is_neither_a_dead_letter_queue_nor_an_argument_for_one():
    topology = built(queues={"email": {"dead_letter": {"enabled": False}}})
    assert not [name for name in arguments(topology, "email") if name.startswith("x-dead-letter")]
    assert topology.queue("email.dlq") is None
    assert keys(topology, "amqptasks.dlx", "email.dlq") == []


def test_the_users_own_arguments_win_and_null_leaves_one_out():
    declared = of_queue(
        arguments={"x-single-active-consumer": True, "x-overflow": "drop-head", "x-dead-letter-strategy": None}
    )
    assert declared["x-single-active-consumer"] is True
    assert declared["x-overflow"] == "drop-head"
    assert "x-dead-letter-strategy" not in declared


def test_a_consumer_timeout_that_nobody_asked_for_is_no_conflict_with_a_queue_that_stands():
    topology = built(
        queues={
            "by-default": {},
            "asked": {"consumer_timeout": 60},
            "left-out": {"consumer_timeout": None},
            "by-argument": {"arguments": {"x-consumer-timeout": 60_000}},
        }
    )
    assert [q.name for q in topology.queues if "x-consumer-timeout" in q.defaults] == [
        "amqptasks.joins",
        "amqptasks.beat",
        "by-default",
        "default",
    ]
    assert "x-consumer-timeout" not in arguments(topology, "left-out")


def test_arguments_that_newer_brokers_refuse_are_never_sent():
    declared = of_queue(type="classic", arguments={"x-queue-mode": "lazy", "x-queue-version": 1})
    assert not {"x-queue-mode", "x-queue-version"} & declared.keys()


def test_what_people_look_at_and_put_back_is_never_dropped_for_it():
    topology = built(queues={"email": {}})
    for name in ("email.dlq", "amqptasks.unroutable"):
        assert arguments(topology, name)["x-delivery-limit"] == 1_000_000
        (queue,) = [q for q in topology.queues if q.name == name]
        assert queue.defaults == {"x-delivery-limit"}, "a queue that stands without it is taken as it is"


def test_a_dead_letter_queue_has_its_own_type_and_limits_and_no_dead_letters_of_its_own():
    topology = built(queues={"email": {"dead_letter": {"type": "classic", "ttl": 60, "max_length": 10}}})
    assert arguments(topology, "email.dlq") == {
        "x-queue-type": "classic",
        "x-message-ttl": 60_000,
        "x-max-length": 10,
    }
    assert keys(topology, "amqptasks.dlx", "email.dlq") == ["email"]


def test_the_task_exchange_has_no_alternate_so_that_callers_learn_of_unroutable_messages():
    topology = built()
    assert topology.exchange("amqptasks") == Exchange("amqptasks", "direct")


def test_what_no_caller_can_be_told_about_is_kept_in_the_unroutable_queue():
    topology = built()
    silent = [e for e in topology.exchanges if e.name.startswith("amqptasks.delay.") or e.name == "amqptasks.dlx"]
    assert len(silent) == 27
    assert all(dict(e.arguments) == {"alternate-exchange": "amqptasks.unroutable"} for e in silent)
    assert topology.exchange("amqptasks.unroutable") == Exchange("amqptasks.unroutable", "fanout")
    assert keys(topology, "amqptasks.unroutable", "amqptasks.unroutable") == [""]


def test_every_queue_is_bound_by_its_name_with_and_without_delay():
    topology = built(queues={"default": {}, "eu.orders": {}})
    assert keys(topology, "amqptasks", "eu.orders") == ["eu.orders"]
    assert keys(topology, "amqptasks.delay.deliver", "eu.orders") == [deliver_pattern("eu.orders")]


def test_a_route_with_a_queue_and_a_key_is_bound():
    topology = built(
        queues={"default": {}, "email": {}, "media": {}},
        exchanges={"tasks": {"type": "topic"}},
        routes=[
            {"match": "email.*", "queue": "email", "routing_key": "email.bulk"},
            {"regex": "^image", "queue": "media", "exchange": "tasks", "routing_key": "image.resize"},
        ],
    )
    assert keys(topology, "amqptasks", "email") == ["email", "email.bulk"]
    assert keys(topology, "tasks", "media") == ["image.resize"]
    deliver = "amqptasks.delay.deliver"
    assert keys(topology, deliver, "email") == [deliver_pattern("email"), deliver_pattern("email.bulk")]
    assert keys(topology, deliver, "media") == [deliver_pattern("media"), deliver_pattern("@tasks.image.resize")]


@pytest.mark.parametrize(
    ("kind", "key", "mirrored"),
    [
        ("direct", "a.b", ["@x.a.b"]),
        ("direct", "", ["@x"]),
        ("direct", "a.*", []),
        ("topic", "image.#", ["@x.image.#"]),
        ("topic", "#", ["@x.#"]),
        ("fanout", "whatever", ["@x.#"]),
        ("headers", "", []),
        ("direct", "k" * 220, []),
        ("topic", "k" * 220, []),
    ],
)
def test_a_binding_of_a_users_exchange_is_repeated_at_the_ladders_foot(kind, key, mirrored):
    topology = built(
        exchanges={"x": {"type": kind}},
        queues={"media": {"bindings": [{"exchange": "x", "routing_key": key}]}},
    )
    assert keys(topology, "x", "media") == [key]
    expected = [deliver_pattern("media"), *map(deliver_pattern, mirrored)]
    assert keys(topology, "amqptasks.delay.deliver", "media") == expected


def test_a_route_to_a_headers_exchange_makes_no_binding_that_would_match_everything():
    topology = built(
        exchanges={"x": {"type": "headers"}},
        queues={"default": {}, "media": {"bindings": [{"exchange": "x", "arguments": {"kind": "big"}}]}},
        routes=[{"match": "image.*", "exchange": "x", "queue": "media"}],
    )
    bindings = [b for b in topology.bindings if b.source == "x"]
    assert bindings == [Binding("x", "media", arguments=(("kind", "big"),))]


def test_a_binding_that_is_named_twice_is_declared_once():
    topology = built(
        exchanges={"x": {"type": "topic"}},
        queues={"email": {"bindings": [{"exchange": "x", "routing_key": "a", "arguments": {"l": [1]}}] * 2}},
        routes=[{"match": "email.*", "queue": "email", "routing_key": "email"}],
    )
    assert keys(topology, "x", "email") == ["a"]
    assert keys(topology, "amqptasks", "email") == ["email"]


def test_due_messages_for_a_queue_that_may_be_full_wait_beside_the_ladder():
    topology = built(queues={"email": {"max_length": 10}, "media": {"max_length": 10, "overflow": "drop-head"}})
    assert keys(topology, "amqptasks.delay.deliver", "email") == []
    assert keys(topology, "amqptasks.delay.deliver", "amqptasks.due.email") == [deliver_pattern("email")]
    assert arguments(topology, "amqptasks.due.email") == {
        "x-queue-type": "quorum",
        "x-message-ttl": 0,
        "x-dead-letter-exchange": "amqptasks",
        "x-dead-letter-routing-key": "email",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    assert topology.queue("amqptasks.due.media") is None


def test_the_prefix_names_everything_that_is_ours():
    topology = built(topology={"prefix": "shop"})
    ours = [e.name for e in (*topology.exchanges, *topology.queues) if not e.name.startswith("default")]
    assert all(name == "shop" or name.startswith("shop.") for name in ours)
    assert arguments(topology, "default")["x-dead-letter-exchange"] == "shop.dlx"


def test_the_same_settings_give_the_same_topology_in_an_order_that_can_be_declared():
    data = {"queues": {"b": {}, "a": {"max_length": 3}}, "exchanges": {"x": {"type": "fanout"}}}
    first, second = built(**data), built(**data)
    assert first == second
    assert repr(first) == repr(second)
    exchanges = {e.name for e in first.exchanges}
    queues = {q.name for q in first.queues}
    for binding in first.bindings:
        assert binding.source in exchanges
        assert binding.destination in (queues if binding.destination_type == "queue" else exchanges)
    for queue in first.queues:
        assert dict(queue.arguments).get("x-dead-letter-exchange", "amqptasks") in exchanges


def test_a_queue_is_bound_to_the_task_exchange_after_its_dead_letter_queue():
    sources = [b.source for b in built().bindings]
    assert sources.index("amqptasks") > sources.index("amqptasks.dlx") > sources.index("amqptasks.unroutable")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"queues": {"email": {}, "email.dlq": {}}}, "queues.email.dlq: .* also what queues.email.dead_letter"),
        ({"queues": {"amqptasks.delay.07": {}}}, "also what topology.prefix .*another topology.prefix"),
        ({"exchanges": {"amqptasks": {"type": "topic"}}}, "exchanges.amqptasks: the exchange 'amqptasks' is also"),
        ({"routes": [{"match": "*", "queue": "emial", "routing_key": "k"}]}, r"routes\[0\]: queue 'emial' is not"),
        ({"queues": {"@email": {}}}, "queues.@email: .*Rename the queue"),
        ({"queues": {"x" * 206: {}}}, "206 bytes"),
    ],
)
def test_a_name_that_is_ours_is_refused_with_the_key_to_change(data, message):
    with pytest.raises(ConfigError, match=message):
        built(**data)


def test_a_delayed_message_finds_a_binding_for_every_kind_of_route():
    topology = built(exchanges={"x": {}}, queues={"media": {"bindings": [{"exchange": "x", "routing_key": "k"}]}})

    class Route:
        exchange, routing_key, queue = "x", "k", None

    key = delayed("amqptasks", Route(), 1.0)[1]
    assert deliver_pattern(key.split(".", 25)[25]) in keys(topology, "amqptasks.delay.deliver", "media")


def test_tasks_with_a_limit_have_a_queue_and_a_plan_without_their_code_leaves_it_alone():
    settings = Settings.model_validate({"tasks": {"shop.x": {"rate_limit": "1/s"}, "shop.*": {"rate_limit": "2/s"}}})
    assert exact_limits(settings) == {"shop.x": "cluster"}
    limited = build_topology(settings, {"shop.x": "cluster", "shop.y": "worker"})
    shared, own = limited.queue("amqptasks.rate.shop.x"), limited.queue("amqptasks.rate.@worker.shop.y")
    assert shared is not None
    assert own is not None
    assert dict(shared.arguments)["x-single-active-consumer"] is True
    assert "x-single-active-consumer" not in dict(own.arguments)
    assert limited.routes("amqptasks", shared.name)
    sent = {queue.name: dict(queue.arguments) for queue in limited.queues}
    assert [one for one in compare(build_topology(settings), limited, sent) if one.differs] == []
    with pytest.raises(ConfigError, match="a name with a rate limit has"):
        build_topology(settings, {"x" * 250: "cluster"})

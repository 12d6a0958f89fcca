"""The declared topology on a real broker: declaring, conflicts, permissions, dead letters, the delay ladder."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import UnroutableError

from amqptasks import AmqpTasks
from amqptasks.broker.admin import declare
from amqptasks.broker.counts import queue_counts
from amqptasks.broker.visits import connect
from amqptasks.config.models import BrokerSettings, Settings
from amqptasks.errors import AccessRefused, BrokerUnreachable, ConfigError, TopologyConflict
from amqptasks.testing.waiting import wait_until
from amqptasks.topology import build_topology, delayed

PERSISTENT = pika.BasicProperties(delivery_mode=2)


@dataclass(frozen=True)
class To:
    exchange: str = "amqptasks"
    routing_key: str = ""
    queue: str | None = None


def settings_of(url: str, **data: Any) -> Settings:
    data.setdefault("queues", {"default": {}})
    return Settings.model_validate(data | {"broker": {"url": [url]}})


def declared(url: str, **data: Any) -> Settings:
    settings = settings_of(url, **data)
    declare(build_topology(settings), settings.broker)
    return settings


@pytest.fixture
def channel(vhost: Any) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(vhost.url))
    channel = connection.channel()
    channel.confirm_delivery()
    yield channel
    connection.close()


def send(channel: BlockingChannel, exchange: str, key: str, body: bytes = b"x") -> None:
    channel.basic_publish(exchange, key, body, PERSISTENT, mandatory=True)


def send_later(channel: BlockingChannel, route: To, seconds: float, body: bytes = b"x") -> float:
    """Publish with a delay; returns the time of the call."""
    at = time.monotonic()
    send(channel, *delayed("amqptasks", route, seconds), body)
    return at


def take(channel: BlockingChannel, queue: str, within: float = 5.0) -> tuple[Any, Any, bytes]:
    """The next message of a queue, acknowledged; fails when none comes in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        method, properties, body = channel.basic_get(queue, auto_ack=True)
        if method is not None:
            return method, properties, body
        channel.connection.sleep(0.005)
    raise AssertionError(f"no message in {queue!r} within {within} s")


def depth(settings: Settings, queue: str) -> int:
    counts = queue_counts(settings.broker, [queue])[queue]
    assert counts is not None, f"{queue} does not exist"
    return counts[0]


# --- declaring -------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "exchanges": {"tasks": {"type": "topic"}, "news": {"type": "fanout"}, "by-size": {"type": "headers"}},
    "queues": {
        "default": {},
        "high_priority": {"max_priority": 10, "dead_letter": {"type": "classic", "ttl": 60, "max_length": 10}},
        "email": {
            "delivery_limit": 5,
            "message_ttl": 3600,
            "max_length": 100000,
            "max_length_bytes": 2**33,
            "consumer_timeout": 3600,
            "expires": 86400,
        },
        "media": {
            "overflow": "drop-head",
            "max_length": 10,
            "bindings": [
                {"exchange": "tasks", "routing_key": "image.#"},
                {"exchange": "news"},
                {"exchange": "by-size", "arguments": {"x-match": "all", "size": "big"}},
            ],
        },
        "legacy": {"type": "classic", "dead_letter": {"enabled": False}},
    },
    "routes": [{"match": "email.*", "queue": "email", "routing_key": "email.bulk"}],
}


@pytest.mark.timing
def test_declaring_twice_changes_nothing_and_is_quick(vhost):
    settings = declared(vhost.url, **EVERYTHING)
    started = time.monotonic()
    declare(build_topology(settings), settings.broker)
    assert time.monotonic() - started < 1.0  # some 140 round trips; 0.04 s on an idle machine
    declare(build_topology(settings), settings.broker, passive=True)


def test_a_celery_queue_that_stands_already_is_taken_as_it_is(vhost, channel):
    channel.queue_declare("celery", durable=True)
    declared(vhost.url, queues={"default": {}, "celery": {"type": "classic", "dead_letter": {"enabled": False}}})


def test_a_passive_check_names_everything_that_is_missing(vhost):
    settings = settings_of(vhost.url, queues={"default": {}, "email": {}})
    with pytest.raises(ConfigError, match=r"exchange 'amqptasks'.*queue 'email.dlq', queue 'email'.*topology apply"):
        declare(build_topology(settings), settings.broker, passive=True)
    assert queue_counts(settings.broker, ["email"]) == {"email": None}


def test_queues_are_counted_and_missing_ones_are_none(vhost, channel):
    settings = declared(vhost.url)
    channel.basic_consume("default.dlq", lambda *_: None)
    send(channel, "amqptasks", "default")
    wait_until(lambda: depth(settings, "default") == 1, what="one message is ready")
    assert queue_counts(settings.broker, ["nowhere", "default", "default.dlq"]) == {
        "nowhere": None,
        "default": (1, 0),
        "default.dlq": (0, 1),
    }


def test_the_next_node_is_tried_when_one_does_not_answer(vhost):
    settings = settings_of(vhost.url)
    dead = "amqp://guest:secret-word@127.0.0.1:1/"
    declare(build_topology(settings), BrokerSettings.model_validate({"url": [dead, vhost.url]}))
    with pytest.raises(BrokerUnreachable) as caught:
        declare(build_topology(settings), BrokerSettings.model_validate({"url": [dead, dead]}))
    assert "127.0.0.1:1" in str(caught.value)
    assert "secret-word" not in str(caught.value)


def test_a_node_that_takes_the_connection_and_says_nothing_is_passed_over(vhost):
    settings = settings_of(vhost.url)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = f"amqp://guest:secret-word@127.0.0.1:{silent.getsockname()[1]}/"
        hurried = {"connection_timeout": 0.3}
        both = BrokerSettings.model_validate({"url": [mute, vhost.url], "connection_timeout": 3})
        declare(build_topology(settings), both)
        connect(both, "a test").close()
        for visit in (connect, lambda one, _name: declare(build_topology(settings), one)):
            with pytest.raises(BrokerUnreachable, match="no answer in time") as caught:
                visit(BrokerSettings.model_validate({"url": mute, **hurried}), "a test")
            assert "secret-word" not in str(caught.value)


def test_a_wrong_password_and_a_missing_virtual_host_are_told_apart(vhost):
    topology = build_topology(settings_of(vhost.url))
    head, _, tail = vhost.url.rpartition("@")
    wrong = f"{head.rpartition(':')[0]}:secret-word@{tail}"
    with pytest.raises(AccessRefused, match="user name or password") as caught:
        declare(topology, BrokerSettings.model_validate({"url": [wrong]}))
    assert "secret-word" not in str(caught.value)
    with pytest.raises(AccessRefused, match="virtual host 'nowhere-at-all'"):
        declare(topology, BrokerSettings.model_validate({"url": [vhost.url.rpartition("/")[0] + "/nowhere-at-all"]}))


# --- conflicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("live", "wanted", "argument", "values", "way_out"),
    [
        ({"max_priority": 5}, {"max_priority": 10}, "x-max-priority", ("10", "5"), "max_priority: 5"),
        ({"type": "classic"}, {}, "x-queue-type", ("quorum", "classic"), "type: classic"),
        ({}, {"type": "classic"}, "x-queue-type", ("classic", "quorum"), "type: quorum"),
        ({"message_ttl": 1.5}, {}, "x-message-ttl", ("none", "1500"), "message_ttl: 1.5"),
        ({}, {"message_ttl": 1.5}, "x-message-ttl", ("1500", "none"), "leave out message_ttl"),
        (
            {"dead_letter": {"enabled": False}},
            {},
            "x-dead-letter-exchange",
            ("amqptasks.dlx", "none"),
            "enabled: false",
        ),
    ],
)
def test_a_queue_with_other_arguments_is_a_conflict_with_both_values_and_a_way_out(
    vhost, live, wanted, argument, values, way_out
):
    declared(vhost.url, queues={"default": {}, "email": live})
    with pytest.raises(TopologyConflict) as caught:
        declared(vhost.url, queues={"default": {}, "email": wanted})
    conflict = caught.value
    assert (conflict.entity, conflict.argument, (conflict.declared, conflict.live)) == ("email", argument, values)
    assert "queue 'email' exists" in str(conflict)
    assert way_out in str(conflict)
    assert "`amqptasks topology migrate email`" in str(conflict)
    declared(vhost.url, queues={"default": {}, "email": live})


def test_a_default_that_an_older_queue_lacks_is_no_conflict(vhost):
    declared(vhost.url, queues={"default": {}, "email": {"consumer_timeout": None}, "media": {"consumer_timeout": 60}})
    declared(vhost.url, queues={"default": {}, "email": {}, "media": {}})
    with pytest.raises(TopologyConflict, match="x-message-ttl") as caught:
        declared(vhost.url, queues={"default": {}, "email": {"message_ttl": 1}})
    assert "x-consumer-timeout" not in str(caught.value)


def test_a_consumer_timeout_that_was_asked_for_is_a_conflict_where_the_broker_compares_it(vhost):
    settings = declared(vhost.url, queues={"default": {}, "email": {"consumer_timeout": 60}})
    version = vhost.management.request("GET", "overview")["rabbitmq_version"]
    other = build_topology(settings_of(vhost.url, queues={"default": {}, "email": {"consumer_timeout": 90}}))
    if version.startswith("4.3"):
        with pytest.raises(TopologyConflict, match="set consumer_timeout: 60"):
            declare(other, settings.broker)
    else:
        declare(other, settings.broker)


def test_all_conflicts_are_reported_at_once(vhost):
    declared(vhost.url, exchanges={"x": {"type": "topic"}}, queues={"default": {}, "a": {}, "b": {"max_priority": 5}})
    with pytest.raises(TopologyConflict) as caught:
        declared(
            vhost.url,
            exchanges={"x": {"type": "fanout"}},
            queues={"default": {}, "a": {"message_ttl": 1, "delivery_limit": 3}, "b": {"max_priority": 6}},
        )
    assert (caught.value.entity, caught.value.argument) == ("x", "type")
    lines = str(caught.value).splitlines()
    assert [line.split(" exists ")[0] for line in lines] == ["exchange 'x'", "queue 'a'", "queue 'b'"]
    assert "without x-delivery-limit" in lines[1]
    assert "without x-message-ttl" in lines[1]


def test_looking_for_all_differences_leaves_the_queue_as_it_was(vhost):
    declared(vhost.url, queues={"default": {}, "a": {"max_priority": 5, "message_ttl": 60}})
    with pytest.raises(TopologyConflict):
        declared(vhost.url, queues={"default": {}, "a": {"max_priority": 6, "max_length": 3}})
    declared(vhost.url, queues={"default": {}, "a": {"max_priority": 5, "message_ttl": 60}})


def test_an_argument_that_the_broker_does_not_take_is_named_with_its_setting(vhost):
    with pytest.raises(ConfigError, match=r"queues.email: the broker refuses it: .*x-max-length"):
        declared(vhost.url, queues={"default": {}, "email": {"arguments": {"x-max-length": -1}}})


# --- permissions -----------------------------------------------------------------------------------------------------


def test_a_user_without_configure_permission_works_on_a_topology_that_stands(vhost, restricted_user):
    declared(vhost.url)
    settings = settings_of(restricted_user("^$", ".*", ".*"))
    declare(build_topology(settings), settings.broker)
    declare(build_topology(settings), settings.broker, passive=True)


def test_a_user_without_configure_permission_is_told_only_what_is_missing(vhost, restricted_user):
    declared(vhost.url)
    settings = settings_of(
        restricted_user("^$", "^(amqptasks|default|email)", "^$"), queues={"default": {}, "email": {}}
    )
    with pytest.raises(AccessRefused) as caught:
        declare(build_topology(settings), settings.broker)
    text = str(caught.value)
    assert "the queue 'email' does not exist, and the user may not make it" in text
    assert "configure permission" in text
    assert "'default'" not in text
    assert "secret-word" not in text


def test_a_user_who_may_configure_some_names_makes_and_binds_those(vhost, restricted_user, channel):
    declared(vhost.url)
    url = restricted_user(r"^email", r"^(email|amqptasks)", r".*")
    declared(url, queues={"default": {}, "email": {}})
    send(channel, "amqptasks", "email")
    take(channel, "email")


# --- where messages go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [{}, {"max_priority": 10}])
def test_a_rejected_message_arrives_in_its_dead_letter_queue(vhost, channel, queue):
    declared(vhost.url, queues={"default": {}, "email": queue})
    send(channel, "amqptasks", "email", b"bad")
    method = None
    while method is None:
        method, _, _ = channel.basic_get("email")
    channel.basic_reject(method.delivery_tag, requeue=False)
    assert take(channel, "email.dlq")[2] == b"bad"


@pytest.mark.parametrize("name", ["default.dlq", "amqptasks.unroutable"])
def test_a_dead_letter_that_was_looked_at_often_is_still_there(vhost, channel, name):
    """RabbitMQ 4.0 counts a look in the management UI as a failed delivery, and drops a message after 20 of them."""
    declared(vhost.url)
    send(channel, "", name, b"look at me")
    wait_until(lambda: vhost.ready(name) == 1, 10, "the message is there")
    for _ in range(25):
        assert [one["payload"] for one in vhost.management.messages(name)] == ["look at me"]


def test_an_unbound_key_on_the_task_exchange_is_returned_to_the_caller(vhost, channel):
    declared(vhost.url)
    with pytest.raises(UnroutableError):
        send(channel, "amqptasks", "nowhere")


def test_a_dead_letter_without_a_queue_is_kept_as_unroutable(vhost, channel):
    declared(vhost.url)
    send(channel, "amqptasks.dlx", "nowhere", b"lost?")
    assert take(channel, "amqptasks.unroutable")[2] == b"lost?"


# --- the delay ladder ------------------------------------------------------------------------------------------------


@pytest.mark.timing
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.6])
def test_a_delayed_message_is_never_early_and_hardly_late(vhost, channel, seconds):
    declared(vhost.url)
    sent = send_later(channel, To(queue="default"), seconds)
    take(channel, "default")
    assert seconds <= time.monotonic() - sent < seconds + 1.0  # as promised, on a machine that does other things too


def test_a_delayed_message_that_is_rejected_finds_its_dead_letter_queue(vhost, channel):
    declared(vhost.url)
    send_later(channel, To(queue="default"), 0.1)
    method = None
    while method is None:
        method, _, _ = channel.basic_get("default")
    channel.basic_reject(method.delivery_tag, requeue=False)
    take(channel, "default.dlq")


@pytest.mark.timing
def test_a_delayed_message_is_not_hidden_by_urgent_ones_that_are_not_due(vhost, channel):
    """RabbitMQ 4.0 to 4.2 look at the head of the urgent ones first, whose time has not come."""
    app = AmqpTasks("delays", config={"broker": {"url": vhost.url}})
    app.declare()
    late = []
    channel.basic_consume(
        "default", lambda _c, _m, _p, body: late.append(time.time() - json.loads(body)[0][0]), auto_ack=True
    )
    for number in range(120):
        app.send_task("late", (time.time() + 1,), countdown=1, priority=9 if number % 2 else 1)
        channel.connection.process_data_events(0.03)
    wait_until(lambda: channel.connection.process_data_events(0.05) or len(late) == 120, 10, "all arrive")
    app.close()
    assert min(late) >= 0
    assert max(late) < 0.5


def test_queues_with_similar_names_do_not_receive_each_others_delayed_messages(vhost, channel):
    settings = declared(vhost.url, queues={"default": {}, "orders": {}, "eu.orders": {}, "eu": {}})
    for name in ("orders", "eu.orders"):
        send_later(channel, To(queue=name), 0.2, name.encode())
    assert take(channel, "orders")[2] == b"orders"
    assert take(channel, "eu.orders")[2] == b"eu.orders"
    time.sleep(0.3)
    assert [depth(settings, name) for name in ("orders", "eu.orders", "eu")] == [0, 0, 0]


@pytest.mark.timing
@pytest.mark.fault
def test_forty_undeliverable_messages_do_not_block_a_level(vhost, channel):
    settings = declared(vhost.url)
    for _ in range(40):
        send_later(channel, To(queue="nowhere"), 0.25)
    sent = send_later(channel, To(queue="default"), 0.25)
    take(channel, "default")
    assert time.monotonic() - sent < 1.0
    wait_until(lambda: depth(settings, "amqptasks.unroutable") == 40, what="40 messages are parked")


@pytest.mark.timing
@pytest.mark.fault
def test_forty_messages_for_a_full_queue_do_not_block_a_level(vhost, channel):
    declared(vhost.url, queues={"default": {}, "small": {"max_length": 1}})
    for _ in range(40):
        send_later(channel, To(queue="small"), 0.25)
    time.sleep(1.0)
    sent = send_later(channel, To(queue="default"), 0.25)
    take(channel, "default")
    assert time.monotonic() - sent < 1.0


@pytest.mark.timing
def test_a_limited_queue_receives_its_delayed_messages_in_time(vhost, channel):
    declared(vhost.url, queues={"default": {}, "small": {"max_length": 5}})
    sent = send_later(channel, To(queue="small"), 0.3)
    take(channel, "small")
    assert 0.3 <= time.monotonic() - sent < 0.8


@pytest.mark.parametrize(
    ("kind", "binding", "key", "other"),
    [
        ("direct", "image.resize", "image.resize", "image"),
        ("topic", "image.*", "image.resize", "image.resize.big"),
        ("topic", "#", "", None),
        ("fanout", "", "", None),
    ],
)
def test_a_delayed_message_passes_the_bindings_of_a_users_exchange(vhost, channel, kind, binding, key, other):
    settings = declared(
        vhost.url,
        exchanges={"x.y": {"type": kind}, "x": {"type": kind}},
        queues={
            "default": {},
            "media": {"bindings": [{"exchange": "x.y", "routing_key": binding}]},
            "x": {"bindings": [{"exchange": "x", "routing_key": binding}]},
        },
    )
    send_later(channel, To("x.y", key), 0.2, b"right")
    if other is not None:
        send_later(channel, To("x.y", other), 0.2, b"wrong")
    assert take(channel, "media")[2] == b"right"
    if other is not None:
        wait_until(lambda: depth(settings, "amqptasks.unroutable") == 1, 10, "the other is kept")
    time.sleep(0.3)
    assert depth(settings, "media") == depth(settings, "x") == 0
    assert depth(settings, "amqptasks.unroutable") == (0 if other is None else 1)

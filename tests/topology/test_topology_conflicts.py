"""What people read when the broker holds other arguments than the settings declare."""

from __future__ import annotations

import pytest

from amqptasks.topology.conflicts import Conflict, adopted, explain, parse_conflict, telling
from amqptasks.topology.entities import Exchange, Queue

EMAIL = Queue("email", origin="queues.email")
LETTERS = Queue("email.dlq", origin="queues.email.dead_letter")
LEVEL = Queue("amqptasks.delay.07", origin="topology.prefix")
TASKS = Exchange("tasks", "topic", origin="exchanges.tasks")
HEAD = "PRECONDITION_FAILED - inequivalent arg "


@pytest.mark.parametrize(
    ("entity", "text", "argument", "declared", "live"),
    [
        (
            EMAIL,
            "'x-max-priority' for queue 'email' in vhost '/': received '10' but current is '5'",
            "x-max-priority",
            "10",
            "5",
        ),
        (
            EMAIL,
            "'x-max-priority' for queue 'email' in vhost 'shop': received none but current is the value '5' "
            "of type 'signedint'",
            "x-max-priority",
            "none",
            "5",
        ),
        (
            EMAIL,
            "'x-delivery-limit' for queue 'email' in vhost 'shop': received the value '1' of type 'signedint' "
            "but current is none",
            "x-delivery-limit",
            "1",
            "none",
        ),
        (
            EMAIL,
            "'x-queue-type' for queue 'email' in vhost '/': received 'quorum' but current is 'classic'",
            "x-queue-type",
            "quorum",
            "classic",
        ),
        (
            EMAIL,
            "'durable' for queue 'email' in vhost '/': received 'true' but current is 'false'",
            "durable",
            "true",
            "false",
        ),
        (
            TASKS,
            "'type' for exchange 'tasks' in vhost 'it's mine': received 'topic' but current is 'direct'",
            "type",
            "topic",
            "direct",
        ),
        (
            TASKS,
            "'alternate-exchange' for exchange 'tasks' in vhost '/': received the value 'a b' of type 'longstr' "
            "but current is the value 'it's' of type 'longstr'",
            "alternate-exchange",
            "a b",
            "it's",
        ),
    ],
)
def test_every_form_of_the_brokers_answer_is_understood(entity, text, argument, declared, live):
    assert parse_conflict(entity, HEAD + text) == Conflict(entity, argument, declared, live)


@pytest.mark.parametrize(
    "text",
    [
        "PRECONDITION_FAILED - invalid arg 'x-max-priority' for queue 'n' in vhost '/' of queue type quorum",
        "PRECONDITION_FAILED - invalid property 'non-durable' for queue 'n9' in vhost '/'",
        "",
    ],
)
def test_an_argument_that_is_not_valid_is_no_conflict(text):
    assert parse_conflict(EMAIL, text) is None


def test_a_conflict_names_both_values_the_setting_and_the_command():
    assert explain([Conflict(EMAIL, "x-max-priority", "10", "5")]) == (
        "queue 'email' exists with x-max-priority=5, declared 10: AMQP freezes arguments. Either set max_priority: 5 "
        "in the YAML (queues.email), or replace it and keep its messages (`amqptasks topology migrate email`) "
        "and start again"
    )


@pytest.mark.parametrize(
    ("conflict", "words"),
    [
        (Conflict(EMAIL, "x-message-ttl", "none", "1500"), "set message_ttl: 1.5 in the YAML"),
        (Conflict(EMAIL, "x-message-ttl", "1500", "none"), "leave out message_ttl in the YAML"),
        (Conflict(EMAIL, "x-queue-type", "quorum", "none"), "set type: classic in"),
        (Conflict(EMAIL, "x-dead-letter-exchange", "amqptasks.dlx", "none"), "set dead_letter: {enabled: false} in"),
        (Conflict(EMAIL, "x-dead-letter-exchange", "amqptasks.dlx", "old"), "{x-dead-letter-exchange: old} in"),
        (Conflict(EMAIL, "x-overflow", "reject-publish", "none"), "set arguments: {x-overflow: null} in"),
        (Conflict(EMAIL, "x-overflow", "reject-publish", "drop-head"), "set overflow: drop-head in"),
        (Conflict(LETTERS, "x-message-ttl", "none", "60000"), "ttl: 60 in the YAML (queues.email.dead_letter)"),
        (Conflict(LETTERS, "x-overflow", "none", "reject-publish"), "freezes arguments. Replace it and keep"),
        (Conflict(LEVEL, "x-queue-type", "quorum", "classic"), "Either set another topology.prefix, or delete"),
        (Conflict(TASKS, "type", "topic", "direct"), "set type: direct in the YAML (exchanges.tasks)"),
        (Conflict(TASKS, "type", "topic", "direct"), "delete the exchange"),
        (Conflict(TASKS, "alternate-exchange", "x", "none"), "{alternate-exchange: null} in"),
    ],
)
def test_the_way_out_is_written_in_the_settings_words(conflict, words):
    assert words in explain([conflict])


def test_the_command_names_the_virtual_host():
    text = explain([Conflict(LEVEL, "x-expires", "none", "1")], "shop")
    assert "`rabbitmqctl -p shop delete_queue amqptasks.delay.07`" in text


def test_several_differences_of_one_queue_are_told_together():
    both = [Conflict(EMAIL, "x-max-priority", "10", "5"), Conflict(EMAIL, "x-message-ttl", "none", "3000")]
    assert telling(both) == both
    assert explain(both).startswith(
        "queue 'email' exists with x-max-priority=5, declared 10, and with x-message-ttl=3000, declared without: "
        "AMQP freezes arguments. Either set max_priority: 5 and set message_ttl: 3 in the YAML (queues.email), or "
    )


def test_another_queue_type_is_told_alone_because_it_brings_other_arguments_with_it():
    kind = Conflict(EMAIL, "x-queue-type", "quorum", "classic")
    assert telling([Conflict(EMAIL, "x-overflow", "reject-publish", "none"), kind]) == [kind]


@pytest.mark.parametrize(
    ("entity", "text", "expected"),
    [
        (
            Queue("q", arguments=(("x-max-priority", 10),)),
            "'x-max-priority' for queue 'q' in vhost '/': received '10' but current is '5'",
            Queue("q", arguments=(("x-max-priority", 5),)),
        ),
        (
            Queue("q", arguments=(("x-expires", 10),)),
            "'x-expires' for queue 'q' in vhost '/': received the value '10' of type 'signedint' but current is none",
            Queue("q"),
        ),
        (
            Queue("q"),
            "'x-overflow' for queue 'q' in vhost '/': received none but current is the value 'none' of type 'longstr'",
            Queue("q", arguments=(("x-overflow", "none"),)),
        ),
        (
            Queue("q"),
            "'x-single-active-consumer' for queue 'q' in vhost '/': received none but current is the value 'true' "
            "of type 'bool'",
            Queue("q", arguments=(("x-single-active-consumer", True),)),
        ),
        (
            Queue("q"),
            "'durable' for queue 'q' in vhost '/': received 'true' but current is 'false'",
            Queue("q", durable=False),
        ),
        (
            Exchange("e", "topic"),
            "'type' for exchange 'e' in vhost '/': received 'topic' but current is 'x-custom'",
            Exchange("e", "x-custom"),
        ),
        (
            Queue("q"),
            "'x-foo' for queue 'q' in vhost '/': received none but current is the value '<<>>' of type 'array'",
            None,
        ),
    ],
)
def test_the_live_value_can_be_taken_over_to_find_the_next_difference(entity, text, expected):
    conflict = parse_conflict(entity, HEAD + text)
    assert conflict is not None
    assert adopted(conflict) == expected


def test_a_queue_without_dead_letters_needs_one_setting_whatever_arguments_that_touches():
    names = ("x-dead-letter-exchange", "x-dead-letter-routing-key", "x-dead-letter-strategy")
    told = explain([Conflict(EMAIL, name, "declared", "none") for name in names])
    assert "Either set dead_letter: {enabled: false} in the YAML (queues.email), or" in told


def test_arguments_without_a_key_of_their_own_are_written_into_one_table():
    told = explain([Conflict(EMAIL, "x-a", "1", "2"), Conflict(EMAIL, "x-b", "1", "none")])
    assert "Either set arguments: {x-a: 2, x-b: null} in the YAML (queues.email), or" in told

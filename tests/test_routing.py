"""From a task's name to its route."""

from __future__ import annotations

from typing import Any

import pytest

from amqptasks.config import load_settings
from amqptasks.routing import Route, Router


def router(*routes: dict[str, Any], **data: Any) -> Router:
    queues = {"high": {"max_priority": 10}, "media": {}, "email": {}}
    exchanges = {"events": {"type": "topic"}}
    data = {"queues": queues, "exchanges": exchanges, "routes": routes, **data}
    return Router(load_settings(environ={}, data=data))


def test_a_task_that_nothing_routes_goes_to_the_default_queue():
    assert router().resolve("a") == Route("amqptasks", "default", "default", None)


def test_the_default_queue_and_the_task_exchange_have_the_configured_names():
    route = router(topology={"prefix": "shop", "default_queue": "email"}).resolve("a")
    assert route == Route("shop", "email", "email", None)


def test_a_tasks_own_queue_and_priority_come_before_the_default():
    route = router().resolve("a", task_queue="media", task_priority=3)
    assert route == Route("amqptasks", "media", "media", 3)


def test_a_rule_comes_before_the_tasks_own_queue():
    rules = router({"match": "payment.*", "queue": "high", "priority": 9})
    assert rules.resolve("payment.charge", task_queue="media", task_priority=3) == Route("amqptasks", "high", "high", 9)


def test_the_first_rule_that_matches_wins():
    rules = router({"match": "payment.refund", "queue": "email"}, {"match": "payment.*", "queue": "high"})
    assert rules.resolve("payment.refund").queue == "email"
    assert rules.resolve("payment.charge").queue == "high"


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("payment.*", "payment.charge", True),
        ("payment.*", "payment.card.charge", True),
        ("payment.*", "payment", False),
        ("payment.*", "shop.payment.charge", False),
        ("payment.*", "Payment.charge", False),
        ("payment", "payments", False),
        ("*.chart?", "x.chart1", True),
        ("[ab].x", "b.x", True),
        ("[!ab].x", "b.x", False),
        ("a.b", "axb", False),
        ("*", "", True),
        ("*", "two\nlines", True),
    ],
)
def test_a_glob_matches_the_whole_name_and_minds_case(pattern, name, matches):
    assert (router({"match": pattern, "queue": "high"}).resolve(name).queue == "high") is matches


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        (r"^(image|video)\.tasks\.", "video.tasks.cut", True),
        (r"^(image|video)\.tasks\.", "my.video.tasks.cut", False),
        (r"video", "my.video.tasks.cut", True),
        (r"(?i)^VIDEO$", "video", True),
    ],
)
def test_a_regular_expression_is_searched_in_the_name(pattern, name, matches):
    assert (router({"regex": pattern, "queue": "media"}).resolve(name).queue == "media") is matches


def test_a_rule_may_give_a_priority_alone_and_leaves_the_queue_to_the_task():
    rules = router({"match": "*", "priority": 2})
    assert rules.resolve("a") == Route("amqptasks", "default", "default", 2)
    assert rules.resolve("a", task_queue="high", task_priority=7) == Route("amqptasks", "high", "high", 2)


def test_a_rule_without_a_priority_leaves_it_to_the_task():
    assert router({"match": "*", "queue": "high"}).resolve("a", task_priority=0).priority == 0


def test_a_rules_priority_of_zero_is_a_priority():
    assert router({"match": "*", "queue": "high", "priority": 0}).resolve("a", task_priority=5).priority == 0


def test_a_rule_may_name_a_key_or_an_exchange_or_both():
    rules = router(
        {"match": "a", "queue": "email", "routing_key": "email.bulk"},
        {"match": "b", "exchange": "events", "routing_key": "order.paid"},
        {"match": "c", "exchange": "events"},
        {"match": "d", "exchange": "events", "queue": "email"},
        {"match": "e", "exchange": "events", "queue": "email", "routing_key": ""},
    )
    assert rules.resolve("a") == Route("amqptasks", "email.bulk", "email", None)
    assert rules.resolve("b") == Route("events", "order.paid", None, None)
    assert rules.resolve("c", task_queue="media") == Route("events", "", None, None)
    assert rules.resolve("d") == Route("events", "email", "email", None)
    assert rules.resolve("e") == Route("events", "", "email", None)


def test_call_options_come_before_everything():
    rules = router({"match": "*", "exchange": "events", "routing_key": "k", "priority": 2})
    assert rules.resolve("a", queue="media", task_queue="email") == Route("amqptasks", "media", "media", 2)
    assert rules.resolve("a", queue="media", routing_key="x", priority=0) == Route("amqptasks", "x", "media", 0)
    assert rules.resolve("a", exchange="other") == Route("other", "", None, 2)
    assert rules.resolve("a", exchange="other", routing_key="x") == Route("other", "x", None, 2)
    assert rules.resolve("a", exchange="other", queue="media") == Route("other", "media", "media", 2)
    assert rules.resolve("a", exchange="other", queue="media", routing_key="") == Route("other", "", "media", 2)
    assert rules.resolve("a", routing_key="x") == Route("events", "x", None, 2)
    assert rules.resolve("a", priority=5) == Route("events", "k", None, 5)


def test_the_options_of_one_call_do_not_stick():
    rules = router()
    rules.resolve("a", queue="media", priority=9)
    assert rules.resolve("a") == Route("amqptasks", "default", "default", None)
    rules.resolve("a", task_queue="email")
    assert rules.resolve("a") == Route("amqptasks", "default", "default", None)


def test_rules_are_looked_at_once_for_each_name():
    rules = router({"match": "x.*", "queue": "high"})
    first = rules.resolve("x.y")
    rules._rules.clear()
    assert rules.resolve("x.y") is first
    assert rules.resolve("x.z").queue == "default"


def test_names_from_outside_do_not_fill_the_memory():
    rules = router()
    for number in range(10_100):
        rules.resolve(f"task.{number}")
    assert len(rules._known) <= 10_000
    assert rules.resolve("task.10099").queue == "default"


def test_explain_tells_what_decided():
    rules = router({"match": "b.*", "queue": "media"}, {"match": "a.*", "queue": "high"})
    match = rules.explain("a.x", task_queue="email")
    assert (match.source, match.index, match.route.queue) == ("rule", 1, "high")
    assert match.rule is not None
    assert match.rule.match == "a.*"
    assert (rules.explain("x", task_queue="email").source, rules.explain("x").source) == ("task", "default")

"""The doctor's checks that need no broker."""

from __future__ import annotations

from typing import Any

import pytest

from amqptasks import AmqpTasks
from amqptasks.config import Settings
from amqptasks.doctor import Level
from amqptasks.doctor.limits import check_consumer_timeouts, longest_limits
from amqptasks.doctor.permissions import lacking
from amqptasks.doctor.settings import check_routes
from amqptasks.topology import build_topology
from amqptasks.topology.permissions import needs, permissions

DATA: dict[str, Any] = {
    "exchanges": {"news": {"type": "topic"}, "silent": {"type": "direct"}},
    "queues": {"default": {}, "email": {"max_length": 5}, "all": {"bindings": [{"exchange": "news"}]}},
    "routes": [
        {"match": "a.*", "exchange": "silent", "routing_key": "nobody"},
        {"match": "b.*", "exchange": "news", "routing_key": "x"},
        {"match": "c.*", "queue": "email"},
        {"match": "d.*", "exchange": "silent", "queue": "email", "routing_key": "known"},
        {"match": "e.*", "exchange": "silent", "routing_key": "known"},
    ],
}
SETTINGS = Settings.model_validate(DATA)
TOPOLOGY = build_topology(SETTINGS, {"a.task": "cluster"})


@pytest.mark.parametrize("role", ["producer", "worker"])
def test_the_least_permissions_are_enough_and_no_less_will_do(role: str) -> None:
    given, required = permissions(TOPOLOGY, "amqptasks")[role], needs(TOPOLOGY, "amqptasks")[role]
    told = {"configure": given.configure, "write": given.write, "read": given.read}
    assert lacking(told, required) == []
    assert lacking({".": "x"}, required)[0].startswith("configure on app.reply.")
    for right in told:
        (missing,) = lacking({**told, right: ""}, required)
        assert missing.startswith(f"{right} on ")


def test_a_producer_lacks_what_a_worker_needs() -> None:
    given = permissions(TOPOLOGY, "amqptasks")["producer"]
    told = {"configure": given.configure, "write": given.write, "read": given.read}
    write, read = lacking(told, needs(TOPOLOGY, "amqptasks")["worker"])
    assert write == "write on amqptasks.dlx, amq.default"
    assert read == "read on amqptasks.joins, amqptasks.revoked, amqptasks.rate.a.task and 3 more"


def test_routes_that_lead_nowhere() -> None:
    found = list(check_routes(SETTINGS, TOPOLOGY))
    assert [(one.level, one.what.partition(" ")[0]) for one in found] == [(Level.ERROR, "routes[0]")]
    assert "exchange 'silent' for key 'nobody'" in found[0].what


def _queue(**given: Any) -> dict[str, Any]:
    return {"type": "quorum", "arguments": {}, "effective_policy_definition": {}, **given}


def test_the_broker_takes_back_before_the_limit() -> None:
    def said(queue: dict[str, Any], limit: float, version: tuple[int, int] = (4, 0)) -> str:
        return " ".join(one.what for one in check_consumer_timeouts({"q": queue}, version, {"q": limit}))

    argument = _queue(arguments={"x-consumer-timeout": 60_000})
    assert "a task may run 90 s, and the broker takes it back after 60 s" in said(argument, 90)
    assert said(argument, 60) == ""
    assert said(argument, 90, (3, 10)) == ""  # told of the version as a whole
    assert said({**argument, "type": "classic"}, 90, (4, 3)) == ""
    policy = _queue(arguments={"x-consumer-timeout": 600_000}, effective_policy_definition={"consumer-timeout": 30_000})
    assert "after 30 s" in said(policy, 90)
    assert "unless its node was told otherwise" in said(_queue(), 3600)
    assert said(_queue(), 1700) == ""
    assert said(_queue(effective_policy_definition=None), 1700) == ""


def test_limits_are_those_of_the_tasks_that_go_to_a_queue() -> None:
    app = AmqpTasks("limits", config={**DATA, "worker": {"time_limit": 50}})

    @app.task(name="c.slow", time_limit=900)
    def slow() -> None: ...

    @app.task(name="other", queue="all")
    def other() -> None: ...

    assert longest_limits(app.settings, app) == {"default": 0.0, "email": 900.0, "all": 50.0}
    assert set(longest_limits(app.settings, None).values()) == {50.0}

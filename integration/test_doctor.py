"""The doctor finds what was broken on purpose, and says what mends it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pika
import pytest

from amqptasks.broker.admin import declare
from amqptasks.config import Settings
from amqptasks.message import Envelope
from amqptasks.testing.management import Management
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from amqptasks.topology import build_topology
from amqptasks.topology.permissions import permissions
from integration.conftest import ROOT, Bench


def _doctor(bench: Bench, *options: str, code: int) -> dict[str, list[dict[str, Any]]]:
    """Findings by check."""
    command = ["amqptasks", "-A", bench.APP, "--config", str(bench.config), "doctor", "--json", *options]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    found: dict[str, list[dict[str, Any]]] = {}
    for one in json.loads(done.stdout):
        found.setdefault(one["check"], []).append(one)
    return found


def _bad(found: dict[str, list[dict[str, Any]]]) -> set[tuple[str, str]]:
    return {
        (name, one["level"]) for name, many in found.items() for one in many if one["level"] in ("warning", "error")
    }


def test_a_sound_system_is_well(bench: Bench) -> None:
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url
    bench.worker("default", "-c", "1")
    found = _doctor(bench, "--strict", code=0)
    assert _bad(found) == set()
    assert found["version"][0]["what"].startswith("RabbitMQ ")
    assert found["topology"][0]["what"] == "the broker is as declared"


def test_what_is_broken_is_found_with_what_mends_it(bench: Bench) -> None:
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url
    bench.settings["queues"].update(
        {"email": {"max_priority": 5, "prefetch": 50}, "bare": {"dead_letter": {"enabled": False}}}
    )
    bench.settings["routes"] = [
        {"match": "integration.*", "queue": "email"},
        {"match": "integration.apps.*", "queue": "bare"},
        {"match": "*.lost", "exchange": "silent", "routing_key": "nobody"},
    ]
    bench.settings["exchanges"] = {"silent": {}}
    bench.settings["tasks"] = {"no.such.*": {"priority": 1}}
    bench.settings["schedule"] = {"lost": {"task": "no.such.task", "every": 60}}
    bench.settings["serialization"] = {"accept_content": ["json", "pickle"]}
    bench.settings["result"] = {"backend": "redis://127.0.0.1:1/0"}
    app = bench.client()
    app.declare()
    bench.vhost.management.unbind("amqptasks", "bare", "bare")
    letter = Envelope("amqptasks.dlx", "default", b"[]", headers={"task": "x", "id": "1"})
    lost = Envelope("amqptasks.unroutable", "", b"lost")
    waiting = Envelope("amqptasks", "email", b"[]", headers={"task": "x", "id": "2"})
    assert app.client.publish_many([letter, lost, waiting]) == [None] * 3
    wait_until(lambda: bench.vhost.management.queue("default.dlq").get("messages") == 1, 20, "statistics are there")
    wait_until(lambda: bench.vhost.management.queue("email").get("messages_ready") == 1, 20, "statistics are there")
    wait_until(lambda: bench.vhost.management.queue("amqptasks.unroutable").get("messages") == 1, 20, "statistics too")

    found = _doctor(bench, code=1)
    assert _bad(found) >= {
        ("priorities", "warning"), ("dead letters", "warning"), ("routes", "warning"), ("tasks", "warning"),
        ("schedule", "warning"), ("pickle", "warning"), ("routes", "error"), ("results", "error"),
        ("topology", "error"), ("consumers", "warning"), ("unroutable", "error"),
    }  # fmt: skip
    assert all(one["why"] and one["mend"] for many in found.values() for one in many if one["level"] != "ok")
    assert found["topology"][0]["mend"] == "amqptasks topology plan"


def test_a_broker_or_an_app_that_is_not_there_is_a_finding(bench: Bench) -> None:
    bench.settings["broker"] = {"url": "amqp://guest:very-secret@127.0.0.1:1/"}
    bench.APP = "no.such.module:app"
    found = _doctor(bench, code=1)
    assert _bad(found) >= {("application", "error"), ("connection", "error")}
    assert "very-secret" not in json.dumps(found)


def test_an_alarm_is_found(bench: Bench, node: Any) -> None:
    bench.settings["broker"] = {"url": node.url, "management_url": node.management_url}
    with pika.BlockingConnection(pika.URLParameters(node.url)):
        node.rabbitmqctl("set_vm_memory_high_watermark", "0")
        wait_until(lambda: ("alarms", "error") in _bad(_doctor(bench, code=1)), 30, "the alarm is seen")


def test_what_the_user_may_not_do_is_named_with_the_command(
    bench: Bench, restricted_user: Callable[[str, str, str], str]
) -> None:
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url
    bench.client().declare()
    topology = build_topology(Settings.model_validate(bench.settings))

    def findings(url: str, code: int) -> list[dict[str, Any]]:
        bench.settings["broker"]["url"] = url
        return _doctor(bench, code=code)["permissions"]

    def role(name: str) -> str:
        one = permissions(topology, "amqptasks")[name]
        return restricted_user(one.configure, one.write, one.read)

    (worker,) = findings(role("worker"), 0)
    assert (worker["level"], worker["what"].endswith("may call tasks and run them")) == ("ok", True)
    (producer,) = findings(role("producer"), 0)
    assert producer["level"] == "info"
    assert "cannot be a worker: no write on amqptasks.dlx, amq.default; no read on " in producer["what"]
    assert producer["mend"].startswith("amqptasks topology permissions --role worker --user user-")
    nobody = findings(restricted_user("", "", ""), 1)
    assert [one["level"] for one in nobody] == ["error", "error"]
    # RabbitMQ tells them to administrators only.
    bench.vhost.management.create_user("eyes", "eyes", "monitoring")
    bench.vhost.management.permit("eyes")
    try:
        address = bench.vhost.broker.management_url.rpartition("@")[2]
        bench.settings["broker"]["management_url"] = f"http://eyes:eyes@{address}"
        (unknown,) = findings(bench.vhost.url, 0)
        assert (unknown["level"], unknown["mend"]) == ("unknown", "rabbitmqctl list_user_permissions guest")
    finally:
        bench.vhost.management.delete_user("eyes")


def test_a_broker_that_takes_back_before_the_time_limit_is_found(bench: Bench) -> None:
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url
    bench.settings["queues"]["default"] = {"consumer_timeout": 3600}
    bench.settings["tasks"] = {"integration.apps.jobs.note": {"time_limit": 7200}}
    bench.client().declare()
    (found,) = _doctor(bench, code=0)["consumer timeout"]
    assert found["level"] == "warning"
    version = bench.vhost.management.request("GET", "overview")["rabbitmq_version"]
    if tuple(map(int, version.split(".")[:2])) < (3, 12):
        assert "for the whole node" in found["what"]
    else:
        assert "a task may run 7200 s, and the broker takes it back after 3600 s" in found["what"]


def test_the_operators_role_is_told_what_it_cannot_see_and_all_else(bench: Bench) -> None:
    """Its tag is management; alarms are for users with monitoring."""
    topology = build_topology(Settings.model_validate(bench.settings))
    role = permissions(topology, "amqptasks")["operator"]
    bench.client().declare()
    bench.vhost.management.create_user("operator", "operator", role.tag)
    bench.vhost.management.permit("operator", role.configure, role.write, role.read)
    try:
        address = bench.vhost.broker.management_url.rpartition("@")[2]
        bench.settings["broker"]["management_url"] = f"http://operator:operator@{address}"
        found = _doctor(bench, code=0)
        assert [one["level"] for one in found["alarms"]] == ["unknown"]
        assert found["alarms"][0]["mend"] == "rabbitmqctl set_user_tags operator monitoring"
        assert found["topology"][0]["level"] == "ok"
        assert found["consumers"][0]["what"] == "queue default: nobody consumes"
        bench.vhost.management.unbind("amqptasks", "default", "default")
        assert _doctor(bench, code=1)["topology"][0]["level"] == "error"
        bench.settings["broker"]["management_url"] = f"http://operator:wrong@{address}"
        (refused,) = _doctor(bench, code=1)["management"]
        assert "wrong user or password" in refused["what"]
        assert refused["mend"] == "rabbitmqctl authenticate_user operator"
    finally:
        bench.vhost.management.delete_user("operator")


@pytest.mark.parametrize("operator", [False, True])
def test_a_delivery_limit_by_which_looks_lose_letters_is_found_and_mended(
    bench: Bench, node: PrivateNode, operator: bool
) -> None:
    """A policy may set a smaller limit than the queue's own, which is a million."""
    bench.settings["broker"] = {"url": node.url, "management_url": node.management_url}
    settings = Settings.model_validate(bench.settings)
    management = Management(node.management_url)
    management.set_policy("few", ".*", {"delivery-limit": 20}, operator=operator)
    declare(build_topology(settings), settings.broker)
    (letters,) = [one for one in _doctor(bench, code=1)["delivery limit"] if "default.dlq" in one["what"]]
    assert "a delivery limit of 20" in letters["what"]

    def survives() -> bool:
        app = bench.client()
        assert app.client.publish_many([Envelope("amqptasks.dlx", "default", b"[]", headers={"task": "x"})]) == [None]
        wait_until(lambda: management.counts("default.dlq")[0], 20, "the letter is there")
        for _ in range(25):
            management.messages("default.dlq")
        wait_until(lambda: management.counts("default.dlq")[1] == 0, 20, "nobody holds it")
        return bool(management.messages("default.dlq", remove=True))

    version = management.request("GET", "overview")["rabbitmq_version"]
    counts_looks = tuple(map(int, version.split(".")[:2])) < (4, 3)
    assert survives() != counts_looks
    node.rabbitmqctl(*shlex.split(letters["mend"])[1:])

    def in_effect() -> bool:
        definition = management.queue("default.dlq").get("effective_policy_definition") or {}
        return bool(definition.get("delivery-limit") == 1_000_000)

    wait_until(in_effect, 20, "the policy is in effect")
    assert not [one for one in _doctor(bench, code=1)["delivery limit"] if "default.dlq" in one["what"]]
    assert survives()


@pytest.mark.parametrize(
    "config",
    [
        {"management_agent.disable_metrics_collector": "true"},
        {"management.disable_stats": "true", "management.enable_queue_totals": "true"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_depths_are_seen_where_the_broker_keeps_no_statistics(bench: Bench, config: dict[str, str]) -> None:
    with PrivateNode("mute", config=config, tune=False) as node:
        bench.settings["broker"] = {"url": node.url, "management_url": node.management_url}
        app = bench.client()
        app.declare()
        letter = Envelope("amqptasks.dlx", "default", b"[]", headers={"task": "x"})
        assert app.client.publish_many([letter] * 2 + [Envelope("amqptasks", "default", b"[]")]) == [None] * 3
        management = Management(node.management_url)
        wait_until(lambda: management.counts("default.dlq")[0] == 2, 20, "they are counted", pause=0.5)
        found = _doctor(bench, code=0)
        assert [one["what"] for one in found["dead letters"]] == ["queue default: 2 dead letters"]
        assert [one["what"] for one in found["consumers"]] == ["queue default: 1 message waits, and nobody consumes"]


def test_a_warning_is_a_failure_with_strict_only(bench: Bench) -> None:
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url
    bench.settings["serialization"] = {"accept_content": ["json", "pickle"]}
    bench.worker("default", "-c", "1")
    assert _bad(_doctor(bench, code=0)) == {("pickle", "warning")}
    assert _bad(_doctor(bench, "--strict", code=1)) == {("pickle", "warning")}

"""The least permissions of each role: users that have only these do their work, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pika
import pytest
from pika.exceptions import ChannelClosedByBroker

from amqptasks import AmqpTasks, chain, chord
from amqptasks.broker.admin import declare
from amqptasks.broker.broadcast import broadcast
from amqptasks.config import BrokerSettings
from amqptasks.config.models import Settings
from amqptasks.errors import BrokerError, PublishError
from amqptasks.testing.waiting import wait_until
from amqptasks.topology import build_topology
from amqptasks.topology.build import exact_limits
from amqptasks.topology.permissions import permissions
from integration.conftest import ROOT, Bench

MakeUser = Callable[[str, str, str], str]
EXCHANGES = {"exchanges": {"news": {"type": "topic"}}}


@pytest.fixture
def as_role(bench: Bench, restricted_user: MakeUser) -> Callable[[str], str]:
    """The URL of a user with a role's permissions, on a topology that its operator has made."""
    bench.settings |= EXCHANGES
    bench.settings["tasks"] = {"integration.apps.jobs.paced": {"rate_limit": "10/s"}}
    bench.settings["queues"]["news.all"] = {"bindings": [{"exchange": "news", "routing_key": "#"}]}
    settings = Settings.model_validate(bench.settings)
    topology = build_topology(settings, exact_limits(settings))
    found = permissions(topology, settings.topology.prefix)

    def url(role: str) -> str:
        one = found[role]
        return restricted_user(one.configure, one.write, one.read)

    operator = settings.broker.model_copy(update={"url": [url("operator")]})
    declare(topology, operator)
    return url


@pytest.fixture
def refused(as_role: Callable[[str], str]) -> Iterator[Callable[[str, Callable[[object], object]], bool]]:
    """Whether the broker refuses something to a role."""
    open_ones = []

    def check(role: str, call: Callable[..., object]) -> bool:
        connection = pika.BlockingConnection(pika.URLParameters(as_role(role)))
        open_ones.append(connection)
        channel = connection.channel()
        channel.confirm_delivery()
        try:
            call(channel)
        except ChannelClosedByBroker as closed:
            return closed.reply_code == 403
        return False

    yield check
    for connection in open_ones:
        connection.close()


def test_a_producer_calls_and_a_worker_runs_retries_and_dead_letters(
    bench: Bench, as_role: Callable[[str], str]
) -> None:
    worker = bench.worker("default", "-c", "1", url=as_role("worker"))
    app = AmqpTasks("shop.web", config=bench.config, broker=as_role("producer"))
    try:
        assert app.send_task("integration.apps.jobs.add", (1, 2)).get(timeout=10) == 3
        retried = bench.send(app, "recovers", 1)
        delayed = bench.send(app, "note", countdown=0.3)
        dead = bench.send(app, "no_such_task")
        app.send_task("any", exchange="news", routing_key="of.today", ignore_result=True)
        limited = [bench.send(app, "paced") for _ in range(3)]
        revoked = bench.send(app, "note", countdown=4.0)
        app.control.revoke(revoked)
        bench.wait_done({retried, delayed, *limited})
        letters = bench.vhost.dead_letters("default", 2)
        assert {letter["properties"]["correlation_id"] for letter in letters} == {dead, revoked}
        assert "Revokes may be missed" not in worker.log
    finally:
        app.close()


def test_an_operator_controls_a_worker_and_a_producer_does_not(bench: Bench, as_role: Callable[[str], str]) -> None:
    bench.worker("default", "-c", "1", "-n", "shop@test", url=as_role("worker"))

    def ping(role: str) -> dict[str, object]:
        return broadcast(BrokerSettings.model_validate({"url": as_role(role)}), "ping", {}, timeout=1.0)

    wait_until(lambda: ping("operator") == {"shop@test": {"ok": "pong"}}, 20, "the operator is answered")
    with pytest.raises(BrokerError, match="ACCESS_REFUSED"):
        ping("producer")


@pytest.mark.fault
def test_a_producer_can_neither_read_nor_make_nor_delete_nor_reach_queues_directly(refused) -> None:
    assert refused("producer", lambda channel: channel.basic_get("default"))
    assert refused("producer", lambda channel: channel.basic_get("default.dlq"))
    assert refused("producer", lambda channel: channel.queue_declare("mine"))
    assert refused("producer", lambda channel: channel.queue_delete("default"))
    assert refused("producer", lambda channel: channel.basic_publish("", "default", b"x"))
    assert refused("producer", lambda channel: channel.basic_publish("amqptasks.dlx", "default", b"x"))
    assert not refused("producer", lambda channel: channel.basic_publish("amqptasks", "default", b"x"))


@pytest.mark.fault
def test_a_worker_can_neither_make_nor_delete_queues_nor_read_dead_letters(refused) -> None:
    assert refused("worker", lambda channel: channel.queue_declare("mine"))
    assert refused("worker", lambda channel: channel.queue_delete("default"))
    assert refused("worker", lambda channel: channel.queue_purge("default.dlq"))
    assert refused("worker", lambda channel: channel.basic_get("default.dlq"))
    assert refused("worker", lambda channel: channel.exchange_delete("amqptasks"))


def test_an_operator_reads_and_replays_dead_letters_and_touches_nothing_foreign(refused) -> None:
    assert not refused("operator", lambda channel: channel.basic_get("default.dlq"))
    assert not refused("operator", lambda channel: channel.basic_publish("amqptasks", "default", b"x"))
    assert refused("operator", lambda channel: channel.queue_declare("billing"))
    assert refused("operator", lambda channel: channel.basic_publish("amq.topic", "x", b"x"))


def test_a_monitor_can_do_nothing_here(bench: Bench, as_role: Callable[[str], str]) -> None:
    app = AmqpTasks("watch", config=bench.config, broker=as_role("monitor"))
    with pytest.raises(PublishError, match="ACCESS_REFUSED"):
        app.send_task("any", ignore_result=True, retry=False)
    app.close()


def test_the_command_prints_what_rabbitmqctl_takes(bench: Bench) -> None:
    command = [sys.executable, "-m", "amqptasks", "--config", str(bench.config), "topology"]
    options = ["permissions", "--role", "worker", "--user", "shop"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"rabbitmqctl set_permissions -p {bench.vhost.name} shop '^(")
    done = subprocess.run([*command, "permissions", "--json"], capture_output=True, text=True, check=True)
    roles = set(json.loads(done.stdout))
    assert roles == {"producer", "worker", "beat", "operator", "monitor"}
    for role in roles:
        one = subprocess.run([*command, "permissions", "--role", role], capture_output=True, text=True, check=True)
        assert one.stdout.startswith(f"rabbitmqctl set_permissions -p {bench.vhost.name} {role} ")


def test_apply_declares_and_show_names_what_there_is(bench: Bench) -> None:
    command = [sys.executable, "-m", "amqptasks", "--config", str(bench.config), "topology"]
    for _ in range(2):
        done = subprocess.run([*command, "apply", "--json"], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["queues"] == len(bench.vhost.management.queues())
    shown = subprocess.run([*command, "show"], capture_output=True, text=True, check=True).stdout
    assert "default → default  quorum" in shown
    bench.settings["tasks"] = {"*.paced": {"rate_limit": "1/s"}}
    with_app = [*command[:3], "-A", bench.APP, "--config", str(bench.config), "topology"]
    shown = subprocess.run([*with_app, "show"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "amqptasks.rate.integration.apps.jobs.paced" in shown
    table = json.loads(subprocess.run([*command, "show", "--json"], capture_output=True, text=True, check=True).stdout)
    assert {one["name"] for one in table["queues"]} == set(bench.vhost.management.queues())


def test_chains_chords_and_delays_need_no_more(bench: Bench, as_role: Callable[[str], str]) -> None:
    bench.worker("default", "-c", "1", url=as_role("worker"))
    app = AmqpTasks("shop.web", config=bench.config, broker=as_role("producer"))
    try:
        add = app.signature("integration.apps.jobs.add", (1, 2))
        assert app.apply_signature(chain(add, app.signature("integration.apps.jobs.add", (4,)))).get(timeout=20) == 7
        body = app.signature("integration.apps.jobs.noop")
        body.immutable = True
        assert app.apply_signature(chord([add, add], body)).get(timeout=20) is None
    finally:
        app.close()

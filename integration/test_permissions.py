"""The least permissions of each role: users that have only these do their work, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pika
import pytest
from pika.exceptions import ChannelClosedByBroker

from amqptasks import AmqpTasks
from amqptasks.broker.admin import declare
from amqptasks.config.models import Settings
from amqptasks.errors import PublishError
from amqptasks.topology import build_topology
from amqptasks.topology.permissions import permissions
from integration.conftest import Bench

MakeUser = Callable[[str, str, str], str]
EXCHANGES = {"exchanges": {"news": {"type": "topic"}}}


@pytest.fixture
def as_role(bench: Bench, restricted_user: MakeUser) -> Callable[[str], str]:
    """The URL of a user with a role's permissions, on a topology that its operator has made."""
    bench.settings |= EXCHANGES
    bench.settings["queues"]["news.all"] = {"bindings": [{"exchange": "news", "routing_key": "#"}]}
    settings = Settings.model_validate(bench.settings)
    topology = build_topology(settings)
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
    bench.worker("default", "-c", "1", url=as_role("worker"))
    app = AmqpTasks("shop.web", config=bench.config, broker=as_role("producer"))
    try:
        assert app.send_task("integration.apps.jobs.add", (1, 2)).get(timeout=10) == 3
        retried = bench.send(app, "recovers", 1)
        delayed = bench.send(app, "note", countdown=0.3)
        dead = bench.send(app, "no_such_task")
        app.send_task("any", exchange="news", routing_key="of.today", ignore_result=True)
        bench.wait_done({retried, delayed})
        assert bench.vhost.dead_letters("default", 1)[0]["properties"]["correlation_id"] == dead
    finally:
        app.close()


def test_a_producer_can_neither_read_nor_make_nor_delete_nor_reach_queues_directly(refused) -> None:
    assert refused("producer", lambda channel: channel.basic_get("default"))
    assert refused("producer", lambda channel: channel.basic_get("default.dlq"))
    assert refused("producer", lambda channel: channel.queue_declare("mine"))
    assert refused("producer", lambda channel: channel.queue_delete("default"))
    assert refused("producer", lambda channel: channel.basic_publish("", "default", b"x"))
    assert refused("producer", lambda channel: channel.basic_publish("amqptasks.dlx", "default", b"x"))
    assert not refused("producer", lambda channel: channel.basic_publish("amqptasks", "default", b"x"))


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
    assert set(json.loads(done.stdout)) == {"producer", "worker", "operator", "monitor"}


def test_apply_declares_and_show_names_what_there_is(bench: Bench) -> None:
    command = [sys.executable, "-m", "amqptasks", "--config", str(bench.config), "topology"]
    for _ in range(2):
        done = subprocess.run([*command, "apply", "--json"], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["queues"] == len(bench.vhost.management.queues())
    shown = subprocess.run([*command, "show"], capture_output=True, text=True, check=True).stdout
    assert "default → default  quorum" in shown
    table = json.loads(subprocess.run([*command, "show", "--json"], capture_output=True, text=True, check=True).stdout)
    assert {one["name"] for one in table["queues"]} == set(bench.vhost.management.queues())

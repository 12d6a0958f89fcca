"""`amqptasks queues`: what it says is true, and what cannot be known it does not say."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pika
import pytest
import yaml

from amqptasks.message import Envelope
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench
from integration.strangers import strange_channel

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def _command(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "amqptasks", "--config", str(config), "queues", *options]


def _queues(config: Path, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        _command(config, *options), capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env=ENVIRONMENT
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done


def _figures(config: Path, *options: str) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads(_queues(config, "--json", *options).stdout)["queues"]}


@pytest.fixture
def managed(bench: Bench) -> Bench:
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url
    bench.settings["queues"]["urgent"] = {"max_priority": 5}
    return bench


def test_counts_rates_and_age_are_those_of_the_queue(managed: Bench) -> None:
    """A consumer takes half of what was published at once, holds three more, and leaves the rest."""
    app = managed.client()
    app.declare()
    call = Envelope("amqptasks", "default", b"[]")
    delayed = Envelope("amqptasks.delay.20", f"{'0.' * 4}1.{'0.' * 20}default", b"[]")
    letter = Envelope("amqptasks.dlx", "default", b"[]")
    first = time.monotonic()
    assert app.client.publish_many([delayed] * 2 + [call, letter]) == [None] * 4
    with pika.BlockingConnection(pika.URLParameters(managed.vhost.url)) as connection:
        channel = connection.channel()
        channel.basic_qos(prefetch_count=3)
        taken = channel.consume("default")
        channel.basic_ack(next(taken)[0].delivery_tag)
        # Of a queue that nobody used yet the broker has no samples. Then they are five seconds apart.
        connection.sleep(8)
        assert app.client.publish_many([call] * 200) == [None] * 200
        came = time.monotonic()
        for _ in range(100):
            channel.basic_ack(next(taken)[0].delivery_tag)
            connection.sleep(0.03)
        until = time.monotonic() + 60
        while True:
            shown = _figures(managed.config)["default"]
            waited = time.monotonic() - came
            if (shown["ready"], shown["unacknowledged"]) == (97, 3) and shown["rate_out"]:
                break
            assert time.monotonic() < until, shown
            connection.sleep(1)
        assert shown["consumers"] == 1
        assert shown["kind"] == "quorum"
        assert shown["oldest"]["exactly"] == "about"
        assert abs(shown["oldest"]["seconds"] - waited) < 12, (shown, waited)
        assert 0 < shown["rate_out"] < 15
    others = _figures(managed.config)
    # Nobody used this one before. Since when it was empty is known only where a sample fell between the count of what
    # was published and that of what is there.
    letters, waited = others["default.dlq"]["oldest"], time.monotonic() - first
    assert letters["exactly"] in ("at least", "about")
    assert 2 < letters["seconds"] < waited + (1 if letters["exactly"] == "at least" else 6)
    assert set(others) == {"default", "default.dlq", "urgent", "urgent.dlq", "amqptasks.unroutable"}
    assert others["urgent"] | {"ready": 0, "consumers": 0, "oldest": None, "seconds_to_empty": 0} == others["urgent"]
    assert json.loads(_queues(managed.config, "--json").stdout)["delayed"] == 2
    text = _queues(managed.config).stdout
    assert "2 delayed messages on the ladder" in text
    assert "amqptasks.delay" not in text
    assert "amqptasks.delay.20" in _figures(managed.config, "--all")
    assert set(_figures(managed.config, "-Q", "urgent,default")) == {"urgent", "default"}


def test_what_waits_for_its_turn_is_shown_though_only_the_code_knows_of_the_limit(managed: Bench) -> None:
    """The code is not asked. What has a name of that kind in the broker is there, and else nothing is."""
    app = managed.client()
    app.declare()
    for name in ("amqptasks.rate.shop.send", "amqptasks.rated"):
        managed.vhost.management.request("PUT", f"queues/{managed.vhost.name}/{name}", {"durable": True})
    binding = f"bindings/{managed.vhost.name}/e/amqptasks/q/amqptasks.rate.shop.send"
    managed.vhost.management.request("POST", binding, {"routing_key": "amqptasks.rate.shop.send"})
    assert app.client.publish_many([Envelope("amqptasks", "amqptasks.rate.shop.send", b"[]")] * 3) == [None] * 3
    found = _figures(managed.config)
    assert found["amqptasks.rate.shop.send"]["ready"] == 3
    assert "amqptasks.rated" not in found
    assert set(_figures(managed.config, "-Q", "default")) == {"default"}


def test_a_queue_that_is_not_there_is_named(managed: Bench) -> None:
    managed.client().declare()
    managed.vhost.management.delete_queue("urgent")
    assert _figures(managed.config)["urgent"]["exists"] is False
    assert "urgent                not in the broker" in _queues(managed.config).stdout


def test_without_the_management_api_it_says_what_it_cannot(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    assert app.client.publish_many([Envelope("amqptasks", "default", b"[]")] * 3) == [None] * 3
    wait_until(lambda: bench.vhost.ready("default") == 3, 20, "they are there")
    shown = _figures(bench.config)["default"]
    assert (shown["ready"], shown["consumers"]) == (3, 0)
    unknown = ("unacknowledged", "rate_in", "rate_out", "oldest", "seconds_to_empty", "kind")
    assert {shown[name] for name in unknown} == {None}
    assert "known to the management API only" in _queues(bench.config).stdout
    error = _queues(bench.config, "--all", code=2).stderr
    assert "AMQP does not list queues" in error


def test_the_live_table_follows(managed: Bench) -> None:
    app = managed.client()
    app.declare()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    screen = bytearray()
    with subprocess.Popen(_command(managed.config), stdout=theirs, stdin=theirs, cwd=ROOT, env=ENVIRONMENT) as process:
        os.close(theirs)

        def shows(text: str) -> bool:
            while select.select([ours], [], [], 0.05)[0]:
                try:
                    screen.extend(os.read(ours, 65536))
                except OSError:  # the other end is closed: Linux says so with EIO
                    break
            return text in screen.decode(errors="replace")

        wait_until(lambda: shows("Ctrl-C ends."), 20, "the table is there")
        assert app.client.publish_many([Envelope("amqptasks", "urgent", b"[]")] * 4321) == [None] * 4321
        wait_until(lambda: shows("4321"), 20, lambda: screen[-3000:].decode(errors="replace"))
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert shows("\x1b[?1049l"), "the terminal is left as it was"
    os.close(ours)


@pytest.mark.parametrize(
    "config",
    [
        {"management_agent.disable_metrics_collector": "true"},
        {"management.rates_mode": "none"},
        {"management.disable_stats": "true", "management.enable_queue_totals": "true"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_broker_that_counts_less_is_believed_less(config: dict[str, str], tmp_path: Path) -> None:
    with PrivateNode("mute", config=config, tune=False) as node:
        with strange_channel(node.url) as channel:
            channel.queue_declare("default", durable=True, arguments={"x-queue-type": "quorum"})
            for _ in range(5):
                channel.basic_publish("", "default", b"x")
        file = tmp_path / "amqptasks.yaml"
        file.write_text(yaml.safe_dump({"broker": {"url": node.url, "management_url": node.management_url}}))
        wait_until(lambda: _figures(file)["default"]["ready"] == 5, 20, "it is counted", pause=1)
        if "management.rates_mode" in config:
            time.sleep(6)  # a sample, which the others do not take
        shown = _figures(file)["default"]
        assert (shown["ready"], shown["unacknowledged"]) == (5, 0)
        assert (shown["rate_in"], shown["rate_out"], shown["oldest"]) == (None, None, None)
        assert "default" in _queues(file).stdout

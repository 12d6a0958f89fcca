"""What `topology export` writes, imported by RabbitMQ: afterwards there is nothing left to plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pika
import pytest
import yaml

from amqptasks.testing.rabbitmq import PrivateNode
from integration.conftest import ROOT, VirtualHost

SETTINGS: dict[str, Any] = {
    "exchanges": {"news": {"type": "topic"}, "letters": {"type": "fanout"}, "by.head": {"type": "headers"}},
    "queues": {
        "default": {},
        "urgent": {"max_priority": 5, "dead_letter": {"ttl": "14d", "max_length": 1000, "type": "classic"}},
        "email": {
            "max_length": 100,
            "message_ttl": 3600,
            "delivery_limit": 7,
            "bindings": [
                {"exchange": "news", "routing_key": "mail.#"},
                {"exchange": "letters"},
                {"exchange": "by.head", "arguments": {"x-match": "any", "kind": "mail", "size": 3}},
                {"exchange": "amq.topic", "routing_key": "a.*"},
            ],
        },
        "media, big/raw": {"dead_letter": {"enabled": False}},
    },
    "tasks": {"shop.charge": {"rate_limit": "10/m"}},
}


def _topology(url: str, management_url: str, tmp_path: Path, *command: str, code: int = 0) -> str:
    file = tmp_path / "amqptasks.yaml"
    file.write_text(yaml.safe_dump({"broker": {"url": url, "management_url": management_url}, **SETTINGS}))
    done = subprocess.run(
        [sys.executable, "-m", "amqptasks", "--config", str(file), "topology", *command],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout


def _version(vhost: VirtualHost) -> str:
    return str(vhost.management.request("GET", "overview")["rabbitmq_version"]).partition("-")[0]


def test_rabbitmq_imports_the_definitions(vhost: VirtualHost, tmp_path: Path) -> None:
    where = vhost.url, vhost.broker.management_url, tmp_path
    written = json.loads(_topology(*where, "export", "--rabbitmq", _version(vhost)))
    _topology(*where, "plan", code=2)
    for _ in range(2):  # the second time everything stands already
        vhost.management.request("POST", "definitions", written)
        assert _topology(*where, "plan") == "The broker is as declared.\n"


def test_rabbitmqctl_imports_them_into_a_virtual_host_that_was_not_there(node: PrivateNode, tmp_path: Path) -> None:
    where = f"{node.url}shop", node.management_url, tmp_path
    file = node.folder / "shop.json"
    version = node.rabbitmqctl("version").strip()
    _topology(*where, "export", "--rabbitmq", version, "-o", str(file))
    file.chmod(0o644)
    node.rabbitmqctl("import_definitions", str(file))
    node.rabbitmqctl("set_permissions", "-p", "shop", "guest", ".*", ".*", ".*")
    assert _topology(*where, "plan") == "The broker is as declared.\n"
    # And a message takes its way.
    with pika.BlockingConnection(pika.URLParameters(where[0])) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish("news", "mail.today", b"x", mandatory=True)


def test_what_the_topology_operator_would_do_leaves_nothing_to_plan(vhost: VirtualHost, tmp_path: Path) -> None:
    """The operator's requests, as its controllers make them from the custom resources."""
    where = vhost.url, vhost.broker.management_url, tmp_path
    options = ["--format", "manifests", "--cluster", "rabbit", "--rabbitmq", _version(vhost)]
    made = list(yaml.safe_load_all(_topology(*where, "export", *options)))
    assert {one["spec"]["vhost"] for one in made} == {vhost.name}
    order = ("Exchange", "Queue", "Binding")
    for one in sorted(made, key=lambda one: order.index(one["kind"])):
        spec = one["spec"]
        given = {"arguments": spec.get("arguments", {})}
        if one["kind"] == "Binding":
            kind, target = spec["destinationType"][0], quote(spec["destination"], safe="")
            path = f"bindings/{vhost.name}/e/{quote(spec['source'], safe='')}/{kind}/{target}"
            vhost.management.request("POST", path, {**given, "routing_key": spec["routingKey"]})
            continue
        given |= {"durable": spec["durable"], "auto_delete": spec["autoDelete"]}
        if one["kind"] == "Exchange":
            given["type"] = spec["type"]
        else:
            given["arguments"] = {**given["arguments"], "x-queue-type": spec["type"]}
        name = quote(spec["name"], safe="")
        vhost.management.request("PUT", f"{one['kind'].lower()}s/{vhost.name}/{name}", given)
    assert _topology(*where, "plan") == "The broker is as declared.\n"


@pytest.mark.parametrize("form", ["tree", "mermaid", "dot"])
def test_it_is_drawn_without_a_broker(form: str, tmp_path: Path) -> None:
    drawn = _topology("amqp://nobody:nothing@127.0.0.1:1/", "http://127.0.0.1:1", tmp_path, "show", "--format", form)
    assert "mail.#" in drawn or "mail.#35;" in drawn

"""Graphs, definitions and manifests: whatever the names are, their readers can read them."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from amqptasks.cli import cli
from amqptasks.config import Settings
from amqptasks.topology import Topology, build_topology
from amqptasks.topology.export import definitions, manifests
from amqptasks.topology.graph import dot, mermaid

#: What YAML, Mermaid, DOT and Kubernetes each take for something else.
HOSTILE = ['say "hi"', "a|b<c>&d", "#1; end", "back\\slash", "Größe", "yes", "1_0", "x]--> y", "UPPER.lower", "."]


def _topology(**data: Any) -> Topology:
    return build_topology(Settings.model_validate(data))


@pytest.fixture
def hostile() -> Topology:
    return _topology(
        queues={
            **{name: {} for name in HOSTILE},
            "urgent": {"max_priority": 5, "bindings": [{"exchange": "news", "routing_key": 'of."today"|'}]},
            "amq": {"bindings": [{"exchange": "amq.topic", "routing_key": "#"}]},
        },
        exchanges={"news": {"type": "topic"}, "by head": {"type": "headers"}},
    )


NODE = r'    n\d+(\{\{".+"\}\}|\[".+"\])'
ARROW = r'    n\d+ (-->|-\.->)(\|"[^"|]*"\|)? n\d+'


def test_every_line_of_a_mermaid_graph_is_a_box_or_an_arrow(hostile: Topology) -> None:
    for folded in ("amqptasks.delay.", ""):
        first, *lines = mermaid(hostile, folded).splitlines()
        assert first == "flowchart LR"
        assert [line for line in lines if not re.fullmatch(f"{NODE}|{ARROW}", line)] == []
        inside = [text for line in lines for text in re.findall(r'"([^"]*)"', line)]
        assert [text for text in inside if re.search(r"[<>|\\&\]]", text.replace("<br/>", ""))] == []
    assert '{{"amqptasks.delay.*<br/>delay ladder"}}' in mermaid(hostile, "amqptasks.delay.")
    assert mermaid(hostile, "amqptasks.delay.").count("delay") == 2
    assert mermaid(hostile).count("amqptasks.delay.2") == 10


def test_a_dot_graph_quotes_all_names(hostile: Topology) -> None:
    text = r'"(?:[^"\\]|\\.)*"'
    graph = dot(hostile, "amqptasks.delay.")
    first, *lines, last = graph.splitlines()
    assert (first, last) == ("digraph topology {", "}")
    box = rf"    {text} \[shape=(box|hexagon), label={text}\];"
    arrow = rf"    {text} -> {text}( \[(label={text})?(, )?(style=dotted)?\])?;"
    assert [line for line in lines[2:] if not re.fullmatch(f"{box}|{arrow}", line)] == []
    assert '"queue:say \\"hi\\"" -> "exchange:amqptasks.dlx" [label="say \\"hi\\"", style=dotted];' in graph


def test_the_graph_has_each_way_that_a_message_takes() -> None:
    topology = _topology(
        queues={"default": {"bindings": [{"exchange": "news", "routing_key": "a.*"}]}},
        exchanges={"news": {"type": "topic"}},
    )
    lines = dot(topology, "amqptasks.delay.").splitlines()
    for expected in (
        '"exchange:news" -> "queue:default" [label="a.*"];',
        '"exchange:amqptasks" -> "queue:default" [label="default"];',
        '"exchange:amqptasks.delay." -> "queue:default";',
        '"queue:default" -> "exchange:amqptasks.dlx" [label="default", style=dotted];',
        '"exchange:amqptasks.dlx" -> "queue:default.dlq" [label="default"];',
        '"exchange:amqptasks.dlx" -> "exchange:amqptasks.unroutable" [label="alternate", style=dotted];',
    ):
        assert lines.count(f"    {expected}") == 1, expected


def _spec(required: list[str], **properties: Any) -> dict[str, Any]:
    """What the operator's resource definitions, v1beta1, demand. What they do not know they drop: no more here."""
    reference = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "namespace": {"type": "string"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    common = {"vhost": {"type": "string"}, "arguments": {"type": "object"}, "rabbitmqClusterReference": reference}
    return {
        "type": "object",
        "properties": {**common, **properties},
        "required": [*required, "rabbitmqClusterReference"],
        "additionalProperties": False,
    }


_NAMED = {"name": {"type": "string"}, "type": {"type": "string"}, "durable": {"type": "boolean"}}
_NAMED["autoDelete"] = {"type": "boolean"}
SPECS = {
    "Exchange": _spec(["name"], **_NAMED),
    "Queue": _spec(["name"], **_NAMED, deletionPolicy={"enum": ["delete", "retain"]}),
    "Binding": _spec(
        [],
        source={"type": "string"},
        destination={"type": "string"},
        destinationType={"enum": ["exchange", "queue"]},
        routingKey={"type": "string"},
    ),
}
#: RFC 1123, as Kubernetes wants the names of custom resources.
_WORD = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"


def test_manifests_are_what_the_operator_takes(hostile: Topology) -> None:
    made = list(manifests(hostile, "shop", {}, {"name": "rabbit", "namespace": "messaging"}))
    made = list(yaml.safe_load_all(yaml.safe_dump_all(made, sort_keys=False, allow_unicode=True)))
    for one in made:
        assert one["apiVersion"] == "rabbitmq.com/v1beta1"
        jsonschema.validate(one["spec"], SPECS[one["kind"]])
        name = one["metadata"]["name"]
        assert re.fullmatch(rf"{_WORD}(\.{_WORD})*", name), name
        assert len(name) <= 253
        assert one["spec"]["vhost"] == "shop"
    named = [(one["kind"], one["metadata"]["name"]) for one in made]
    assert len(set(named)) == len(named)
    queues = {one["spec"]["name"]: one["spec"] for one in made if one["kind"] == "Queue"}
    assert set(HOSTILE) < set(queues)
    assert (queues["yes"]["type"], queues["urgent"]["type"]) == ("quorum", "classic")
    assert queues["urgent"]["arguments"]["x-max-priority"] == 5
    assert {one["deletionPolicy"] for one in queues.values()} == {"retain"}
    assert len([one for one in made if one["kind"] == "Binding"]) == len(hostile.bindings)


def test_two_virtual_hosts_have_resources_of_other_names() -> None:
    names = [
        {(one["kind"], one["metadata"]["name"]) for one in manifests(_topology(), vhost, {}, {"name": "r"})}
        for vhost in ("a", "b")
    ]
    assert names[0].isdisjoint(names[1])


def test_a_long_name_is_cut_and_stays_unique() -> None:
    topology = _topology(queues={f"{'q' * 195}.{end}": {} for end in ("a", "b")})
    names = [one["metadata"]["name"] for one in manifests(topology, "/", {}, {"name": "r"}) if one["kind"] == "Queue"]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 253


def test_definitions_leave_out_what_every_virtual_host_has(hostile: Topology) -> None:
    made = definitions(hostile, "shop", {})
    assert [one["name"] for one in made["exchanges"] if one["name"].startswith("amq.")] == []
    assert {one["vhost"] for kind in ("exchanges", "queues", "bindings") for one in made[kind]} == {"shop"}
    assert "amq.topic" in {one["source"] for one in made["bindings"]}


def test_the_command_leaves_out_what_a_version_refuses(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "amqptasks.yaml").write_text("queues: {urgent: {max_priority: 5}}\n")

    def export(*options: str, code: int = 0) -> Any:
        done = CliRunner().invoke(cli, ["topology", "export", *options], standalone_mode=True)
        assert done.exit_code == code, done.output
        return done

    def arguments(text: str) -> dict[str, Any]:
        return next(one["arguments"] for one in json.loads(text)["queues"] if one["name"] == "urgent")

    anyhow = export()
    assert arguments(anyhow.stdout)["x-consumer-timeout"] == 2_592_000_000
    assert "refuse x-consumer-timeout on classic queues (urgent)" in anyhow.stderr
    newer = export("--rabbitmq", "4.3")
    assert "x-consumer-timeout" not in arguments(newer.stdout)
    assert newer.stderr == ""
    assert "belong together" in export("--format", "manifests", code=2).output
    assert "not a version" in export("--rabbitmq", "new", code=2).output
    export("--format", "manifests", "--cluster", "messaging/rabbit", "-o", "out.yaml")
    made = yaml.safe_load_all((tmp_path / "out.yaml").read_text())
    references = {json.dumps(one["spec"]["rabbitmqClusterReference"]) for one in made}
    assert references == {'{"name": "rabbit", "namespace": "messaging"}'}

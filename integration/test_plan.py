"""The plan: what lies between the settings and the broker, on whichever RabbitMQ runs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from amqptasks.broker.admin import declare
from amqptasks.broker.management import ManagementApi
from amqptasks.broker.policies import Policy, effective
from amqptasks.broker.versions import accepted_arguments
from amqptasks.config import Settings
from amqptasks.errors import TopologyConflict
from amqptasks.testing.management import ManagementError
from amqptasks.testing.waiting import wait_until
from amqptasks.topology import build_topology
from amqptasks.topology.plan import Change, compare
from integration.conftest import ROOT, VirtualHost
from integration.seeds import VARIABLE, run_seed


def _settings(vhost: VirtualHost, **data: Any) -> Settings:
    broker = {"url": vhost.url, "management_url": vhost.broker.management_url}
    return Settings.model_validate({"broker": broker, **data})


def _plan(settings: Settings) -> list[Change]:
    topology = build_topology(settings)
    with ManagementApi(settings.broker, purpose="a test") as api:
        server = api.server()
        sent = {queue.name: accepted_arguments(queue, server) for queue in topology.queues}
        return [one for one in compare(topology, api.topology(), sent) if one.differs]


def _topology(
    vhost: VirtualHost,
    tmp_path: Path,
    *command: str,
    code: int | None,
    settings: dict[str, Any] | None = None,
    answer: str | None = None,
    **broker: Any,
) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "amqptasks.yaml"
    own = {"url": vhost.url, "management_url": vhost.broker.management_url, **broker}
    settings = {"queues": {"default": {}, "email": {"max_priority": 5}}} if settings is None else settings
    file.write_text(yaml.safe_dump({"broker": own, **settings}))
    done = subprocess.run(
        [sys.executable, "-m", "amqptasks", "--config", str(file), "topology", *command],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=answer,
    )  # fmt: skip
    assert code is None or done.returncode == code, done.stderr + done.stdout
    return done


def test_the_plan_is_empty_after_apply_and_names_what_differs(vhost: VirtualHost, tmp_path: Path) -> None:
    first = _topology(vhost, tmp_path, "plan", code=2).stdout
    assert "+ create  queue     email.dlq  quorum" in first
    # A hundred lines that say nothing are one; parts of the ladder that are missing are told one by one.
    assert "+ create  the delay ladder  26 exchanges, 25 queues, 52 bindings; --all shows each" in first
    assert "amqptasks.delay.07" not in first
    whole = _topology(vhost, tmp_path, "plan", "--all", code=2).stdout
    assert "+ create  queue     amqptasks.delay.07  quorum" in whole
    assert "the delay ladder" not in whole
    assert len(first.splitlines()) < 40
    assert len(whole.splitlines()) > 120
    _topology(vhost, tmp_path, "apply", code=0)
    assert _topology(vhost, tmp_path, "plan", code=0).stdout == "The broker is as declared.\n"

    vhost.management.delete_queue("amqptasks.delay.07")
    missing = _topology(vhost, tmp_path, "plan", code=2).stdout
    assert "+ create  queue     amqptasks.delay.07  quorum" in missing
    _topology(vhost, tmp_path, "apply", code=0)

    vhost.management.unbind("amqptasks", "default", "default")
    vhost.management.delete_queue("email")
    vhost.management.request("PUT", f"queues/{vhost.name}/email", {"durable": True, "arguments": {"x-max-priority": 3}})
    vhost.management.request("PUT", f"queues/{vhost.name}/theirs", {"durable": True, "arguments": {}})
    for name in ("theirs", "default"):
        vhost.management.request("POST", f"bindings/{vhost.name}/e/amqptasks/q/{name}", {"routing_key": "stale"})
    vhost.management.set_policy("short", "^email$", {"message-ttl": 60000})
    report = json.loads(_topology(vhost, tmp_path, "plan", "--json", code=2).stdout)
    found = {(one["action"], one["name"]) for one in report["changes"] if "amqptasks.delay" not in one["name"]}
    assert found == {
        ("bind", "amqptasks — default → default"),
        ("bind", "amqptasks — email → email"),
        ("unbind", "amqptasks — stale → default"),
        ("change", "email"),
    }
    (change,) = [one for one in report["changes"] if one["action"] == "change"]
    assert "x-max-priority: 3 → 5" in change["detail"]
    foreign = _topology(vhost, tmp_path, "plan", "--foreign", code=2).stdout
    assert "? foreign queue     theirs" in foreign
    assert "? foreign binding   amqptasks — stale → theirs" in foreign

    vhost.management.delete_queue("email")
    assert "give --yes too" in _topology(vhost, tmp_path, "apply", "--unbind", "--json", code=2).stderr
    asked = _topology(vhost, tmp_path, "apply", "--unbind", code=130, answer="n\n")
    assert "- amqptasks — stale → default" in asked.stderr
    left = json.loads(_topology(vhost, tmp_path, "plan", "--json", code=2).stdout)["changes"]
    assert [(one["action"], one["name"]) for one in left] == [("unbind", "amqptasks — stale → default")]
    _topology(vhost, tmp_path, "apply", "--unbind", "--yes", code=0)
    after = json.loads(_topology(vhost, tmp_path, "plan", "--json", code=0).stdout)
    short = {"policy": "short", "operator_policy": "", "message-ttl": 60000, "loses": {}}
    assert after == {"same": True, "changes": [], "policies": {"email": short}}


def test_policies_are_told_as_they_are_in_effect_and_what_they_lose(vhost: VirtualHost, tmp_path: Path) -> None:
    """Worked out at once; from the broker's own statistics some seconds later. Both say the same."""
    policies = {
        "low": (".*", {"message-ttl": 50_000_000, "max-length": 100}, False, 0),
        "high": (r"\.dlq$", {"max-length": 5000, "overflow": "drop-head"}, False, 5),
        "cap": (".*", {"max-length": 1000, "expires": 90_000_000}, True, 1),
        "few": (r"^(email|default)\.dlq$", {"delivery-limit": 30, "max-length": 900}, True, 7),
    }
    for name, (pattern, definition, operator, priority) in policies.items():
        vhost.management.set_policy(name, pattern, definition, operator=operator, priority=priority)
    _topology(vhost, tmp_path, "apply", code=0)
    with ManagementApi(_settings(vhost).broker, purpose="a test") as api:
        early = api.policies()
        listed = api.get("operator-policies/{vhost}")
        own = {one["name"]: one["definition"] for one in api.get("policies/{vhost}")}

        def told() -> dict[str, Any]:
            return {one["name"]: one for one in api.get("queues/{vhost}") if "effective_policy_definition" in one}

        wait_until(
            lambda: set(told()) >= set(early), 30, lambda: f"statistics of {set(early) - set(told())}", pause=0.2
        )
        for name, one in told().items():
            own_name = one.get("policy")  # RabbitMQ 4.3 leaves out what there is not
            given = (own_name, own[own_name]) if own_name else None
            worked_out = effective(name, one["type"], given, listed)
            assert worked_out.definition == one["effective_policy_definition"], name
            assert early.get(name, Policy()).definition == one["effective_policy_definition"], name
            assert early.get(name, Policy()).operator == (one.get("operator_policy") or "")
    report = json.loads(_topology(vhost, tmp_path, "plan", "--json", code=0).stdout)
    assert set(report["policies"]["email.dlq"]["loses"]) == {"max-length", "delivery-limit"}
    assert report["policies"]["email.dlq"]["operator_policy"] == "few"
    assert set(report["policies"]["email"]["loses"]) == {"expires"}
    text = _topology(vhost, tmp_path, "plan", code=0).stdout
    assert "          max-length: over 900 the oldest is dropped" in text


def test_two_applications_share_a_prefix_and_leave_each_other_alone(vhost: VirtualHost, tmp_path: Path) -> None:
    """A binding to a queue that is not declared here is another application's, whose calls need it."""
    _topology(vhost, tmp_path, "apply", code=0)
    other = _settings(vhost, queues={"reports": {"max_length": 10}}, topology={"default_queue": "reports"})
    declare(build_topology(other), other.broker)
    assert _plan(other) == []
    assert _topology(vhost, tmp_path, "plan", code=0).stdout == "The broker is as declared.\n"
    _topology(vhost, tmp_path, "apply", "--unbind", "--yes", code=0)
    assert _plan(other) == []
    # A queue that lost its limit gets its delayed messages itself, and would get each a second time.
    unlimited = _settings(vhost, queues={"reports": {}}, topology={"default_queue": "reports"})
    stale = [one.name for one in _plan(unlimited) if one.action == "unbind"]
    assert len(stale) == 1
    assert stale[0].endswith("→ amqptasks.due.reports")


#: Without consumer_timeout: brokers before 4.3 keep that argument and do not compare it.
def _random_queue(draw: random.Random, exchanges: list[str]) -> dict[str, Any]:
    kind: dict[str, Any] = draw.choice([{}, {"type": "classic"}, {"max_priority": draw.choice([5, 10])}])
    kind = dict(kind)
    if not kind and draw.random() < 0.25:
        kind["delivery_limit"] = draw.choice([5, 50])
    for key, values in {
        "message_ttl": [60, 3600], "max_length": [1000, 5000], "max_length_bytes": ["1MB"], "expires": [86400],
        "overflow": ["drop-head"], "arguments": [{"x-single-active-consumer": True}],
        "dead_letter": [
            {"ttl": 86400}, {"ttl": "14d", "max_length": 1000}, {"max_length": 5000}, {"type": "classic"},
            {"type": "classic", "ttl": 86400, "max_length": 1000}, {"enabled": False},
        ],
        "bindings": [[{"exchange": name, "routing_key": key}] for name in exchanges for key in ("a.*", "b")],
    }.items():  # fmt: skip
        if values and draw.random() < 0.25:
            kind[key] = draw.choice(values)
    return kind


def _random_settings(draw: random.Random) -> dict[str, Any]:
    exchanges = {name: {"type": draw.choice(["direct", "topic"])} for name in ("news", "mail") if draw.random() < 0.7}
    names = draw.sample(["default", "one", "two", "three"], 3)
    queues = {name: _random_queue(draw, list(exchanges)) for name in names}
    routes = [{"match": "a.*", "queue": draw.choice(names), "routing_key": draw.choice(["x", "y"])}]
    return {"exchanges": exchanges, "queues": queues, "routes": draw.choice([[], routes])}


#: What operators change by policies: it is told, and no difference.
_POLICIES: list[dict[str, Any]] = [
    {"message-ttl": 5_000_000}, {"max-length": 77_777}, {"expires": 7_200_000}, {"dead-letter-exchange": "elsewhere"},
]  # fmt: skip


def test_any_settings_after_any_others_are_reached_or_named(vhost: VirtualHost) -> None:
    """Apply A, apply B: the plan of B is empty, or names exactly the queues whose arguments AMQP has frozen."""
    seed = run_seed()
    print(f"{VARIABLE}={seed}")
    draw = random.Random(seed)
    for number in range(8):
        # Whatever stood before, each round begins with this A: what cannot be changed is deleted.
        for name, queue in vhost.management.queues().items():
            assert not queue.get("consumers"), name
            vhost.management.delete_queue(name)
        for name in ("news", "mail"):
            with contextlib.suppress(ManagementError):
                vhost.management.request("DELETE", f"exchanges/{vhost.name}/{name}")
        policy = draw.choice(_POLICIES)
        vhost.management.set_policy("any", draw.choice([".*", r"\.dlq$", "^default$"]), policy)
        before = _random_settings(draw)
        after = _random_settings(draw) if number else before
        first = _settings(vhost, **before)
        declare(build_topology(first), first.broker)
        assert _plan(first) == [], (seed, before)
        wanted = _settings(vhost, **after)
        try:
            declare(build_topology(wanted), wanted.broker)
            conflict = ""
        except TopologyConflict as error:
            conflict = str(error)
        changes = _plan(wanted)
        frozen = {(one.kind, one.name) for one in changes if one.action == "change"}
        for kind, name in frozen:
            assert f"{kind} {name!r}" in conflict, (seed, name, conflict)
        assert bool(frozen) == bool(conflict), (seed, changes, conflict)
        # What conflicts is told before anything is bound.
        rest = {one.action for one in changes} - {"change", "unbind"}
        assert not rest or (frozen and rest == {"bind"}), (seed, changes)
        assert number or not changes, (seed, changes)
        with ManagementApi(wanted.broker, purpose="a test") as api:
            assert {(one.name, *one.definition) for one in api.policies().values()} <= {("any", *policy)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_settings_are_reached_by_what_the_plan_names(vhost: VirtualHost, tmp_path: Path) -> None:
    """Apply A; with B run the commands of the plan, and delete the exchanges that it marks: then the plan is empty."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(3):
        before, after = _random_settings(draw), _random_settings(draw)
        _topology(vhost, tmp_path, "apply", code=0, settings=before)
        changes = json.loads(_topology(vhost, tmp_path, "plan", "--json", code=None, settings=after).stdout)["changes"]
        for one in (one for one in changes if one["action"] == "change"):
            if one["kind"] == "exchange":
                vhost.management.request("DELETE", f"exchanges/{vhost.name}/{one['name']}")
            else:
                _topology(vhost, tmp_path, *one["command"].split()[2:], "--yes", code=0, settings=after)
        _topology(vhost, tmp_path, "apply", "--unbind", "--yes", code=0, settings=after)
        plan = _topology(vhost, tmp_path, "plan", code=0, settings=after).stdout
        assert plan == "The broker is as declared.\n", (seed, before, after)
        for name in vhost.management.queues():
            vhost.management.delete_queue(name)
        for name in ("news", "mail"):
            with contextlib.suppress(ManagementError):
                vhost.management.request("DELETE", f"exchanges/{vhost.name}/{name}")


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"management_url": None}, 2, "broker.management_url"),
        ({"management_url": "http://guest:wrong-secret@{host}"}, 1, "wrong user or password"),
        ({"management_url": "http://guest:guest@127.0.0.1:1"}, 1, "does not answer"),
        ({"url": "{amqp}/nosuch"}, 2, "no virtual host 'nosuch'"),
    ],
)
def test_bad_input_is_one_line(vhost: VirtualHost, tmp_path: Path, given: dict[str, Any], code: int, said: str) -> None:
    host = vhost.broker.management_url.rpartition("@")[2]
    amqp = vhost.url.rpartition("/")[0]
    broker = {name: value and value.format(host=host, amqp=amqp) for name, value in given.items()}
    error = _topology(vhost, tmp_path, "plan", code=code, **broker).stderr
    assert said in error
    assert "wrong-secret" not in error
    assert len(error.splitlines()) == 1

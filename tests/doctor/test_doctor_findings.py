"""Each finding of the doctor: what it says, why it matters, and the command or the line of YAML that mends it.

What a broker says is served as it would answer, where a real one cannot be brought to it.
"""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from amqptasks import AmqpTasks
from amqptasks.broker.management import ManagementApi
from amqptasks.config import Settings
from amqptasks.doctor import Finding, Level
from amqptasks.doctor.broker import FEATURES, check_broker
from amqptasks.doctor.settings import check_application, check_results, check_routes, check_settings
from amqptasks.topology import build_topology
from amqptasks.topology.permissions import permissions

TOPOLOGY = build_topology(Settings.model_validate({}))


class Answers:
    """What the management API answers: path without query -> value, or (status, value)."""

    def __init__(self) -> None:
        self.date = 0.0
        may = permissions(TOPOLOGY, "amqptasks")["worker"]
        self.paths: dict[str, Any] = {
            "overview": {"rabbitmq_version": "4.0.5"},
            "permissions/%2F/guest": {"configure": ".*", "write": may.write, "read": ".*"},
            "nodes": [{"name": "rabbit@one", "running": True}],
            "deprecated-features/used": [],
            "exchanges/%2F": [
                {
                    "name": one.name, "type": one.type, "durable": True, "auto_delete": False, "internal": False,
                    "arguments": dict(one.arguments),
                }
                for one in TOPOLOGY.exchanges
            ],
            "queues/%2F": [
                {
                    "name": one.name, "durable": True, "auto_delete": False, "type": one.kind, "consumers": 1,
                    "arguments": dict(one.arguments), "messages": 0, "messages_ready": 0,
                }
                for one in TOPOLOGY.queues
            ],
            "bindings/%2F": [
                {
                    "source": one.source, "destination": one.destination, "destination_type": one.destination_type,
                    "routing_key": one.routing_key, "arguments": dict(one.arguments),
                }
                for one in TOPOLOGY.bindings
            ],
            "policies/%2F": [],
            "operator-policies/%2F": [],
        }  # fmt: skip

    def queue(self, name: str) -> dict[str, Any]:
        """What is said of one queue, to be changed."""
        found: dict[str, Any] = next(one for one in self.paths["queues/%2F"] if one["name"] == name)
        return found


class _Handler(BaseHTTPRequestHandler):
    answers: Answers

    def do_GET(self) -> None:
        given = self.answers.paths.get(urlsplit(self.path).path.removeprefix("/api/"), (404, {"error": "Not Found"}))
        status, value = given if isinstance(given, tuple) else (200, given)
        self.send_response_only(status)
        self.send_header("Date", formatdate(self.answers.date or None, usegmt=True))
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def api(answers: Answers) -> Iterator[ManagementApi]:
    handler = type("Handler", (_Handler,), {"answers": answers})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://watch:secret@127.0.0.1:{server.server_port}"
        settings = Settings.model_validate(
            {"broker": {"url": "amqp://guest:guest@127.0.0.1:1", "management_url": url, "connection_timeout": 0.2}}
        )
        with ManagementApi(settings.broker, purpose="a test") as made:
            made.settings = settings  # type: ignore[attr-defined]
            yield made
        server.shutdown()


def _found(api: Any, check: str) -> list[Finding]:
    return [one for one in check_broker(api, api.settings, TOPOLOGY) if one.check == check]


def _only(api: Any, check: str) -> Finding:
    (found,) = _found(api, check)
    return found


def _mends(one: Finding) -> None:
    """A command of which every word is meant, or YAML that the settings take."""
    assert one.why, one
    assert one.mend, one
    assert not any(sign in one.mend for sign in ("…", "...", "<", "NAME")), one
    command = shlex.split(one.mend)[0]
    known = ("amqptasks", "rabbitmqctl", "rabbitmq-diagnostics", "rabbitmq-plugins", "timedatectl", "apt-get", "ssh")
    if command in (*known, "python") or one.mend.startswith("rabbitmq.conf: "):
        return
    Settings.model_validate(yaml.safe_load(one.mend))


def test_a_sound_broker_has_no_finding(api: Any) -> None:
    found = list(check_broker(api, api.settings, TOPOLOGY))
    assert {one.level for one in found} == {Level.OK}, found
    assert {one.check for one in found} == {"version", "permissions", "alarms", "clock", "topology"}


@pytest.mark.parametrize("version", ["3.10.8", "3.13.7", "4.2.0", "4.3.6"])
def test_the_version_says_what_it_lacks(api: Any, answers: Answers, version: str) -> None:
    answers.paths["overview"] = {"rabbitmq_version": version}
    one = _only(api, "version")
    assert (one.level, one.what) == (Level.OK, f"RabbitMQ {version}")
    numbers = tuple(map(int, version.split(".")[:2]))
    for since, what in FEATURES:
        assert (what in one.why) == (numbers < since)
    timeouts = _found(api, "consumer timeout")
    assert [one.level for one in timeouts] == ([Level.INFO] if numbers < (3, 12) else [])
    for timeout in timeouts:
        assert timeout.mend == "rabbitmq.conf: consumer_timeout = 2592000000"
        _mends(timeout)


def test_a_version_without_the_ladder_is_an_error(api: Any, answers: Answers) -> None:
    answers.paths["overview"] = {"rabbitmq_version": "3.9.29"}
    one = _only(api, "version")
    assert (one.level, one.why) == (Level.ERROR, "delays need quorum queues with message TTL")
    _mends(one)


def test_alarms_and_a_node_that_is_down(api: Any, answers: Answers) -> None:
    answers.paths["nodes"] = [
        {"name": "rabbit@one", "running": True, "mem_alarm": True, "disk_free_alarm": True},
        {"name": "rabbit@two", "running": False},
    ]
    memory, disk = _found(api, "alarms")
    assert (memory.level, memory.what) == (Level.ERROR, "memory alarm on rabbit@one")
    assert memory.mend == "rabbitmqctl -n rabbit@one set_vm_memory_high_watermark 0.6"
    assert disk.what == "disk alarm on rabbit@one"
    assert "BrokerBlocked" in disk.why
    down = _only(api, "nodes")
    assert (down.level, down.what) == (Level.ERROR, "rabbit@two is not running")
    assert down.mend == "ssh two systemctl start rabbitmq-server"
    for one in (memory, disk, down):
        _mends(one)


def test_a_clock_that_is_off(api: Any, answers: Answers) -> None:
    answers.date = 1_000_000_000.0
    one = _only(api, "clock")
    assert one.level is Level.WARNING
    assert one.what.startswith("this machine and the broker differ by ")
    assert one.mend == "timedatectl set-ntp true"
    _mends(one)


def test_deprecated_features_that_are_in_use(api: Any, answers: Answers) -> None:
    answers.paths["deprecated-features/used"] = [{"name": "global_qos", "doc_url": "https://where.it/says"}]
    one = _only(api, "deprecated")
    assert (one.level, one.what) == (Level.WARNING, "in use: global_qos")
    assert one.why == "a later RabbitMQ refuses it: https://where.it/says"
    _mends(one)
    answers.paths["deprecated-features/used"] = (404, {})
    assert _found(api, "deprecated") == []


def test_a_check_that_the_user_may_not_make_is_told_with_the_tag_and_the_others_are_made(
    api: Any, answers: Answers
) -> None:
    for path, reason in {
        "nodes": "Not monitor user", "permissions/%2F/guest": "Not administrator user",
        "deprecated-features/used": "Not monitor user",
    }.items():  # fmt: skip
        answers.paths[path] = (401, {"error": "not_authorised", "reason": reason})
    alarms = _only(api, "alarms")
    assert alarms.level is Level.UNKNOWN
    assert alarms.what == "not checked: user 'watch' of broker.management_url lacks the tag monitoring"
    assert alarms.mend == "rabbitmqctl set_user_tags watch monitoring"
    _mends(alarms)
    assert _only(api, "permissions").mend == "rabbitmqctl list_user_permissions guest"
    assert _only(api, "deprecated").level is Level.UNKNOWN
    answers.queue("default").update(messages_ready=3, consumers=0)
    assert _only(api, "consumers").level is Level.WARNING
    answers.paths["operator-policies/%2F"] = (500, "what?")
    assert _only(api, "policies").what.startswith("not checked: ")
    assert _only(api, "topology").level is Level.OK


def test_queues_without_consumers_and_with_letters(api: Any, answers: Answers) -> None:
    answers.queue("default").update(messages_ready=0, consumers=0)
    idle = _only(api, "consumers")
    assert (idle.level, idle.what) == (Level.INFO, "queue default: nobody consumes")
    answers.queue("default")["messages_ready"] = 2
    waiting = _only(api, "consumers")
    assert (waiting.level, waiting.what) == (Level.WARNING, "queue default: 2 messages wait, and nobody consumes")
    assert waiting.mend == "amqptasks worker -Q default"
    answers.queue("default.dlq")["messages"] = 1
    letters = _only(api, "dead letters")
    assert (letters.level, letters.what) == (Level.WARNING, "queue default: 1 dead letter")
    assert letters.mend == "amqptasks dlq list -Q default"
    answers.queue("amqptasks.unroutable")["messages"] = 4
    lost = _only(api, "unroutable")
    assert (lost.level, lost.what) == (Level.ERROR, "4 messages in amqptasks.unroutable")
    assert lost.mend == "amqptasks dlq list --unroutable"
    for one in (idle, waiting, letters, lost):
        _mends(one)


def test_tasks_that_wait_for_turns_which_nobody_gives(api: Any, answers: Answers) -> None:
    waiting = {**answers.queue("default"), "name": "amqptasks.rate.shop.send", "messages_ready": 1, "consumers": 1}
    answers.paths["queues/%2F"].append(waiting)
    assert _found(api, "rate limits") == []
    waiting["consumers"] = 0
    one = _only(api, "rate limits")
    assert one.level is Level.WARNING
    assert one.what == "1 message of a limited task waits in amqptasks.rate.shop.send, and nobody gives turns"
    assert one.mend == "tasks: {shop.send: {rate_limit: 0}}"
    _mends(one)


def test_dead_letters_of_a_queue_that_left_the_settings(api: Any, answers: Answers) -> None:
    gone = {**answers.queue("default.dlq"), "name": "old.dlq", "messages": 7}
    answers.paths["queues/%2F"].append(gone)
    assert _found(api, "dead letters") == []
    leads = {"destination": "old.dlq", "destination_type": "queue", "routing_key": "old", "arguments": {}}
    answers.paths["bindings/%2F"].append({"source": "amqptasks.dlx", **leads})
    one = _only(api, "dead letters")
    assert (one.level, one.what) == (
        Level.WARNING, "old.dlq: 7 dead letters of a queue that the settings do not name",
    )  # fmt: skip
    assert one.mend == "amqptasks dlq list -Q old.dlq"
    _mends(one)
    answers.paths["queues/%2F"].append({**answers.queue("default"), "name": "old", "consumers": 1})
    assert _found(api, "dead letters") == [], "another application's, with workers"


def test_what_the_broker_does_not_count_is_not_well(api: Any, answers: Answers) -> None:
    for queue in answers.paths["queues/%2F"]:
        for name in ("messages", "messages_ready", "consumers"):
            queue.pop(name)
    consumers, letters = _only(api, "consumers"), _only(api, "dead letters")
    assert (consumers.level, letters.level) == (Level.UNKNOWN, Level.UNKNOWN)
    assert "is not known" in consumers.what
    assert "is not known" in letters.what
    _mends(consumers)
    _mends(letters)


def _policy(name: str, definition: dict[str, Any], pattern: str = ".*", priority: int = 0) -> dict[str, Any]:
    return {"name": name, "pattern": pattern, "definition": definition, "priority": priority, "apply-to": "queues"}


def test_policies_that_lose_messages(api: Any, answers: Answers) -> None:
    answers.paths["policies/%2F"] = [_policy("short", {"message-ttl": 60000, "overflow": "reject-publish"})]
    for queue in answers.paths["queues/%2F"]:
        queue["policy"] = "short"
    one = _only(api, "policies")
    assert one.level is Level.WARNING
    assert "message-ttl of the policy short: what waits longer than 60 s is dropped" in one.what
    # The ladder and the work queue keep what expires; the revokes are a stream.
    assert one.what.startswith("amqptasks.unroutable, amqptasks.joins, amqptasks.beat and 1 more: ")
    assert shlex.split(one.mend) == [
        *("rabbitmqctl", "set_policy", "-p", "/", "--priority", "0", "--apply-to", "queues", "short", ".*"),
        '{"overflow": "reject-publish"}',
    ]
    _mends(one)
    answers.paths["operator-policies/%2F"] = [_policy("tidy", {"expires": 600000}, r"\.dlq$")]
    (tidy,) = [one for one in _found(api, "policies") if "expires" in one.what]
    assert tidy.what.startswith("default.dlq: expires of the policy short and operator policy tidy: the queue goes")
    assert tidy.mend == "rabbitmqctl clear_operator_policy -p / tidy"
    _mends(tidy)


@pytest.mark.parametrize("operator", [False, True])
def test_a_delivery_limit_of_dead_letters_by_policy(api: Any, answers: Answers, operator: bool) -> None:
    given = _policy("few", {"delivery-limit": 20}, priority=3)
    answers.paths["operator-policies/%2F" if operator else "policies/%2F"] = [given]
    if not operator:
        for queue in answers.paths["queues/%2F"]:
            queue["policy"] = "few"
    unroutable, letters = _found(api, "delivery limit")
    assert letters.level is Level.ERROR
    source = "operator policy few" if operator else "few"
    assert letters.what == f"queue default.dlq: a delivery limit of 20 (policy {source})"
    assert "after 20 of them it is dropped" in letters.why
    assert shlex.split(letters.mend) == [
        *("rabbitmqctl", "set_operator_policy" if operator else "set_policy", "-p", "/", "--priority", "4"),
        *("--apply-to", "queues", "looks-at-default.dlq", r"^default\.dlq$", '{"delivery-limit": 1000000}'),
    ]
    assert "amqptasks.unroutable" in unroutable.what
    _mends(letters)
    given["definition"]["delivery-limit"] = 5000
    assert _found(api, "delivery limit") == []


def test_a_delivery_limit_of_dead_letters_by_argument_or_by_nobody(api: Any, answers: Answers) -> None:
    answers.queue("default.dlq")["arguments"]["x-delivery-limit"] = 20
    one = _only(api, "delivery limit")
    assert one.what == "queue default.dlq: a delivery limit of 20 (an argument of the queue)"
    assert one.mend == "amqptasks topology migrate default.dlq"
    _mends(one)
    assert "1 change queue" not in _only(api, "topology").what
    assert _only(api, "topology").level is Level.ERROR, "the plan names it too"
    answers.queue("default.dlq")["arguments"].pop("x-delivery-limit")
    assert _only(api, "delivery limit").what.endswith("(RabbitMQ's default)")
    answers.paths["overview"] = {"rabbitmq_version": "3.13.7"}
    assert _found(api, "delivery limit") == []
    answers.queue("amqptasks.unroutable")["arguments"]["x-delivery-limit"] = 0
    inner = _only(api, "delivery limit")
    assert inner.mend == "rabbitmqctl delete_queue --if-empty amqptasks.unroutable && amqptasks topology apply"
    _mends(inner)


def test_a_consumer_timeout_is_mended_by_policy_or_by_the_settings(api: Any, answers: Answers) -> None:
    api.settings = Settings.model_validate(
        {**api.settings.model_dump(exclude_unset=True), "worker": {"time_limit": 90}}
    )
    answers.queue("default")["arguments"]["x-consumer-timeout"] = 60_000
    one = _only(api, "consumer timeout")
    assert one.mend == "queues: {default: {consumer_timeout: 150}}"
    _mends(one)
    answers.queue("default").update(policy="brief")
    answers.paths["policies/%2F"] = [_policy("brief", {"consumer-timeout": 30_000, "max-length": 9})]
    answers.queue("default")["effective_policy_definition"] = {"consumer-timeout": 30_000, "max-length": 9}
    one = _only(api, "consumer timeout")
    assert one.mend.endswith("""'^default$' '{"consumer-timeout": 150000, "max-length": 9}'""")
    _mends(one)


# --- what is seen without a broker -----------------------------------------------------------------------------------


def _settings(**data: Any) -> dict[str, Finding]:
    settings = Settings.model_validate(data)
    return {one.check: one for one in (*check_settings(settings), *check_routes(settings, build_topology(settings)))}


def test_settings_that_are_unwise() -> None:
    assert _settings() == {}
    found = _settings(
        broker={"url": "amqp://guest:secret@rabbit.example:5672/shop"},
        serialization={"accept_content": ["json", "pickle", "yaml"]},
        queues={
            "default": {},
            "urgent": {"max_priority": 5, "prefetch": 50},
            "bare": {"dead_letter": {"enabled": False}},
        },
        exchanges={"news": {}},
        routes=[{"match": "a.*", "exchange": "news", "routing_key": "x.y"}],
    )
    said = {name: (str(one.level), one.what, one.mend) for name, one in found.items()}
    assert said == {
        "tls": (
            "warning", "amqp://guest:***@rabbit.example:5672/shop is spoken to in the clear",
            "broker: {url: 'amqps://guest:***@rabbit.example:5671/shop'}",
        ),
        "user": (
            "warning", "the user at rabbit.example is guest",
            "rabbitmqctl add_user worker && amqptasks topology permissions --role worker --user worker | sh",
        ),
        "pickle": ("warning", "workers decode pickle", "serialization: {accept_content: [json, yaml]}"),
        "priorities": (
            "warning", "queue urgent has priorities and a prefetch of 50", "{queues: {urgent: {prefetch: auto}}}",
        ),
        "dead letters": (
            "warning", "queue bare keeps no dead letters", "{queues: {bare: {dead_letter: {enabled: true}}}}",
        ),
        "routes": (
            "error", "routes[0] (a.*) points nowhere: no queue is bound to exchange 'news' for key 'x.y'",
            "{queues: {default: {bindings: [{exchange: news, routing_key: x.y}]}}}",
        ),
    }  # fmt: skip
    for one in found.values():
        _mends(one)


def _app(**config: Any) -> AmqpTasks:
    app = AmqpTasks("shop", config=config)

    @app.task(name="shop.mail")
    def mail() -> None: ...

    @app.task(name="shop.pack")
    def pack() -> None: ...

    return app


def test_an_application_without_tasks_or_none_at_all() -> None:
    (empty,) = check_application(AmqpTasks("empty", config={}), None, "shop.jobs:app")
    assert (empty.level, empty.what, empty.mend) == (Level.WARNING, "the app has no tasks", "include: [shop.tasks]")
    (none,) = check_application(None, None)
    assert (none.level, none.mend) == (Level.INFO, "app: module:app")
    (broken,) = check_application(None, "the app 'shop.jobs:app' cannot be imported", "shop.jobs:app")
    assert (broken.level, broken.mend) == (Level.ERROR, "python -c 'import shop.jobs'")
    for one in (empty, none, broken):
        _mends(one)


def test_what_settings_and_tasks_do_not_know_of_each_other() -> None:
    app = _app(
        routes=[{"match": "shop.mail", "queue": "default"}, {"match": "shop.m*", "queue": "default"}],
        tasks={"shop.packs": {"priority": 3}},
        schedule={"nightly": {"task": "shop.mails", "every": 60}},
    )
    found = [one for one in check_application(app, None) if one.level is not Level.OK]
    assert [(str(one.level), one.check, one.what, one.mend) for one in found] == [
        ("warning", "routes", "routes[1] (shop.m*) matches no task", "amqptasks routes test shop.mail"),
        (
            "info", "routes", "1 task without a route, in the default queue: shop.pack",
            "routes: [{match: 'shop.pack', queue: default}]",
        ),
        ("warning", "tasks", "tasks.'shop.packs' matches no task", "{tasks: {shop.pack: {priority: 3}}}"),
        (
            "warning", "schedule", "schedule.nightly calls shop.mails, which the app does not have",
            "{schedule: {nightly: {every: 60.0, task: shop.mail}}}",
        ),
    ]  # fmt: skip
    for one in found:
        _mends(one)


def test_a_result_store_that_does_not_answer() -> None:
    (one,) = check_results(Settings.model_validate({"result": {"backend": "redis://127.0.0.1:1/0"}}))
    assert (one.level, one.mend) == (Level.ERROR, "result: {backend: 'rpc://'}")
    _mends(one)

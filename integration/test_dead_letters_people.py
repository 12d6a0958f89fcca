"""Dead letters and people: what they see, what they may change, which mistakes they make."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pika
import pytest

from amqptasks.broker.wire import encode_properties
from amqptasks.deadletters import Filter
from amqptasks.message import Envelope, Provenance
from amqptasks.protocol.jsontypes import dumps
from amqptasks.testing.rabbitmq import free_port
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench
from integration.letters import JOBS, dead, dlq, dlq_command, terminal
from integration.strangers import strange_channel

OTHERS = {"x-queue-type": "quorum", "x-delivery-limit": 20}


def one_line(told: str, *parts: str) -> None:
    assert "Traceback" not in told
    assert len([line for line in told.splitlines() if line.startswith("Error: ")]) == 1, told
    for part in parts:
        assert part in told


def declare_as(bench: Bench, queue: str, arguments: dict[str, Any]) -> None:
    """As somebody else has it."""
    bench.vhost.management.delete_queue(queue)
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as connection:
        channel = connection.channel()
        channel.queue_declare(queue, durable=True, arguments=arguments)
        channel.queue_bind(queue, "amqptasks.dlx", queue.removesuffix(".dlq"))


# -- what is seen -----------------------------------------------------------------------------------------------------


def test_the_list_says_since_when_until_when_and_what(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    for days in (3, 1):
        at = (datetime.now(UTC) - timedelta(days=days)).isoformat()
        dead(bench, app, 1, **{"x-task-failed-at": at, "x-task-exception-message": "no such mailbox"})
    head, row = dlq(bench, "list").splitlines()[:2]
    assert head.split()[:8] == ["count", "queue", "task", "reason", "exception", "message", "first", "last"]
    assert "no such mailbox" in row
    assert row.index("3d ago") < row.index("1d ago")


@pytest.mark.parametrize("columns", [80, 300])
def test_the_list_fits_a_terminal_and_ids_stay_in_one_piece(bench: Bench, columns: int) -> None:
    """Some lines for each row where the table has no room."""
    app = bench.client()
    app.declare()
    long = {"x-task-exception-message": "no such mailbox " * 5, "task": "shop.payments.charge_the_customer"}
    dead(bench, app, 12, **long)
    shown = terminal(dlq_command(bench, "list"), columns)
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    if columns == 300:
        assert lines[0].startswith("count  queue")
        assert lines[1].startswith("12  default  shop.payments.charge_the_customer  failed  ValueError")
        return
    assert lines[0] == "12  shop.payments.charge_the_customer in default: failed"
    assert lines[1].startswith("ValueError: no such mailbox no such")
    assert lines[-3] == "/srv/shop.py:7 in charge"
    assert lines[-2].startswith("first ")
    assert lines[-1] == "default-0"


def test_commands_answer_programs(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    ids = dead(bench, app, 5)
    file = bench.folder / "letters.jsonl"
    assert json.loads(dlq(bench, "export", "-o", str(file), "--json")) == {"exported": 5, "unreadable": 0}
    assert "give --output too" in dlq(bench, "export", "--json", code=2)
    assert json.loads(dlq(bench, "edit", ids[0], "--set", "args.0=0.5", "--json")) == {"edited": ids[0]}
    assert json.loads(dlq(bench, "purge", ids[1], "--json", "-f")) == {"deleted": 1}
    assert "give --force too" in dlq(bench, "purge", ids[1], "--json", code=2)
    assert json.loads(dlq(bench, "edit", ids[0], "--set", "args.0=0", "--replay", "--json")) == {
        "replayed": 1,
        "failed": [],
    }


def test_the_time_of_a_death_by_the_broker_stands_an_export(bench: Bench) -> None:
    """Also in a file of an earlier version, where it was plain text."""
    bench.settings["queues"]["default"] = {"message_ttl": 0.1}
    app = bench.client()
    app.declare()
    bench.send(app, "note")
    wait_until(lambda: bench.vhost.ready("default.dlq") == 1, 20, "it has expired")
    (before,) = app.dead_letters.letters()
    assert before.died_at is not None
    file = bench.folder / "letters.jsonl"
    dlq(bench, "export", "-o", str(file))
    dlq(bench, "purge", "--all", "-f")
    dlq(bench, "import", str(file))
    (after,) = app.dead_letters.letters()
    assert after.died_at == before.died_at
    assert after.headers["x-death"][0]["time"] == before.headers["x-death"][0]["time"]
    assert json.loads(dlq(bench, "list", "--since", "1h", "--json"))[0]["count"] == 1
    line = json.loads(file.read_text())
    line["headers"]["x-death"][0]["time"] = before.died_at.isoformat()
    file.write_text(json.dumps(line) + "\n")
    dlq(bench, "purge", "--all", "-f")
    dlq(bench, "import", str(file))
    assert [one.died_at for one in app.dead_letters.letters(Filter(since=before.died_at))] == [before.died_at]


def test_properties_that_amqptasks_does_not_set_stay_and_an_expiration_does_not_kill_again(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    told = {"task": f"{JOBS}.note", "id": "one", "x-task-reason": "failed"}
    sent = Envelope(
        "", "default.dlq", b"[[0], {}, {}]", headers=told, message_id="m-1", correlation_id="one", expiration="3600000",
        provenance=Provenance(1_700_000_000, "payment", "shop"),
    )  # fmt: skip
    assert app.client.publish_many([sent]) == [None]
    file = bench.folder / "letters.jsonl"
    dlq(bench, "export", "-o", str(file))
    dlq(bench, "purge", "--all", "-f")
    dlq(bench, "import", str(file))
    dlq(bench, "edit", "one", "--set", "args.0=1")
    (letter,) = bench.vhost.management.messages("default.dlq")
    kept = {
        "message_id": "m-1",
        "correlation_id": "one",
        "timestamp": 1_700_000_000,
        "type": "payment",
        "app_id": "shop",
    }
    assert {**letter["properties"], **kept} == letter["properties"]
    assert letter["properties"]["expiration"] == "3600000"
    assert dlq(bench, "replay", "--all") == "1 letter replayed\n"
    (lives,) = bench.vhost.management.messages("default")
    assert {**lives["properties"], **kept} == lives["properties"]
    assert "expiration" not in lives["properties"]


# -- what is changed --------------------------------------------------------------------------------------------------


def test_an_editor_leaves_what_was_not_touched_as_it_was(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    bench.APP = "typed:app"
    (bench.folder / "typed.py").write_text(
        "from amqptasks import AmqpTasks\n"
        "app = AmqpTasks('typed')\n"
        "@app.task(name='typed.any')\n"
        "def any_(*args: object, **kwargs: object) -> None: ...\n"
    )
    at = datetime(2026, 7, 1, 9, tzinfo=UTC)
    values = [at, Decimal("9.990"), b"raw\xff", at.date(), 1]
    body = dumps([values, {"due": at, "name": "x"}, {}])
    told = {"task": "typed.any", "id": "one", "x-task-reason": "failed"}
    assert app.client.publish_many([Envelope("", "default.dlq", body, headers=told)]) == [None]
    script = bench.folder / "editor.py"
    script.write_text(
        "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text().replace('\"x\"', '\"y\"'))"
    )
    path = {"PYTHONPATH": str(bench.folder), "EDITOR": f"{sys.executable} {script}"}
    dlq(bench, "edit", "one", **path)
    edited = app.dead_letters.body(app.dead_letters.find("one"))
    assert (edited.args, edited.kwargs) == (values, {"due": at, "name": "y"})
    typed = '{"__type__": "decimal", "__value__": "1.50"}'
    dlq(bench, "edit", "one", "--set", f"args.1={typed}", **path)
    assert app.dead_letters.body(app.dead_letters.find("one")).args[1] == Decimal("1.50")
    unknown = '{"__type__": "complex", "__value__": 1}'
    one_line(dlq(bench, "edit", "one", "--set", f"args.1={unknown}", code=2, **path), "'complex' is not known")


# -- what nobody could route, and queues that are not in the settings any more ---------------------------------------


def test_what_nobody_could_route_is_seen_and_brought_back(bench: Bench) -> None:
    """A dead letter whose queue was gone, a delayed call whose queue was gone, and one for an exchange of the user."""
    bench.settings["queues"] = {"default": {}, "gone": {}, "email": {}}
    app = bench.client()
    app.declare()
    management = bench.vhost.management
    management.delete_queue("gone.dlq")
    told = {"task": f"{JOBS}.note", "id": "dead", "x-task-reason": "failed", "x-task-exception": "ValueError"}
    assert app.client.publish_many([Envelope("amqptasks.dlx", "gone", b"[[0], {}, {}]", headers=told)]) == [None]
    management.delete_queue("email")
    delayed = bench.send(app, "note", queue="email", countdown=0.5)
    wait_until(lambda: bench.vhost.ready("amqptasks.unroutable") == 2, 20, "both are there")
    groups = json.loads(dlq(bench, "list", "--unroutable", "--json"))
    assert {(one["queue"], one["reason"]) for one in groups} == {("gone", "failed"), ("email", "unroutable")}
    assert "stands in   amqptasks.unroutable" in dlq(bench, "show", delayed, "--unroutable")
    file = bench.folder / "letters.jsonl"
    assert json.loads(dlq(bench, "export", "--unroutable", "-o", str(file), "--json"))["exported"] == 2
    assert dlq(bench, "purge", "--unroutable", "-f") == "2 letters deleted\n"
    assert dlq(bench, "import", str(file)) == "2 letters imported\n"
    wait_until(lambda: bench.vhost.ready("amqptasks.unroutable") == 2, 20, "they are back")
    bench.settings["queues"] = {"default": {}}  # or the publisher would make the queue, which the settings have
    one_line(dlq(bench, "replay", delayed, "--unroutable", code=1), "1 letters stay where they were")
    assert dlq(bench, "replay", delayed, "--unroutable", "--to", "default") == "1 letter replayed\n"
    app.declare()
    assert dlq(bench, "replay", "--unroutable") == "1 letter replayed\n"
    assert [one["properties"]["headers"]["id"] for one in management.messages("gone")] == ["dead"]
    assert [one["properties"]["headers"]["id"] for one in management.messages("default")] == [delayed]
    assert bench.vhost.ready("amqptasks.unroutable") == 0


def test_letters_of_a_queue_that_left_the_settings_are_reached_by_name(bench: Bench) -> None:
    bench.settings["queues"] = {"default": {}, "old": {}}
    app = bench.client()
    app.declare()
    ids = dead(bench, app, 3, "old")
    bench.settings["queues"] = {"default": {}}
    assert dlq(bench, "list") == "No dead letters.\n"
    assert json.loads(dlq(bench, "list", "-Q", "old.dlq", "--json"))[0]["count"] == 3
    assert "args        [0]" in dlq(bench, "show", ids[0], "-Q", "old.dlq")
    assert "queue 'old' is not declared" in dlq(bench, "list", "-Q", "old", code=2)
    assert dlq(bench, "replay", ids[0], "-Q", "old.dlq", "--to", "default") == "1 letter replayed\n"
    assert dlq(bench, "purge", "-Q", "old.dlq", "-f") == "2 letters deleted\n"


# -- looking deletes nothing ------------------------------------------------------------------------------------------


def _policy(bench: Bench) -> str | None:
    """The policy that the broker has put on the queue."""
    found = bench.vhost.management.request("GET", f"queues/{bench.vhost.name}?disable_stats=true")
    return next(one.get("policy") for one in found if one["name"] == "default.dlq")


@pytest.mark.parametrize("cause", ["policy", "argument"])
def test_letters_that_bear_few_looks_are_not_looked_at(bench: Bench, cause: str) -> None:
    """RabbitMQ before 4.3 counts each look as a failed delivery, and takes the smaller limit of policy and argument."""
    app = bench.client()
    app.declare()
    if cause == "policy":
        bench.vhost.management.set_policy("all", ".*", {"delivery-limit": 20})
        wait_until(lambda: _policy(bench) == "all", 10, "the policy holds")
    else:
        declare_as(bench, "default.dlq", OTHERS)
    dead(bench, app, 3)
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url
    version = bench.vhost.management.request("GET", "overview")["rabbitmq_version"]
    if tuple(map(int, version.split(".")[:2])) >= (4, 3):
        assert json.loads(dlq(bench, "list", "--json"))[0]["count"] == 3
        return
    for command in (["list"], ["replay", "--task", "*", "--dry-run"], ["export"], ["show", "x"], ["purge", "x", "-f"]):
        one_line(dlq(bench, *command, code=2), "its delivery limit is 20")
    if cause == "policy":
        told = dlq(bench, "list", code=2)
        assert "rabbitmqctl set_policy -p" in told
        # What it says mends it.
        path = f"policies/{bench.vhost.name}/dead-letters"
        mended = {"pattern": r"\.dlq$|\.unroutable$", "definition": {"delivery-limit": 1_000_000}}
        bench.vhost.management.request("PUT", path, {**mended, "priority": 100, "apply-to": "queues"})
        wait_until(lambda: _policy(bench) == "dead-letters", 10, "the policy holds")
        for _ in range(25):
            assert len(list(app.dead_letters.letters())) == 3
        assert json.loads(dlq(bench, "list", "--json"))[0]["count"] == 3
    assert bench.vhost.ready("default.dlq") == 3


# -- mistakes ---------------------------------------------------------------------------------------------------------

Setting = Callable[[Bench, Callable[[str, str, str], str]], None]


def wrong_password(bench: Bench, _user: Any) -> None:
    bench.settings["broker"]["url"] = bench.vhost.url.replace("guest:guest", "guest:secret-word")


def no_such_vhost(bench: Bench, _user: Any) -> None:
    bench.settings["broker"]["url"] = bench.vhost.url + "-nowhere"


def nobody_there(bench: Bench, _user: Any) -> None:
    bench.settings["broker"]["url"] = f"amqp://guest:secret-word@127.0.0.1:{free_port()}/"


def may_not_read(bench: Bench, user: Callable[[str, str, str], str]) -> None:
    bench.settings["broker"]["url"] = user(".*", ".*", "^$")


def nothing_declared(bench: Bench, _user: Any) -> None:
    bench.vhost.management.delete_queue("default.dlq")


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        (wrong_password, 1, "refused the user name or password of 'guest'"),
        (no_such_vhost, 1, "-nowhere' does not exist"),
        (nobody_there, 1, "connection refused"),
        (may_not_read, 1, "ACCESS_REFUSED"),
        (nothing_declared, 2, "there is no queue 'default.dlq'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_the_broker_refuses_is_one_line(
    bench: Bench, restricted_user: Callable[[str, str, str], str], setting: Setting, code: int, said: str
) -> None:
    app = bench.client()
    app.declare()
    ids = dead(bench, app, 2)
    file = bench.folder / "letters.jsonl"
    dlq(bench, "export", "-o", str(file))
    setting(bench, restricted_user)
    for command in (
        ["list"], ["show", ids[0]], ["replay", ids[0]], ["purge", "--all", "-f"], ["export"],
        ["edit", ids[0], "--set", "args.0=1"],
    ):  # fmt: skip
        told = dlq(bench, *command, code=code)
        one_line(told, said)
        assert "secret-word" not in told


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["edit", "default-0", "--set", "kwargs.nosuch=1"], 1, "nosuch"),
        (["edit", "default-0", "--set", 'args.0="soon"'], 1, "not edited"),
        (["edit", "default-0", "--set", "args.7=1"], 2, "args.N=VALUE (N from 0 to 0)"),
        (["edit", "default-0", "--set", "args.0"], 2, "args.N=VALUE"),
        (["edit", "nobody", "--set", "args.0=1"], 2, "there is no dead letter 'nobody'"),
        (["replay", "nobody"], 2, "no dead letter has such an id"),
        (["replay", "--all", "--to", "defualt"], 2, "did you mean 'default'"),
        (["list", "-Q", "defualt"], 2, "did you mean 'default'"),
        (["list", "-Q", "defualt.dlq"], 2, "there is no queue 'defualt.dlq'"),
        (["list", "-Q", " , "], 2, "-Q names no queue"),
        (["list", "--since", "soon"], 2, "neither an ISO 8601 time nor an age"),
        (["list", "--since", "99999999999999d"], 2, "before the beginning of time"),
        (["purge"], 2, "which letters?"),
        (["import", "/dev/zero"], 2, "is no regular file"),
        (["export", "-o", "/dev/full"], 1, "No space left on device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(bench: Bench, arguments: list[str], code: int, said: str) -> None:
    app = bench.client()
    app.declare()
    dead(bench, app, 1)
    one_line(dlq(bench, *arguments, code=code), said)
    assert bench.vhost.ready("default.dlq") == 1


@pytest.mark.parametrize("url", ["http://guest:secret-word@127.0.0.1:1", "http://nobody:secret-word@{host}"])
def test_a_management_api_that_cannot_be_asked_is_a_note(bench: Bench, url: str) -> None:
    app = bench.client()
    app.declare()
    dead(bench, app, 1)
    host = bench.vhost.broker.management_url.rpartition("@")[2]
    bench.settings["broker"]["management_url"] = url.replace("{host}", host)
    assert json.loads(dlq(bench, "list", "--json"))[0]["count"] == 1
    told = dlq(bench, "show", "nobody", code=2)
    one_line(told, "Note: whether letters bear being looked at is not known")
    assert "secret-word" not in told


def test_a_queue_that_somebody_else_declared_is_used_as_it_is(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    declare_as(bench, "default.dlq", {"x-queue-type": "classic", "x-max-length": 10})
    with strange_channel(bench.vhost.url) as channel:
        for one in range(3):
            envelope = Envelope("", "", b"", headers={"id": str(one), "task": f"{JOBS}.note"})
            channel.basic_publish("amqptasks.dlx", "default", b"[[0],{},{}]", encode_properties(envelope))
    wait_until(lambda: bench.vhost.ready("default.dlq") == 3, 10, "they are there")
    for _ in range(2):
        assert [one.id for one in app.dead_letters.letters()] == ["0", "1", "2"]
    assert dlq(bench, "replay", "--all") == "3 letters replayed\n"

"""Replacing a queue while publishers and workers go on: nothing is lost, whoever is killed when."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pika
import pytest

from amqptasks.config import Settings
from amqptasks.testing.management import Management
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from amqptasks.topology import build_topology
from amqptasks.topology.permissions import permissions
from benchmarks.migrate import CASES, MOMENTS, MOVING, fill, killed, publishing, run
from integration.conftest import ROOT, Bench

Queue = Callable[..., None]
JOBS = "integration.apps.jobs"
PARKING = "amqptasks.migrating.default"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def queue(bench: Bench) -> Queue:
    """Sets what the settings say of the queue `default`."""
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url
    bench.settings["result"] = {"backend": "none"}

    def declare(**arguments: Any) -> None:
        bench.settings["queues"]["default"] = arguments

    return declare


def migrate(bench: Bench, *options: str, queue: str = "default", code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "amqptasks", "--config", str(bench.config), "topology", "migrate", queue]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=110, cwd=ROOT, check=False, env=ENVIRONMENT
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done


class Run:
    """A migration in a process of its own, with what it says."""

    def __init__(self, bench: Bench) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "amqptasks", "--config", str(bench.config), "topology", "migrate", "default", "-y"],
            cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def line(self, words: str) -> str:
        """The next line with these words."""
        assert self._process.stderr is not None
        seen = []
        for line in self._process.stderr:
            seen.append(line)
            if words in line:
                return line
        raise AssertionError("".join(seen))

    def wait(self) -> None:
        """Until it has succeeded."""
        _output, said = self._process.communicate(timeout=60)
        assert self._process.returncode == 0, said

    def end(self) -> None:
        if self._process.stderr is not None and not self._process.stderr.closed:
            self._process.kill()
            self._process.communicate()


@pytest.fixture
def migrating(bench: Bench) -> Iterator[Callable[[], Run]]:
    """Starts the command."""
    runs = []

    def start() -> Run:
        runs.append(Run(bench))
        return runs[-1]

    yield start
    for one in runs:
        one.end()


def judge(bench: Bench, sent: dict[str, float], *, copies: int) -> None:
    """All that was confirmed has run, and not much of it twice."""
    bench.wait_done(set(sent), 100)
    verdict = bench.ledger.judge(sent)
    print(f"{len(sent)} sent, {verdict.again} ran again, longest pause {verdict.pause:.1f} s")
    assert not verdict.lost
    assert verdict.again <= copies
    bench.vhost.wait_settled("default")
    nothing_is_left(bench)


def nothing_is_left(bench: Bench) -> None:
    """No queue of the migration's, and nothing that found no queue or no worker that took it."""
    assert not [name for name in bench.vhost.management.queues() if ".migrating." in name]
    assert bench.vhost.ready("default.dlq") == bench.vhost.ready("amqptasks.unroutable") == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize(
    "count",
    [
        pytest.param(4000, marks=pytest.mark.fault),
        pytest.param(50_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_nothing_is_lost_when_it_is_killed_at_each_step_under_load(
    bench: Bench, tmp_path: Path, name: str, count: int
) -> None:
    case = CASES[name]
    if count == 4000 and "5 to 10" in name:
        case = replace(case, moments=MOMENTS[-8:])
    where = {"url": bench.vhost.url, "management_url": bench.vhost.broker.management_url}
    found = run(case, where, tmp_path, vhost=bench.vhost.name, count=count)
    print(f"{found.tasks} tasks, {found.rate:.0f} a second, {found.verdict.again} again, {found.verdict.pause:.1f} s")
    assert not found.verdict.lost
    assert not found.told
    assert found.queue["type"] == ("classic" if "max_priority" in case.after else "quorum")
    nothing_is_left(bench)
    if case.moments is MOVING:
        assert found.verdict.again <= 1200


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ten_thousand_messages_at_live_publish_run_once_each(bench: Bench, queue: Queue) -> None:
    """Nobody is killed: what runs twice came while a key was bound to one queue and unbound from the other."""
    queue(type="classic")
    app = bench.client()
    app.declare()
    sent = fill(app, 10_000, 0.01)  # so that most of them are there when the migration begins
    bench.worker("default", "-c", "8")
    queue()
    with publishing(app, sent) as told:
        report = json.loads(migrate(bench, "--yes", "--json").stdout)
    assert not told
    assert report["moved_back"] >= report["moved_away"] > 1000
    # A binding is led elsewhere four times, in 5 to 23 ms on a busy machine; here in 50 at most, at 500 tasks a second.
    judge(bench, sent, copies=100)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({"ttl": 3600}, {"ttl": 7200}, marks=pytest.mark.slow),
        ({"max_length": 500}, {"max_length": 1000}),
        pytest.param({}, {"type": "classic"}, marks=pytest.mark.slow),
    ],
)
def test_a_dead_letter_queue_is_replaced_with_its_letters(
    bench: Bench, queue: Queue, before: dict[str, Any], after: dict[str, Any]
) -> None:
    queue(dead_letter=before)
    app = bench.client()
    app.declare()
    bench.worker("default", "-c", "1")
    dead = {bench.send(app, "no_such_task") for _ in range(20)}
    bench.vhost.dead_letters("default", 20)
    queue(dead_letter=after)
    report = json.loads(migrate(bench, "--yes", "--json", queue="default.dlq").stdout)
    assert (report["state"], report["moved_away"], report["moved_back"]) == ("migrated", 20, 20)
    assert {one["properties"]["headers"]["id"] for one in bench.vhost.dead_letters("default", 20)} == dead
    late = bench.send(app, "no_such_task")
    assert late in {one["properties"]["headers"]["id"] for one in bench.vhost.dead_letters("default", 21)}
    assert "as declared" in _topology(bench, "plan")


def test_a_queue_with_another_dead_letter_exchange_is_migrated(bench: Bench, queue: Queue) -> None:
    """As an older application declared it: its letters went elsewhere, and go to the .dlq afterwards."""
    queue(arguments={"x-dead-letter-exchange": "elsewhere", "x-dead-letter-routing-key": "old"})
    app = bench.client()
    app.declare()
    sent = fill(app, 200)
    queue()
    dry = migrate(bench, "--dry-run").stdout
    assert "x-dead-letter-exchange: elsewhere → amqptasks.dlx" in dry
    assert "x-dead-letter-routing-key: old → default" in dry
    migrate(bench, "--yes")
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as connection:
        channel = connection.channel()
        method, properties, _body = next(channel.consume("default"))
        channel.basic_reject(method.delivery_tag, requeue=False)
    (letter,) = bench.vhost.dead_letters("default", 1)
    assert letter["properties"]["correlation_id"] == properties.correlation_id
    bench.vhost.management.messages("default.dlq", remove=True)
    del sent[properties.correlation_id]
    bench.worker("default", "-c", "2")
    judge(bench, sent, copies=0)


def test_a_bar_shows_how_far_it_is_on_a_terminal(bench: Bench, queue: Queue) -> None:
    queue(type="classic")
    app = bench.client()
    app.declare()
    fill(app, 3000)
    queue()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    screen = bytearray()
    command = [sys.executable, "-m", "amqptasks", "--config", str(bench.config), "topology", "migrate", "default", "-y"]
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT) as process:
        os.close(theirs)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    screen.extend(os.read(ours, 65536))
                except OSError:  # the other end is closed: Linux says so with EIO
                    break
        assert process.wait(10) == 0
    os.close(ours)
    text = screen.decode(errors="replace")
    for step in ("drain", "settle", "refill"):
        assert step in text
    assert "3000/3000" in text
    assert "100%" in text
    assert text.rstrip().endswith("\x1b[2K") or "\x1b[?25h" in text, "the cursor is back"


def test_messages_to_the_queues_name_are_moved_and_it_waits_until_none_comes(
    bench: Bench, queue: Queue, migrating: Callable[[], Run]
) -> None:
    """By the default exchange, as other clients publish: nothing can stand in for the name while it is free."""
    queue(type="classic")
    app = bench.client()
    app.declare()
    bench.worker("default", "-c", "2")
    queue()
    sent = fill(app, 1000)
    process = migrating()
    with publishing(app, sent, 50, exchange="", routing_key="default") as told:
        process.line("stop their senders for a moment")
        assert process.runs
        assert bench.vhost.management.queue("default")["type"] == "classic"
    process.wait()
    assert not told
    judge(bench, sent, copies=0)


@pytest.mark.fault
def test_it_waits_for_what_workers_hold_and_a_worker_that_dies_loses_nothing(
    bench: Bench, queue: Queue, migrating: Callable[[], Run]
) -> None:
    queue(type="classic")
    app = bench.client()
    app.declare()
    worker = bench.worker("default", "-c", "1", "--prefetch", "1")
    long = bench.send(app, "note", 60.0)
    bench.wait_done({long}, event="begin")
    queue()
    process = migrating()
    assert "1 message held" in process.line("held by workers")
    short = bench.send(app, "note", 0.0)
    time.sleep(2)
    assert process.runs
    assert bench.vhost.management.queue("default")["type"] == "classic"
    worker.kill()
    process.wait()
    assert bench.vhost.management.queue("default")["type"] == "quorum"
    assert {one["properties"]["headers"]["id"] for one in bench.vhost.management.messages("default")} == {long, short}


def slowly(moments: Sequence[str], *quick: str) -> list[Any]:
    """One after another, but for the quick ones where slow tests run."""
    return [one if one in quick else pytest.param(one, marks=pytest.mark.slow) for one in moments]


def as_it_stands(bench: Bench) -> Any:
    """The queue, and what leads to it."""
    management = bench.vhost.management
    queue = management.queue("default")
    bound = management.request("GET", f"queues/{bench.vhost.name}/default/bindings")
    return queue["type"], queue["arguments"], sorted((one["source"], one["routing_key"]) for one in bound)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("moment", slowly(MOMENTS[1:], "drain", "refill"))
def test_it_can_be_rolled_back_until_it_is_finished(bench: Bench, queue: Queue, moment: str) -> None:
    """Wherever it was killed, at live publish: no task is lost, and the queue stands and is bound as before."""
    queue(type="classic")
    app = bench.client()
    app.declare()
    before = as_it_stands(bench)
    sent = fill(app, 4000)
    bench.worker("default", "-c", "2")
    queue()
    with publishing(app, sent) as told:
        killed(bench.config, moment)
        plan = _topology(bench, "plan", code=2)
        assert "a migration is under way" in plan
        assert "unbind" not in plan.partition("\n\n")[0]
        assert "another process" not in migrate(bench, "--dry-run").stdout
        assert "what it was" in migrate(bench, "--rollback", "--yes").stdout
    assert not told
    assert as_it_stands(bench) == before
    assert "no migration of queue 'default' is under way" in migrate(bench, "--rollback", code=2).stderr
    queue(type="classic")
    # While a key leads to both queues, until the next run, all that comes is copied.
    both = moment.startswith(("divert+", "return+", "switch"))
    judge(bench, sent, copies=len(sent) if both else 1200)
    assert "as declared" in _topology(bench, "plan")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("moment", slowly(MOMENTS, "switch+0.004"))
def test_a_rollback_may_be_killed_at_each_step_too(bench: Bench, queue: Queue, moment: str) -> None:
    """From behind the switch, so that it has all steps of a migration before it."""
    queue(type="classic")
    app = bench.client()
    app.declare()
    before = as_it_stands(bench)
    sent = fill(app, 4000)
    bench.worker("default", "-c", "2")
    queue()
    with publishing(app, sent) as told:
        killed(bench.config, "refill")
        killed(bench.config, moment, "--rollback")
        assert "what it was" in migrate(bench, "--rollback", "--yes").stdout
    assert not told
    assert as_it_stands(bench) == before
    queue(type="classic")
    judge(bench, sent, copies=len(sent))
    assert "as declared" in _topology(bench, "plan")


def test_killed_before_anything_was_changed_there_is_nothing_to_roll_back(standing: Bench) -> None:
    killed(standing.config, "park")
    names = standing.vhost.management.queues
    wait_until(lambda: not [one for one in names() if ".migrating." in one], 20, "its lock is gone")
    assert "no migration of queue 'default' is under way" in migrate(standing, "--rollback", code=2).stderr
    untouched(standing)


def test_a_process_that_starts_with_the_old_settings_meanwhile_does_no_harm(
    bench: Bench, queue: Queue, migrating: Callable[[], Run]
) -> None:
    """It binds the old queue again: messages would go to both for good."""
    queue(type="classic")
    app = bench.client()
    app.declare()
    sent = fill(app, 1000)
    bench.worker("default", "-c", "1")
    blocker = pika.BlockingConnection(pika.URLParameters(bench.vhost.url))
    channel = blocker.channel()
    channel.basic_qos(prefetch_count=1)
    next(channel.consume("default"))
    queue()
    process = migrating()
    process.line("held by workers")
    app.declare()  # as it was configured
    led = 0
    while led < 2:  # it may look when one of both stands
        led += int(process.line("divert ").partition("leading ")[2].split()[0])
    assert led == 2
    blocker.close()
    process.wait()
    judge(bench, sent, copies=20)
    # A process with the old settings cannot start any more, and says why.
    queue(type="classic")
    assert "type: quorum" in _topology(bench, "apply", code=2)


def _topology(bench: Bench, *command: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "amqptasks", "--config", str(bench.config), "topology", *command],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout + done.stderr


def test_messages_come_through_as_they_were(bench: Bench, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are no tasks; without what makes the broker refuse them or send them elsewhere."""
    # Workers do not read all properties; here they are read as pika reads them.
    monkeypatch.setitem(pika.spec.props, pika.BasicProperties.INDEX, pika.BasicProperties)
    queue(type="classic")
    bench.client().declare()
    connection = pika.BlockingConnection(pika.URLParameters(bench.vhost.url))
    channel = connection.channel()
    channel.confirm_delivery()
    channel.queue_declare("copies", exclusive=True)
    headers = {"text": "é", "many": [1, 2**40, {"deep": None}], "time": datetime(2030, 1, 1, tzinfo=UTC), "yes": True}
    full = pika.BasicProperties(
        "application/x-own", "latin-1", {**headers, "CC": ["copies"]}, 2, 3, "correlation", "reply", "3600000", "id",
        1700000000, "a type", "guest", "an app", "a cluster",
    )  # fmt: skip
    bodies = [b"", b"x" * 300_000, bytes(range(256))]
    for body in bodies:
        channel.basic_publish("amqptasks", "default", body, full)
    channel.basic_publish("amqptasks", "default", b"bare")
    channel.queue_purge("copies")
    queue()
    migrate(bench, "--yes")
    found = [channel.basic_get("default", auto_ack=True) for _ in range(4)]
    assert sorted(one[2] for one in found) == sorted([*bodies, b"bare"])
    for _method, properties, body in found:
        if properties.headers is not None:
            properties.headers.pop("x-delivery-count", None)  # the broker's, for this delivery
        if body == b"bare":
            assert not properties.headers
            assert properties.delivery_mode is None
            continue
        assert properties.headers.pop("time").year == 2030
        assert properties.headers == {name: value for name, value in headers.items() if name != "time"}
        assert (properties.user_id, properties.priority, properties.expiration) == (None, 3, "3600000")
        assert (properties.type, properties.app_id, properties.cluster_id) == ("a type", "an app", "a cluster")
        assert (properties.timestamp, properties.message_id) == (1700000000, "id")
    assert channel.basic_get("copies")[0] is None
    connection.close()


def test_delayed_tasks_and_a_queue_that_gets_a_length_limit(bench: Bench, queue: Queue) -> None:
    """With a limit delayed messages come by way of another queue; without one again directly. Each comes once."""
    queue(type="classic")
    app = bench.client()
    app.declare()
    sent = {app.send_task(f"{JOBS}.noted", (0.0,), countdown=5).id: 0.0}
    for arguments in ({"max_length": 1000}, {}):
        queue(type="classic", **arguments)
        migrate(bench, "--yes")
        assert "unbind" not in _topology(bench, "plan", code=0)
        sent[app.send_task(f"{JOBS}.noted", (0.0,), countdown=0.5).id] = 0.0
    bench.worker("default")
    # One may come while its binding leads to both queues; bound to both for good, all but the last would.
    judge(bench, sent, copies=1)


@pytest.mark.parametrize(("before", "after"), [({"max_length": 1000}, {}), ({}, {"max_length": 1000})])
def test_a_rollback_leads_delayed_messages_as_they_were_led(
    bench: Bench, queue: Queue, before: dict[str, int], after: dict[str, int]
) -> None:
    """To a queue with a length limit by way of another one, to one without directly."""
    queue(type="classic", **before)
    app = bench.client()
    app.declare()
    queue(type="classic", **after)
    killed(bench.config, "refill")
    migrate(bench, "--rollback", "--yes")
    queue(type="classic", **before)
    assert "as declared" in _topology(bench, "plan")
    sent = {app.send_task(f"{JOBS}.noted", (0.0,), countdown=0.5).id: 0.0}
    bench.worker("default")
    judge(bench, sent, copies=0)


def test_a_queue_that_is_too_small_for_what_waits_is_filled_as_workers_empty_it(
    bench: Bench, queue: Queue, migrating: Callable[[], Run]
) -> None:
    queue(type="classic")
    app = bench.client()
    app.declare()
    sent = fill(app, 1000)
    queue(type="classic", max_length=50)
    process = migrating()
    process.line("the queue refuses messages")
    process.end()
    assert bench.vhost.ready("default") == 50
    process = migrating()
    process.line("the queue refuses messages")
    bench.worker("default", "-c", "1")
    process.wait()
    judge(bench, sent, copies=50)


def test_the_parking_queue_is_not_deleted_while_something_of_it_is_on_its_way(
    bench: Bench, queue: Queue, node: PrivateNode, migrating: Callable[[], Run]
) -> None:
    """A count of nothing from a tick long ago is believed of others' messages, not of those that the mover holds."""
    node.rabbitmqctl("eval", "application:set_env(rabbit, quorum_tick_interval, 600000).")
    queue(type="classic")
    bench.settings["broker"] = {"url": node.url, "management_url": node.management_url}
    app = bench.client()
    app.declare()
    sent = set(fill(app, 5))
    queue(type="classic", max_length=1)
    process = migrating()
    process.line("the queue refuses messages")
    time.sleep(8)
    assert process.runs
    found = set()
    with pika.BlockingConnection(pika.URLParameters(node.url)) as connection:
        for _method, properties, _body in connection.channel().consume("default", auto_ack=True, inactivity_timeout=10):
            assert properties is not None, (sent - found, process.runs)
            found.add(properties.correlation_id)
            if found == sent:
                break
    process.wait()
    assert PARKING not in Management(node.management_url).queues()


@pytest.fixture
def standing(bench: Bench, queue: Queue) -> Bench:
    """A classic queue with ten messages, where the settings say quorum."""
    queue(type="classic")
    app = bench.client()
    app.declare()
    fill(app, 10)
    queue()
    return bench


def untouched(bench: Bench) -> None:
    """Nothing has happened to the queue."""
    assert bench.vhost.management.queue("default")["type"] == "classic"
    assert bench.vhost.ready("default") == 10
    assert not [name for name in bench.vhost.management.queues() if ".migrating." in name]
    assert len(bench.vhost.management.request("GET", f"queues/{bench.vhost.name}/default/bindings")) == 3


def test_a_dry_run_changes_nothing_and_the_plan_names_the_command(standing: Bench) -> None:
    report = json.loads(migrate(standing, "--dry-run", "--json").stdout)
    assert (report["state"], report["messages"], report["under_way"]) == ("differs", 10, False)
    assert "x-queue-type: classic → quorum" in report["changes"]
    text = migrate(standing, "--dry-run").stdout
    assert "4. delete default, and declare it anew" in text
    assert "`amqptasks topology migrate default` replaces the queue" in _topology(standing, "plan", code=2)
    changes = json.loads(_topology(standing, "plan", "--json", code=2))["changes"]
    assert [one["command"] for one in changes] == ["amqptasks topology migrate default"]
    assert "`amqptasks topology migrate default`" in _topology(standing, "apply", code=2)
    untouched(standing)


def test_where_nothing_is_to_be_migrated_it_names_what_is_missing_all_the_same(standing: Bench, queue: Queue) -> None:
    queue(type="classic")
    standing.vhost.management.delete_queue("default.dlq")
    standing.vhost.management.unbind("amqptasks", "default", "default")
    text = migrate(standing, "--yes").stdout
    assert "nothing to migrate. Missing in the broker: default.dlq, amqptasks.dlx — default → default.dlq" in text
    assert "`amqptasks topology apply` makes it" in text
    assert len(json.loads(migrate(standing, "--yes", "--json").stdout)["missing"]) == 3
    _topology(standing, "apply")
    assert migrate(standing, "--yes").stdout == "queue 'default' is as declared: nothing to migrate\n"


@pytest.mark.parametrize(
    ("settings", "name", "code", "said"),
    [
        ({}, "nosuch", 2, "queue 'nosuch' is not declared in the settings. Queues: default"),
        ({}, "theirs", 2, "queue 'theirs' is not declared in the settings: it belongs to somebody else"),
        ({}, "amqptasks.joins", 2, "needs for itself"),
        ({}, "default.dlq", 0, "as declared: nothing to migrate"),
        ({"queues": {"default": {}, "new": {}}}, "new", 2, "does not exist yet: `amqptasks topology apply`"),
        ({"queues": {"default": {"arguments": {"x-max-length": -1}}}}, "default", 2, "the broker refuses it"),
        ({"broker": {"management_url": None}}, "default", 2, "set broker.management_url"),
        ({"broker": {"url": "amqp://guest:wrong-secret@{host}/{vhost}"}}, "default", 1, "user name or password"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    standing: Bench, settings: dict[str, Any], name: str, code: int, said: str
) -> None:
    management = standing.vhost.management
    management.request("PUT", f"queues/{standing.vhost.name}/theirs", {"durable": True, "arguments": {}})
    parts = urlsplit(standing.vhost.url)
    for key, value in settings.items():
        standing.settings[key] = {**standing.settings[key], **value}
    url = standing.settings["broker"]["url"]
    host = f"{parts.hostname}:{parts.port}"
    standing.settings["broker"]["url"] = url.replace("{host}", host).replace("{vhost}", standing.vhost.name)
    done = migrate(standing, "--yes", queue=name, code=code)
    text = done.stdout if code == 0 else done.stderr
    assert said in text
    assert "wrong-secret" not in text
    assert len(text.splitlines()) == 1
    untouched(standing)


def test_without_a_permission_nothing_is_changed(standing: Bench, restricted_user: Callable[..., str]) -> None:
    found = permissions(build_topology(Settings.model_validate(standing.settings)), "amqptasks")
    operator, worker = found["operator"], found["worker"]
    for configure, write, read in (
        (worker.configure, worker.write, worker.read),
        (operator.configure, operator.write.replace("|amq\\.default", ""), operator.read),
        ("^amqptasks\\..*", operator.write, operator.read),
        (operator.configure, operator.write, "^amqptasks.*"),
    ):
        url = restricted_user(configure, write, read)
        error = _as(standing, url, code=1)
        assert "refused" in error
        untouched(standing)
    assert "10 moved back" in _as(standing, restricted_user(operator.configure, operator.write, operator.read), code=0)


def _as(bench: Bench, url: str, code: int) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "amqptasks", "-b", url, "--config", str(bench.config)),
            *("topology", "migrate", "default", "--yes"),
        ],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == code, done.stderr + done.stdout
    return done.stderr.splitlines()[-1] if code else done.stdout


@pytest.mark.parametrize(
    ("kind", "pattern", "definition"),
    [
        ("", "^amqptasks\\.", {"message-ttl": 60000}),
        ("operator-", ".*", {"expires": 600000}),
        ("operator-", "migrating", {"max-length": 5, "delivery-limit": 20}),
        ("operator-", "migrating", {"delivery-limit": 1}),
    ],
)
def test_a_policy_that_would_drop_what_is_parked_is_in_the_way(
    standing: Bench, kind: str, pattern: str, definition: dict[str, int]
) -> None:
    """The parking queue would be gone with all messages when such a policy has its way: of users or of operators."""
    vhost = standing.vhost
    vhost.management.set_policy("short", pattern, definition, operator=bool(kind))
    error = migrate(standing, "--yes", code=2).stderr
    assert f"its {next(iter(definition))} would drop messages" in error
    assert ("operator policy short" in error) == bool(kind)
    vhost.management.request("DELETE", f"{kind}policies/{vhost.name}/short")
    untouched(standing)


def test_one_at_a_time_and_not_where_a_single_consumer_is_in_the_way(standing: Bench) -> None:
    vhost = standing.vhost
    connection = pika.BlockingConnection(pika.URLParameters(vhost.url))
    channel = connection.channel()
    channel.queue_declare(f"{PARKING}.lock", exclusive=True)
    assert "another process holds" in migrate(standing, "--yes", code=1).stderr
    channel.queue_delete(f"{PARKING}.lock")
    vhost.management.delete_queue("default")
    arguments = {"x-queue-type": "classic", "x-single-active-consumer": True}
    channel.queue_declare("default", durable=True, arguments=arguments)
    channel.basic_consume("default", lambda *_: None)
    assert "has a single active consumer" in migrate(standing, "--yes", code=2).stderr
    connection.close()

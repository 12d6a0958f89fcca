"""Dead letters when something goes wrong half-way: what went is told, no letter is lost, or sent twice too often."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pika
import pytest

from amqptasks.broker.counts import queue_counts
from amqptasks.broker.reader import QueueReader
from amqptasks.config import BrokerSettings
from amqptasks.deadletters import Filter, Stopped, moving, places
from amqptasks.errors import BrokerUnreachable, ConfigError
from amqptasks.message import Envelope
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench
from integration.letters import JOBS, dead, dlq, dlq_command


@pytest.fixture(scope="module")
def impatient() -> Iterator[PrivateNode]:
    """A node that takes back what is held for six seconds, and looks every second."""
    with PrivateNode("letters", config={"consumer_timeout": "6000"}) as node:
        node.rabbitmqctl("eval", "application:set_env(rabbit, channel_tick_interval, 1000).")
        yield node


def one_line(told: str, *parts: str) -> None:
    assert "Traceback" not in told
    assert len([line for line in told.splitlines() if line.startswith(("Error: ", "Usage: "))]) == 1, told
    for part in parts:
        assert part in told


# -- half-way ---------------------------------------------------------------------------------------------------------


def test_a_replay_that_takes_longer_than_the_broker_waits_is_several_visits(
    bench: Bench, impatient: PrivateNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.settings["broker"]["url"] = impatient.url
    app = bench.client()
    app.declare()
    envelopes = [
        Envelope(
            "", "default.dlq", b"[[0], {}, {}]", headers={"task": f"{JOBS}.note", "id": str(one), "x-task-reason": r}
        )
        for one, r in enumerate(("failed", "expired") * 20)
    ]
    assert app.client.publish_many(envelopes) == [None] * 40
    # In one visit the broker ends it, and what went is told.
    with pytest.raises(Stopped, match="consumer_timeout, half an hour by default") as stopped:
        app.dead_letters.replay(Filter(reason="failed"), rate=2)
    went = stopped.value.moved.moved
    assert 0 < went < 20
    monkeypatch.setattr(moving, "VISIT_SECONDS", 1.0)
    wait_until(lambda: len(list(app.dead_letters.letters())) >= 40 - went, 10, "the others are back")
    moved = app.dead_letters.replay(Filter(reason="failed"), rate=3)
    assert moved.failed == []
    assert [one.id for one in app.dead_letters.letters()] == [str(one) for one in range(1, 40, 2)]
    # What was published when the broker took it back may have gone twice: a batch at this rate is one letter.
    assert 20 <= went + moved.moved <= 21


def test_a_connection_that_is_lost_in_mid_replay_says_how_many_went(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    dead(bench, app, 300)
    replay = subprocess.Popen(
        dlq_command(bench, "replay", "--all", "--rate", "20", "--json"), cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    wait_until(lambda: bench.vhost.ready("default") >= 10, 30, "it replays", pause=0.01)
    management = bench.vhost.management

    def readers() -> list[str]:
        return [one["name"] for one in management.connections() if "read/" in str(one.get("client_properties"))]

    for name in wait_until(readers, 10, "the management API knows its connection"):
        management.close_connection(name)
    told = json.loads(replay.communicate(timeout=60)[0])
    assert replay.returncode == 1
    assert "the connection was lost" in told["stopped"]
    assert told["replayed"] == bench.vhost.ready("default")
    wait_until(lambda: bench.vhost.ready("default.dlq") >= 300 - told["replayed"], 20, "the others are back")


@pytest.mark.timeout(60)
def test_a_queue_that_is_deleted_while_it_is_read_ends_the_visit(bench: Bench) -> None:
    """So does the consumer timeout of RabbitMQ 4.3, which cancels the consumer and leaves the channel open."""
    app = bench.client()
    app.declare()
    dead(bench, app, 300)
    letters = app.dead_letters.letters()
    next(letters)
    bench.vhost.management.delete_queue("default.dlq")
    time.sleep(0.5)  # RabbitMQ 3.10 cancels consumers of a quorum queue 30 ms after it is gone
    with pytest.raises((BrokerUnreachable, ConfigError), match=r"'default\.dlq'"):
        list(letters)
    app.declare()
    assert list(app.dead_letters.letters()) == []


def test_who_interrupts_a_replay_is_told_how_many_went(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    dead(bench, app, 300)
    replay = subprocess.Popen(
        dlq_command(bench, "replay", "--all", "--rate", "20"), cwd=ROOT, text=True, stderr=subprocess.PIPE
    )
    wait_until(lambda: bench.vhost.ready("default") >= 4, 30, "it replays", pause=0.01)
    replay.send_signal(signal.SIGINT)
    told = replay.communicate(timeout=60)[1]
    assert replay.returncode == 130
    (went,) = re.findall(r"(\d+) letters? replayed until then", told)
    assert told.endswith("Aborted.\n")
    assert 0 <= bench.vhost.ready("default") - int(went) <= 2, "those on their way, a tenth of a second's"


def test_one_queue_that_is_missing_hides_none_of_the_others(bench: Bench) -> None:
    bench.settings["queues"] = {"gone": {}, "default": {}}
    app = bench.client()
    app.declare()
    dead(bench, app, 3)
    bench.vhost.management.delete_queue("gone.dlq")
    assert json.loads(dlq(bench, "list", "--json"))[0]["count"] == 3
    assert "there is no queue 'gone.dlq'" in dlq(bench, "list", "-Q", "gone", code=2)
    bench.vhost.management.delete_queue("default.dlq")
    one_line(dlq(bench, "list", code=2), "there is no queue 'default.dlq'", "topology apply")


def test_a_purge_deletes_what_it_asked_about_and_nothing_that_died_meanwhile(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    dead(bench, app, 30)
    for options, more in ((["--all"], "second"), (["--reason", "failed"], "third")):
        purge = subprocess.Popen(
            dlq_command(bench, "purge", *options),
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert purge.stdout is not None
        asked = ""
        while "cannot be brought back" not in asked:
            asked += purge.stdout.read(1)
        count = int(re.findall(r"Delete (\d+) letters", asked)[0])
        assert count == bench.vhost.ready("default.dlq")
        news = [
            Envelope("", "default.dlq", b"[[0], {}, {}]", headers={"id": f"{more}-{n}", "x-task-reason": "failed"})
            for n in range(5)
        ]
        assert app.client.publish_many(news) == [None] * 5
        assert f"{count} letters deleted" in purge.communicate("y\n", timeout=60)[0]
        assert [one.id for one in app.dead_letters.letters()] == [f"{more}-{n}" for n in range(5)]


def test_an_import_says_which_lines_are_not_in(bench: Bench) -> None:
    bench.settings["queues"] = {"default": {}, "email": {}}
    app = bench.client()
    app.declare()
    dead(bench, app, 4)
    dead(bench, app, 3, "email")
    file = bench.folder / "letters.jsonl"
    dlq(bench, "export", "-o", str(file))
    assert dlq(bench, "purge", "--all", "-f") == "7 letters deleted\n"
    management = bench.vhost.management
    management.delete_queue("email.dlq")
    one_line(dlq(bench, "import", str(file), code=2), "there is no queue 'email.dlq'")
    assert bench.vhost.ready("default.dlq") == 0
    # One that takes nothing.
    full = {"x-max-length": 0, "x-overflow": "reject-publish"}
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as connection:
        connection.channel().queue_declare("email.dlq", durable=True, arguments=full)
    bench.settings["broker"]["publish_retry"] = {"max_retries": 0}
    told = dlq(bench, "import", str(file), code=1)
    one_line(told, "4 letters imported", "are not in, lines 5-7: import these alone")
    assert bench.vhost.ready("default.dlq") == 4


def test_a_queue_that_seems_empty_is_asked_again(
    bench: Bench, node: PrivateNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader of a quorum queue does not answer for a moment: the broker says 0 then, and no letter is gone."""
    monkeypatch.setattr(places, "_AGAIN_SECONDS", 12.0)  # time enough for rabbitmqctl
    bench.settings["broker"]["url"] = node.url
    app = bench.client()
    app.declare()
    ids = [f"{number}" for number in range(5)]
    told = [Envelope("", "default.dlq", b"[]", headers={"id": one, "x-task-reason": "failed"}) for one in ids]
    assert app.client.publish_many(told) == [None] * 5
    broker = BrokerSettings.model_validate({"url": node.url})

    def read() -> list[str]:
        with QueueReader(broker, "default.dlq") as reader:
            return [incoming.properties.headers["id"] for _, incoming in reader.messages()]

    for look, found in ((app.dead_letters.count, 5), (read, ids)):
        node.rabbitmqctl("eval", "sys:suspend('%2F_default.dlq').")
        asked = time.monotonic()
        assert queue_counts(broker, ["default.dlq"]) == {"default.dlq": (0, 0)}
        assert time.monotonic() - asked > 0.9, "it was asked four times"
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(look)
            time.sleep(1)
            assert not looking.done(), "a single 0 was believed"
            node.rabbitmqctl("eval", "sys:resume('%2F_default.dlq').")
            assert looking.result(60) == found

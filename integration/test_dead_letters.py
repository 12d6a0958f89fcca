"""Dead letters: listed, shown, replayed, edited, exported and purged, while workers dead-letter more."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pika
import pytest

from amqptasks.broker import reader
from amqptasks.deadletters import Filter
from amqptasks.deadletters.moving import WINDOW
from amqptasks.errors import ConfigError
from amqptasks.message import Envelope
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench
from integration.letters import JOBS, dead, dlq, dlq_command, peak
from integration.strangers import strange_channel


def test_letters_are_grouped_and_stay_where_they_are(bench: Bench) -> None:
    bench.settings["queues"]["email"] = {}
    app = bench.client()
    app.declare()
    ids = dead(bench, app, 30)
    dead(bench, app, 2, "email", **{"x-task-exception": "TypeError"})
    for _ in range(3):
        first, second = json.loads(dlq(bench, "list", "--json"))
        assert (first["count"], first["exception"], first["top_frame"]) == (
            30,
            "ValueError",
            "/srv/shop.py:7 in charge",
        )
        assert (second["count"], second["queue"], second["exception"]) == (2, "email", "TypeError")
    assert "/srv/shop.py:7 in charge" in dlq(bench, "list", "--since", "1h", "--exception", "Value*")
    assert dlq(bench, "list", "--until", "1h") == "No dead letters.\n"
    assert [one["properties"]["headers"]["id"] for one in bench.vhost.management.messages("default.dlq")] == ids
    shown = dlq(bench, "show", ids[7])
    assert "ValueError: no" in shown
    assert "args        [0]" in shown
    assert "there is no dead letter" in dlq(bench, "show", "nobody", code=1 + 1)


def test_replayed_letters_run_again_with_their_ids(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    ids = dead(bench, app, 250)
    assert "which letters?" in dlq(bench, "replay", code=2)
    assert dlq(bench, "replay", "--all", "--dry-run") == "250 letters match; none was replayed\n"
    assert json.loads(dlq(bench, "replay", ids[3], "--json")) == {"replayed": 1, "failed": []}
    (message,) = bench.vhost.management.messages("default")
    headers = message["properties"]["headers"]
    assert (headers["id"], headers["retries"], headers["mine"], headers["x-task-replays"]) == (ids[3], 0, "kept", 1)
    assert not {name for name in headers if name.startswith("x-task-") and name != "x-task-replays"}
    assert "x-amqptasks-crashes" not in headers
    assert dlq(bench, "replay", "--reason", "failed") == "249 letters replayed\n"
    bench.worker()
    bench.wait_done(set(ids))
    assert bench.vhost.ready("default.dlq") == 0


def test_letters_go_to_another_queue_at_a_rate(bench: Bench) -> None:
    bench.settings["queues"]["email"] = {}
    app = bench.client()
    app.declare()
    dead(bench, app, 40)
    started = time.monotonic()
    app.dead_letters.replay(to="email", rate=20)
    assert 1.7 < time.monotonic() - started < 10
    wait_until(lambda: bench.vhost.ready("email") == 40, 10, "they are there")
    with pytest.raises(ConfigError, match="did you mean 'email'"):
        app.dead_letters.replay(to="emial")


def _wait_for_more(bench: Bench, share: int, replay: subprocess.Popen[bytes]) -> None:
    # One connection for all looks: one each, hundreds a second, kept the broker from answering the next.
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as connection:
        channel = connection.channel()

        def ready() -> int:
            return int(channel.queue_declare("default", passive=True).method.message_count)

        before = ready()
        wait_until(lambda: ready() > before + share or replay.poll() is not None, 30, "it replays", pause=0.005)


@pytest.mark.fault
def test_a_replay_that_is_killed_loses_nothing(bench: Bench) -> None:
    """Ten thousand letters, the replay killed five times, once when half are done: all run, and what runs twice was on
    its way."""
    app = bench.client()
    app.declare()
    total = 10_000
    ids = set(dead(bench, app, total, "default"))
    killed = 0
    while bench.vhost.ready("default.dlq") or killed < 5:
        left = bench.vhost.ready("default.dlq")
        slowly = ("--rate", "2000") if killed == 2 else ()
        replay = subprocess.Popen(dlq_command(bench, "replay", "--all", *slowly), cwd=ROOT, stdout=subprocess.DEVNULL)
        if killed < 5:
            _wait_for_more(bench, left // 2 if killed == 2 else 0, replay)
            assert killed != 2 or replay.poll() is None, "it is killed half-way"
            replay.send_signal(signal.SIGKILL)
            killed += 1
        replay.wait(60)
        # What it held waits again as soon as its consumer is gone.
        wait_until(lambda: bench.vhost.consumers("default.dlq") == 0, 20, "its letters are back")
    found = []
    waiting = bench.vhost.ready("default")
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as connection:
        channel = connection.channel()
        consumed = channel.consume("default", auto_ack=True, inactivity_timeout=20)
        for _method, properties, _body in itertools.islice(consumed, waiting):
            assert properties is not None, f"{waiting} wait, and {len(found)} came"
            found.append(properties.headers["id"])
    assert set(found) == ids, f"lost {len(ids - set(found))}"
    assert len(found) - total <= 5 * WINDOW
    print(f"{total} letters, killed {killed} times: lost 0, sent twice {len(found) - total}")


def test_letters_that_die_again_during_the_replay_are_left_for_another_one(bench: Bench) -> None:
    bench.worker()
    app = bench.client()
    ids = {bench.send(app, "fails") for _ in range(50)}
    wait_until(lambda: bench.vhost.ready("default.dlq") == 50, 30, "all have failed")
    moved = app.dead_letters.replay()
    assert (moved.moved, moved.failed) == (50, [])
    wait_until(lambda: bench.vhost.ready("default.dlq") == 50, 30, "they failed again")
    assert {one.id for one in app.dead_letters.letters()} == ids
    assert {one.headers["x-task-replays"] for one in app.dead_letters.letters()} == {1}


def test_an_edited_letter_fits_its_task_and_says_that_it_was_edited(bench: Bench) -> None:
    bench.worker()
    app = bench.client()
    app.declare()
    (letter,) = dead(bench, app, 1)
    assert "nosuch: Unexpected" in dlq(bench, "edit", letter, "--set", "kwargs.nosuch=1", code=1)
    assert "args.N=VALUE" in dlq(bench, "edit", letter, "--set", "args.5=1", code=2)
    before = app.dead_letters.find(letter)
    assert "x-task-edited-at" not in before.headers
    dlq(bench, "edit", letter, "--set", "args.0=0.25")
    after = app.dead_letters.find(letter)
    assert (after.headers["x-task-edited-at"] > "2", app.dead_letters.body(after).args[0]) == (True, 0.25)
    assert after.headers["argsrepr"] == "(0.25,)"
    script = bench.folder / "editor.py"
    script.write_text(
        "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text().replace('0.25', '0'))"
    )
    editor = f"{sys.executable} {script}"
    dlq(bench, "edit", letter, "--replay", EDITOR=editor)
    bench.wait_done({letter})
    assert bench.vhost.ready("default.dlq") == 0


def test_letters_are_exported_purged_and_imported(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    ids = dead(bench, app, 120)
    file = bench.folder / "letters.jsonl"
    dlq(bench, "export", "-o", str(file))
    assert len(file.read_text().splitlines()) == 120
    dlq(bench, "purge", "--all", code=130, answer="n\n")
    assert dlq(bench, "purge", ids[0], ids[1], "-f") == "2 letters deleted\n"
    assert dlq(bench, "purge", "--task", f"{JOBS}.*", "-f") == "118 letters deleted\n"
    assert bench.vhost.ready("default.dlq") == 0
    assert dlq(bench, "import", str(file)) == "120 letters imported\n"
    assert dlq(bench, "replay", "--all") == "120 letters replayed\n"
    bench.worker()
    bench.wait_done(set(ids))
    file.write_text("{}\n")
    assert "line 1" in dlq(bench, "import", str(file), code=2)


def test_what_the_broker_dead_lettered_has_a_reason_too(bench: Bench) -> None:
    bench.settings["queues"]["default"] = {"message_ttl": 0.2}
    app = bench.client()
    app.declare()
    sent = bench.send(app, "note")
    wait_until(lambda: bench.vhost.ready("default.dlq") == 1, 20, "it has expired")
    with strange_channel(bench.vhost.url) as channel:
        channel.basic_publish("", "default.dlq", b"\xff\x00")
    wait_until(lambda: bench.vhost.ready("default.dlq") == 2, 20, "junk is there too")
    letter, junk = app.dead_letters.letters()
    assert (letter.id, letter.reason, letter.exception) == (sent, "expired", "")
    assert letter.died_at is not None
    assert (junk.task, junk.reason, junk.id[:5]) == ("", "unknown", "body-")
    assert [one.id for one in app.dead_letters.letters(Filter(reason="expired"))] == [sent]
    assert "undecodable" in dlq(bench, "show", junk.id)


def test_more_letters_than_fit_one_channel_are_listed_in_bounded_memory(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    ids = []
    for start in range(4):
        ids += dead(bench, app, 1000, "default", **{"x-task-exception": f"Error{start}"})
    wait_until(lambda: bench.vhost.ready("default.dlq") == 4000, 20, "all are there")
    assert sum(group.count for group in app.dead_letters.groups()) == 4000
    wait_until(lambda: bench.vhost.management.counts("default.dlq") == (4000, 0), 20, "they went back")
    assert [one["properties"]["headers"]["id"] for one in bench.vhost.management.messages("default.dlq", 4000)] == ids


def test_memory_does_not_grow_with_the_letters(bench: Bench) -> None:
    """Twenty thousand letters of 4 kB: all of them at once would be more than 100 MB."""
    app = bench.client()
    app.declare()
    told = {"task": f"{JOBS}.note", "x-task-reason": "failed", "x-task-traceback": "x" * 4000}

    def put(count: int) -> None:
        for start in range(0, count, 2000):
            many = [
                Envelope("amqptasks.dlx", "default", b"[[0], {}, {}]", headers={**told, "id": str(start + number)})
                for number in range(min(2000, count - start))
            ]
            assert app.client.publish_many(many) == [None] * len(many)

    put(1)
    little, _ = peak(bench, "list", "--json")
    put(20_000)
    for command, said in (
        (("list", "--json"), '"count": 20001'),
        (("replay", "--task", "nobody*", "--dry-run"), "0 letters match"),
        (("replay", "--all"), "20001 letters replayed"),
    ):
        most, told_us = peak(bench, *command)
        assert said in told_us
        print(f"{command}: {most:.0f} MB, {little:.0f} MB for one letter")
        assert most < little + 60


def test_letters_keep_their_order_whoever_looks_and_however_far(bench: Bench) -> None:
    """So many that the last channel has room: it must not be given what the first one gives back."""
    app = bench.client()
    app.declare()
    ids = dead(bench, app, 2500)

    def order() -> list[str]:
        return [one.id for one in app.dead_letters.letters()]

    assert order() == ids
    assert order() == ids
    assert app.dead_letters.find(ids[0]).id == ids[0]
    assert order() == ids
    assert app.dead_letters.find(ids[1700]).id == ids[1700]
    assert order() == ids


def test_letters_between_others_are_moved_and_the_others_keep_their_places(bench: Bench) -> None:
    """Gaps in the run of delivery tags: each third letter stays."""
    app = bench.client()
    app.declare()
    told = {"task": f"{JOBS}.note", "x-task-reason": "failed"}
    names = [f"{'stays' if number % 3 == 0 else 'goes'}-{number}" for number in range(1500)]
    envelopes = [
        Envelope("amqptasks.dlx", "default", b"[[0], {}, {}]", headers={**told, "id": one, "x-task-exception": one[:4]})
        for one in names
    ]
    assert app.client.publish_many(envelopes) == [None] * 1500
    wait_until(lambda: bench.vhost.ready("default.dlq") == 1500, 20, "the letters are there")
    moved = app.dead_letters.replay(Filter(exception="goes"))
    assert (moved.moved, moved.failed) == (1000, [])
    ready = [one["properties"]["headers"]["id"] for one in bench.vhost.management.messages("default", 2000)]
    assert ready == [one for one in names if one.startswith("goes")]
    wait_until(lambda: bench.vhost.management.counts("default.dlq") == (500, 0), 20, "the others went back")
    left = [one for one in names if one.startswith("stays")]
    assert [one.id for one in app.dead_letters.letters()] == left
    assert app.dead_letters.purge(Filter(ids=frozenset(left[1::2]))) == 250
    wait_until(lambda: bench.vhost.management.counts("default.dlq") == (250, 0), 20, "the others went back")
    assert [one.id for one in app.dead_letters.letters()] == left[::2]
    assert app.dead_letters.count() == 250
    assert app.dead_letters.purge() == 250
    assert app.dead_letters.count(Filter(reason="failed")) == 0


def test_what_is_flushed_does_not_come_back_whatever_happens(bench: Bench) -> None:
    """The bound on what is sent twice: an acknowledgement that `flush` has sent was read by the broker."""
    app = bench.client()
    app.declare()
    dead(bench, app, 600)
    script = """if True:
        import itertools, os, signal, sys
        from amqptasks.broker.reader import QueueReader
        from amqptasks.config import BrokerSettings
        with QueueReader(BrokerSettings.model_validate({"url": sys.argv[1]}), "default.dlq") as visit:
            for token in itertools.islice(visit.messages(), 150):
                visit.remove(*token)
            visit.flush()
            os.kill(os.getpid(), signal.SIGKILL)  # with bytes unread, so that the connection is reset
    """
    for _ in range(3):
        command = [sys.executable, "-c", script, bench.vhost.url]
        done = subprocess.run(command, cwd=ROOT, timeout=60, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == -signal.SIGKILL
    wait_until(lambda: bench.vhost.management.counts("default.dlq") == (150, 0), 60, "the rest is back")


def test_a_visit_of_millions_has_channels_enough(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_PREFETCH", 10)
    monkeypatch.setattr(reader, "_MANY_CHANNELS", 5)
    monkeypatch.setattr(reader, "_PREFETCH_OF_MANY", 500)
    app = bench.client()
    app.declare()
    ids = dead(bench, app, 1000)
    with reader.QueueReader(app.settings.broker, "default.dlq") as visit:
        found = [incoming.properties.headers["id"] for _, incoming in visit.messages()]
        assert found == ids
        assert len(visit._channels) == 5 + 2


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_each_way_in_which_the_broker_dead_letters_has_its_reason(bench: Bench, kind: str) -> None:
    """Waiting for too long, a full queue, too many deliveries, and a consumer of somebody else that rejects."""
    bench.settings["queues"] |= {
        "late": {"type": kind, "message_ttl": 0.1},
        "short": {"type": kind, "max_length": 1, "overflow": "drop-head"},
        "refused": {"type": kind},
    }
    expected = {"late": "expired", "short": "max_length", "refused": "rejected"}
    if kind == "quorum":
        bench.settings["queues"]["tried"] = {"delivery_limit": 2}
        expected["tried"] = "delivery_limit"
    app = bench.client()
    app.declare()
    sent = {queue: bench.send(app, "note", queue=queue) for queue in expected}
    bench.send(app, "note", queue="short")
    with pika.BlockingConnection(pika.URLParameters(bench.vhost.url)) as connection:
        channel = connection.channel()
        for method, _, _ in channel.consume("refused", inactivity_timeout=20):
            channel.basic_reject(method.delivery_tag, requeue=False)
            break
        channel.cancel()
        if kind == "quorum":
            # From RabbitMQ 4.3 on a nack is no failed delivery; a reject is one everywhere.
            for deliveries, (method, _, _) in enumerate(channel.consume("tried", inactivity_timeout=20), 1):
                channel.basic_reject(method.delivery_tag, requeue=True)
                if deliveries == 3:
                    break
            channel.cancel()
    for queue in expected:
        wait_until(lambda queue=queue: bench.vhost.ready(f"{queue}.dlq") == 1, 20, f"{queue}.dlq has its letter")
    listed = {one["queue"]: one for one in json.loads(dlq(bench, "list", "--json"))}
    assert {queue: one["reason"] for queue, one in listed.items()} == expected
    assert {one["task"] for one in listed.values()} == {f"{JOBS}.note"}
    assert all(one["first"] for one in listed.values())
    for queue, reason in expected.items():
        shown = dlq(bench, "show", sent[queue], "-Q", queue)
        assert f"reason      {reason}\n" in shown
        assert f"left queue '{queue}': {reason}\n" in shown
    # And they live again as others do.
    assert json.loads(dlq(bench, "replay", "-Q", "refused", "--all", "--json")) == {"replayed": 1, "failed": []}
    wait_until(lambda: bench.vhost.ready("refused") == 1, 20, "it is back")


def test_letters_are_kept_as_long_and_as_many_as_the_settings_say(bench: Bench) -> None:
    bench.settings["queues"] = {
        "default": {"dead_letter": {"max_length": 3}},
        "email": {"dead_letter": {"max_length": 3, "type": "classic"}},
        "media": {"dead_letter": {"ttl": 2}},
    }
    app = bench.client()
    app.declare()
    told = {"task": "x", "x-task-reason": "failed"}
    envelopes = [
        Envelope("amqptasks.dlx", queue, b"[]", headers={**told, "id": f"{queue}-{number}"})
        for number in range(5)
        for queue in ("default", "email", "media")
    ]
    assert app.client.publish_many(envelopes) == [None] * 15
    for queue in ("default", "email"):
        # A quorum queue drops in its own time.
        wait_until(lambda queue=queue: bench.vhost.ready(f"{queue}.dlq") == 3, 20, f"{queue} keeps three")
        assert [one.id for one in app.dead_letters.letters(queues=[queue])] == [f"{queue}-{n}" for n in (2, 3, 4)]
    wait_until(lambda: bench.vhost.ready("media.dlq") == 0, 20, "those of media are old")

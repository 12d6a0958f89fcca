"""Signed messages on a real broker: what was signed runs, whatever way it takes; nothing else has any effect."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import celery
import kombu
import pika
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from amqptasks import AmqpTasks, chain, chord, group
from amqptasks.broker.wire import encode_properties
from amqptasks.errors import ConfigError
from amqptasks.message import Envelope
from amqptasks.protocol.signing import KEY_HEADER, SIGNATURE_HEADER, Keyring
from amqptasks.testing.waiting import wait_until
from integration.apps import canvas
from integration.conftest import JOINS, ROOT, Bench, CanvasBench

JOBS = "integration.apps.jobs"
OLD, NEW = "old-secret-" * 4, "new-secret-" * 4
SIGNED = (SIGNATURE_HEADER, KEY_HEADER)


def key_pair() -> tuple[str, str]:
    """Private and public, in PEM."""
    key = Ed25519PrivateKey.generate()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = key.public_key().public_bytes(serialization.Encoding.PEM, form)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private.decode(), public.decode()


@pytest.fixture
def signing(bench: Bench) -> Callable[..., AmqpTasks]:
    """A client with these keys; without any, one that does not sign. Workers that start later have them too."""

    def client(signing_key: str | None = OLD, *verification_keys: str, **more: Any) -> AmqpTasks:
        bench.settings["security"] = {
            **({"signing_key": signing_key} if signing_key else {}),
            **({"verification_keys": list(verification_keys)} if verification_keys else {}),
            **more,
        }
        file = bench.folder / f"client-{len(bench._apps)}.yaml"
        file.write_text(bench.config.read_text())
        app = AmqpTasks("client", config=file)
        bench._apps.append(app)
        return app

    return client


class Wire:
    """The broker as somebody sees it who has access and no key."""

    def __init__(self, url: str) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self._channel = self._connection.channel()
        self._channel.confirm_delivery()

    def take(self, queue: str) -> Envelope:
        """Take a message out of a queue."""
        found: list[Any] = []

        def look() -> bool:
            method, properties, body = self._channel.basic_get(queue, auto_ack=True)
            if method is not None:
                found.append((properties, body))
            return bool(found)

        wait_until(look, 10, f"a message in {queue}")
        properties, body = found[0]
        return Envelope(
            "",
            queue,
            body,
            content_type=properties.content_type,
            headers=dict(properties.headers or {}),
            correlation_id=properties.correlation_id,
            reply_to=properties.reply_to,
        )

    def put(self, envelope: Envelope, queue: str = "default") -> None:
        """Put a message into a queue."""
        self._channel.basic_publish("", queue, envelope.body, encode_properties(envelope))

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def wire(bench: Bench) -> Iterator[Wire]:
    bench.client().declare()
    made = Wire(bench.vhost.url)
    yield made
    made.close()


def rejected(bench: Bench, count: int, words: str) -> None:
    """There are so many dead letters, all for this."""
    for letter in bench.vhost.dead_letters("default", count):
        headers = letter["properties"]["headers"]
        assert (headers["x-task-reason"], headers["x-task-exception"]) == ("rejected", "SignatureError")
        assert words in headers["x-task-exception-message"]


# --- what was signed runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hmac", "ed25519"])
def test_signed_tasks_run_whatever_way_they_take(bench: Bench, signing: Any, kind: str) -> None:
    private, _ = key_pair()
    app = signing(private if kind == "ed25519" else OLD)
    log = bench.worker("default", "-c", "2")
    sent = {bench.send(app, "note"), bench.send(app, "note", compression="gzip", headers={"x-tenant": "ü", "n": 1.5})}
    sent |= {bench.send(app, "note", countdown=0.4), bench.send(app, "recovers", 2, time_limit=30, expires=60)}
    sent |= {bench.send(app, "kills_itself", 1)}
    sent |= {one.id for one in app.send_many([app.signature(f"{JOBS}.note") for _ in range(50)])}
    changed = bench.send(app, "retries_with_other_arguments", "first")
    spawned = bench.send(app, "spawns", 1)
    bench.wait_done(sent)
    bench.wait_done({changed}, event="value=second")
    assert app.send_task(f"{JOBS}.add", (1, 2)).get(timeout=10) == 3
    depth = [f"depth=1 parent=None root={spawned}", f"depth=0 parent={spawned} root={spawned}"]
    wait_until(lambda: set(depth) <= {entry.event for entry in bench.ledger.entries()}, 10, "a task's own call ran")
    bench.vhost.wait_settled("default")
    assert bench.vhost.ready("default.dlq") == 0
    assert "signs" in log.log
    assert OLD not in log.log


async def test_awaited_calls_are_signed_too(bench: Bench, signing: Any) -> None:
    app = signing()
    bench.worker()
    handle = await app.asend_task(f"{JOBS}.add", (2, 2))
    assert await handle.aget(timeout=10) == 4
    await app.aclose()


@pytest.mark.parametrize("pool", [("-P", "asyncio", "-c", "10"), ("-P", "solo")])
def test_every_pool_verifies(bench: Bench, signing: Any, wire: Wire, pool: tuple[str, ...]) -> None:
    app = signing()
    bench.worker("default", *pool)
    wire.put(Envelope("", "", b"[[],{},{}]", headers={"task": f"{JOBS}.note", "id": "forged"}))
    bench.wait_done({bench.send(app, "note")})
    rejected(bench, 1, "is not signed")
    assert "forged" not in bench.ledger.ids("begin")


def test_compositions_are_signed_from_step_to_step(desk: CanvasBench) -> None:
    desk.settings["security"] = {"signing_key": OLD}
    desk.caller()
    desk.worker("default", "-c", "2")
    add, total, identity = canvas.add, canvas.total, canvas.identity
    assert chain(add.s(1, 1), add.s(2), add.s(3)).delay().get(timeout=20) == 7
    assert chord([add.s(n, n) for n in range(5)])(total.s()).get(timeout=20) == 20
    assert (group(identity.s(1), identity.s(2)) | total.s() | add.s(5)).delay().get(timeout=20) == 8
    assert canvas.grows.delay(1).get(timeout=20) == 12
    failed = canvas.fails.apply_async(link_error=canvas.failed_id.s())
    wait_until(lambda: failed.id in desk.ledger.ids("failed_id"), 10, "the errback ran")
    assert desk.vhost.ready("amqptasks.unroutable") == 0


def test_a_dead_letter_that_is_published_again_runs_again(bench: Bench, signing: Any, wire: Wire) -> None:
    app = signing()
    bench.worker()
    sent = bench.send(app, "fails")
    bench.vhost.dead_letters("default", 1)
    letter = wire.take("default.dlq")
    assert letter.headers["x-task-reason"] == "failed"
    wire.put(letter)
    wait_until(lambda: [entry.task_id for entry in bench.ledger.entries("try")] == [sent, sent], 10, "it ran again")
    bench.vhost.dead_letters("default", 1)
    assert wire.take("default.dlq").headers["x-task-reason"] == "failed"


@pytest.mark.fault
def test_what_a_dead_worker_leaves_is_believed_when_it_comes_again(bench: Bench, signing: Any) -> None:
    app = signing()
    worker = bench.worker("default", "-c", "1")
    sent = {bench.send(app, "note", 0.3) for _ in range(5)}
    wait_until(lambda: bench.ledger.ids("begin"), 10, "one runs")
    os.kill(worker.leaders()[0].pid, signal.SIGKILL)
    bench.wait_done(sent)
    assert bench.vhost.ready("default.dlq") == 0


# --- what was not signed has no effect -------------------------------------------------------------------------------


@pytest.mark.fault
def test_what_was_not_signed_never_runs_and_nobody_hears_of_it(bench: Bench, signing: Any, wire: Wire) -> None:
    """Also not those who wait, errbacks, and chords: a forged message names them itself."""
    forger = AmqpTasks("forger", config={"broker": {"url": bench.vhost.url}})
    bench._apps.append(forger)
    past, future = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(days=300)
    errback = forger.signature(f"{JOBS}.noop").set(task_id="errback")
    part = {"task": f"{JOBS}.noop", "args": [], "kwargs": {}, "options": {}, "chord_size": 1, "join": "g"}
    options: dict[str, Any] = {"link_error": errback, "chain": [errback.to_dict()], "chord": part, "group_id": "g"}
    answers = "answers"
    wire._channel.queue_declare(answers)
    for task, extra in (
        ("note", {}),
        ("no_such_task", {}),
        ("note", {"headers": {"expires": past.isoformat()}}),
        ("note", {"headers": {"eta": future.isoformat()}}),
        ("note", {"headers": {"x-amqptasks-verdict": ["ChordError", "no"]}}),
        ("fails", {}),
    ):
        forger.send_task(f"{JOBS}.{task}", reply_to=answers, task_id=f"forged {len(extra)}", **options, **extra)
    app = signing()
    bench.worker()
    bench.wait_done({bench.send(app, "note")})
    rejected(bench, 6, "is not signed")
    bench.vhost.wait_settled("default")
    bench.vhost.wait_settled(JOINS)
    assert bench.vhost.ready(answers) == 0
    assert not [entry for entry in bench.ledger.entries() if str(entry.task_id).startswith(("forged", "errback"))]


@pytest.mark.fault
def test_a_pickle_that_nobody_signed_is_not_loaded_though_pickle_is_accepted(
    bench: Bench, signing: Any, wire: Wire, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    bench.settings["serialization"] = {"accept_content": ["json", "pickle"]}
    app = signing()
    bench.worker()
    trap = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    headers = {"task": f"{JOBS}.note", "id": "trap"}
    wire.put(Envelope("", "", trap, content_type="application/x-python-serialize", headers=headers))
    rejected(bench, 1, "is not signed")
    bench.wait_done({bench.send(app, "note", serializer="pickle")})
    assert not marker.exists()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"headers": {SIGNATURE_HEADER: "AAAA"}}, "is not of this message"),
        ({"headers": {KEY_HEADER: "0123456789abcdef"}}, "signed with key '0123456789abcdef', which this worker"),
        ({"body": b'[[9.0], {}, {"callbacks": null}]'}, "is not of this message"),
        ({"headers": {"task": f"{JOBS}.noop"}}, "is not of this message"),
        ({"headers": {"id": "another"}}, "is not of this message"),
        ({"reply_to": "elsewhere"}, "is not of this message"),
        ({"headers": {"expires": None}}, "is not of this message"),
        ({"headers": {"x-amqptasks-verdict": ["ChordError", "no"]}}, "is not of this message"),
        ({"content_type": "application/x-python-serialize"}, "is not of this message"),
    ],
    ids=["signature", "key", "body", "task", "id", "reply_to", "expires", "verdict", "content type"],
)
def test_a_signed_message_that_was_changed_is_refused(
    bench: Bench, signing: Any, wire: Wire, change: dict[str, Any], words: str
) -> None:
    app = signing()
    bench.send(app, "note", expires=60)
    caught = wire.take("default")
    caught.headers |= change.pop("headers", {})
    for name, value in change.items():
        setattr(caught, name, value)
    wire.put(caught)
    bench.worker()
    rejected(bench, 1, words)
    assert bench.ledger.entries() == []


@pytest.mark.fault
def test_a_signature_of_another_message_is_refused(bench: Bench, signing: Any, wire: Wire) -> None:
    app = signing()
    harmless, wanted = bench.send(app, "noop"), bench.send(app, "note")
    one, other = wire.take("default"), wire.take("default")
    assert [one.headers["id"], other.headers["id"]] == [harmless, wanted]
    other.headers |= {name: one.headers[name] for name in SIGNED}
    wire.put(other)
    bench.worker()
    rejected(bench, 1, "is not of this message")


@pytest.mark.fault
def test_another_key_is_refused_also_when_it_claims_to_be_ours(bench: Bench, signing: Any, wire: Wire) -> None:
    bench.send(signing(NEW), "note")
    caught = wire.take("default")
    app = signing(OLD)
    bench.worker()
    wire.put(caught)
    rejected(bench, 1, f"signed with key {caught.headers[KEY_HEADER]!r}, which this worker does not have")
    bench.send(app, "noop", countdown=600)
    wire.take("default.dlq")
    ours = Keyring.read(OLD, (), accept_unsigned=False)
    assert ours is not None
    caught.headers[KEY_HEADER] = ours.signature({}, None, None, None, b"")[KEY_HEADER]
    wire.put(caught)
    rejected(bench, 1, "is not of this message")


def test_celerys_messages_are_refused_and_taken_while_signing_is_introduced(bench: Bench, signing: Any) -> None:
    sender = celery.Celery("sender", broker=bench.vhost.url)
    exchange = kombu.Exchange("amqptasks", type="direct", durable=True)
    sender.conf.task_queues = [kombu.Queue("default", exchange, routing_key="default", no_declare=True)]
    sender.conf.task_default_queue = "default"
    sender.conf.task_create_missing_queues = False
    app = signing()
    app.declare()
    worker = bench.worker()
    refused = sender.send_task(f"{JOBS}.note").id
    rejected(bench, 1, "is not signed")
    worker.stop()
    app = signing(accept_unsigned=True)
    worker = bench.worker()
    bench.wait_done({sender.send_task(f"{JOBS}.note").id, bench.send(app, "note")})
    assert "unsigned messages are taken too" in worker.log
    assert refused not in bench.ledger.ids("begin")
    sender.close()


# --- parts of chords -------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_forged_part_of_a_chord_starts_nothing_and_is_kept(bench: Bench, signing: Any, wire: Wire) -> None:
    """The joiner signs what a part names, so it must not believe everybody."""
    app = signing()
    bench.worker()
    body = {"task": f"{JOBS}.note", "args": [], "kwargs": {}, "options": {"task_id": "forged"}, "chord_size": 1}
    table = {"group": "g", "index": 0, "task_id": "x", "state": "SUCCESS", "result": 1, "chord": {**body, "join": "g"}}
    wire.put(Envelope("", "", json.dumps(table).encode()), JOINS)
    wire.put(Envelope("", "", json.dumps({"done": {"g": 2e9}}).encode()), JOINS)
    bench.send(app, "noop", queue="default")
    moved = app.client._calls.prepare(app._callee(f"{JOBS}.note"), (), {}).envelope
    app.calls.keys.sign(moved)
    wire.put(moved, JOINS)
    wait_until(lambda: bench.vhost.ready("amqptasks.unroutable") == 3, 10, "they are kept")
    letters = [wire.take("amqptasks.unroutable") for _ in range(3)]
    assert {one.headers["x-task-reason"] for one in letters} == {"rejected"}
    assert "a task's message is no part of a chord" in {one.headers["x-task-exception-message"] for one in letters}
    bench.wait_done({bench.send(app, "note")})
    assert "forged" not in bench.ledger.ids("begin")


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys_are_rotated_without_a_gap(bench: Bench, signing: Any) -> None:
    """Old alone; new verifies too; new signs; old is taken away. A message waits through each step."""
    old = signing(OLD)
    first = bench.worker("default", "-c", "1")
    bench.wait_done({bench.send(old, "note")})
    signing(OLD, NEW)
    second = bench.worker("default", "-c", "1")
    first.stop()
    new = signing(NEW, OLD)
    bench.wait_done({bench.send(old, "note"), bench.send(new, "note")})
    third = bench.worker("default", "-c", "1")
    second.stop()
    bench.wait_done({bench.send(old, "note"), bench.send(new, "note")})
    signing(NEW)
    bench.worker("default", "-c", "1")
    third.stop()
    bench.wait_done({bench.send(new, "note")})
    assert bench.vhost.ready("default.dlq") == 0
    bench.send(old, "note")
    rejected(bench, 1, "which this worker does not have")


def test_a_worker_with_a_public_key_alone_runs_tasks_and_says_why_it_cannot_publish(bench: Bench, signing: Any) -> None:
    private, public = key_pair()
    app = signing(private)
    signing(None, public)
    worker = bench.worker()
    bench.wait_done({bench.send(app, "note"), bench.send(app, "recovers", 1), bench.send(app, "note", countdown=0.3)})
    assert app.send_task(f"{JOBS}.add", (1, 2)).get(timeout=10) == 3
    follow = app.signature(f"{JOBS}.note")
    sent = {bench.send(app, "noop", link=follow), bench.send(app, "spawns", 1)}
    sent.add(bench.send(app, "retries_with_other_arguments", "first"))
    letters = bench.vhost.dead_letters("default", 3)
    assert {letter["properties"]["correlation_id"] for letter in letters} == sent
    for letter in letters:
        headers = letter["properties"]["headers"]
        assert headers["x-task-reason"] == "failed"
        assert "set security.signing_key" in headers["x-task-exception-message"]
    assert "Chords are left to other workers" in worker.log


def test_a_caller_without_a_key_that_signs_is_told_at_the_call(bench: Bench, signing: Any) -> None:
    _, public = key_pair()
    app = signing(None, public)
    with pytest.raises(ConfigError, match=r"set security\.signing_key"):
        bench.send(app, "note")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("signing_key: hidden", "too short: a secret has 32 characters at least, this one 6"),
        ("signing_key: 'ssh-rsa hidden'", "is given as PEM"),
        ("verification_keys: [hidden]", "security.verification_keys[0]: too short"),
        ("accept_unsigned: true", "accept_unsigned stands without a key"),
    ],
)
def test_a_wrong_key_ends_a_worker_with_one_line_that_does_not_show_it(bench: Bench, text: str, words: str) -> None:
    file = bench.folder / "wrong.yaml"
    file.write_text(f"security:\n  {text}\n")
    command = [sys.executable, "-m", "amqptasks", "-A", f"{JOBS}:app", "--config", str(file), "worker"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "hidden" not in done.stderr


def test_a_key_file_that_cannot_be_read_ends_a_worker_with_one_line(bench: Bench) -> None:
    command = [sys.executable, "-m", "amqptasks", "-A", f"{JOBS}:app", "--config", str(bench.config), "worker"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "AMQPTASKS_SECURITY__SIGNING_KEY_FILE": "/nowhere/key"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "AMQPTASKS_SECURITY__SIGNING_KEY_FILE: /nowhere/key cannot be read" in done.stderr


def test_a_replay_signs_what_was_signed_and_vouches_for_nothing_else(bench: Bench, signing: Any, wire: Wire) -> None:
    """Else an operator who replays a queue would sign what a stranger put there."""
    app = signing()
    expired = bench.send(app, "note", countdown=0.4, expires=0.2)
    wire.put(Envelope("", "", b"[[],{},{}]", headers={"task": f"{JOBS}.note", "id": "forged"}, correlation_id="forged"))
    bench.worker()
    bench.vhost.dead_letters("default", 2)
    assert app.dead_letters.replay().moved == 2
    bench.wait_done({expired})
    rejected(bench, 1, "is not signed")
    assert "forged" not in bench.ledger.ids("begin")

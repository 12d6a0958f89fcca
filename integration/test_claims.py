"""Large bodies in a store: through every kind of end, with the store away, and with messages that lie about them."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from amqptasks import StoreUnavailable, TaskRevoked, chain
from amqptasks.claims import CLAIM_TYPE, FORGET, Claim
from amqptasks.errors import MessageTooLarge
from amqptasks.message import Envelope
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from integration.apps import claims as tasks
from integration.conftest import ROOT, Broker, CanvasBench, VirtualHost
from integration.letters import dlq

TEXT = "x" * 150_000


class ClaimsBench(CanvasBench):
    """The bench with the tasks of `integration.apps.claims`, whose large arguments go to a directory."""

    APP = "integration.apps.claims:app"
    CLIENT = tasks.app

    def __init__(self, vhost: VirtualHost, folder: Path) -> None:
        super().__init__(vhost, folder)
        self.store = folder / "bodies"
        self.store.mkdir()
        self.settings["claim_check"] = {"url": f"file://{self.store}", "above": "64KiB", "keep": 0.5}

    @property
    def bodies(self) -> list[Path]:
        """What the store keeps."""
        return [one for one in self.store.rglob("*") if one.is_file()]

    def wait_empty(self) -> None:
        """Wait until the store keeps nothing any more."""
        wait_until(lambda: self.bodies == [], 20, lambda: f"the store is empty: {self.bodies}", pause=0.1)

    def publish(self, claim: dict[str, Any], task_id: str, task: str = "integration.apps.claims.size_of") -> None:
        """A message whose body is said to be kept."""
        headers = {"task": task, "lang": "py", "id": task_id}
        envelope = Envelope(
            "amqptasks", "default", json.dumps(claim).encode(), CLAIM_TYPE, headers=headers, correlation_id=task_id
        )
        assert tasks.app.client.publish_many([envelope]) == [None]


@pytest.fixture
def bench(vhost: VirtualHost, tmp_path: Path) -> Iterator[ClaimsBench]:
    made = ClaimsBench(vhost, tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("pool", ["process", "thread", "asyncio", "gevent", "solo"])
def test_a_body_is_kept_until_its_task_has_succeeded(bench: ClaimsBench, pool: str) -> None:
    app = bench.caller()
    app.declare()
    handle = tasks.size_of.delay(TEXT)
    (message,) = bench.vhost.management.messages("default")
    assert message["payload_bytes"] < 300
    assert message["properties"]["content_type"] == CLAIM_TYPE
    assert [TEXT in one.read_text() for one in bench.bodies] == [True]
    bench.worker("default", "-c", "2", "--pool", pool)
    assert handle.get(30) == len(TEXT)
    bench.wait_empty()
    again = [tasks.again.delay(TEXT), tasks.again.delay(TEXT, other=True)]
    assert [one.get(30) for one in again] == ["x", "X"]
    if pool == "asyncio":
        assert tasks.async_size_of.delay(TEXT).get(30) == len(TEXT)
    bench.wait_empty()
    bench.vhost.wait_settled("default")
    assert bench.vhost.ready("default.dlq") == 0


def test_callers_of_every_kind_and_what_follows_a_task_keep_bodies_too(bench: ClaimsBench) -> None:
    bench.settings["security"] = {"signing_key": "a secret of thirty-two bytes or so"}
    app = bench.caller()
    app.declare()

    async def call() -> int:
        found = await (await tasks.size_of.adelay(TEXT)).aget(30)
        await app.client.aclose()
        return int(found)

    bench.worker("default", "-c", "2")
    assert asyncio.run(call()) == len(TEXT)
    followed = chain(tasks.doubled.s("y" * 50_000), tasks.doubled.s(), tasks.size_of.s()).delay()
    assert followed.get(30) == 200_000
    handles = app.send_many([tasks.size_of.s(TEXT), tasks.size_of.s("small")])
    assert [one.get(30) for one in handles] == [len(TEXT), 5]
    bench.wait_empty()
    # What a message says of its body is signed with it.
    tasks.checked.delay("z" * 250_000)
    bench.vhost.dead_letters("default", 1)
    (body,) = bench.bodies
    body.write_bytes(body.read_bytes().replace(b"z", b"a"))
    assert json.loads(dlq(bench, "replay", "--all", "--json"))["replayed"] == 1
    wait_until(lambda: "undecodable" in dlq(bench, "list"), 20, "another body is refused", pause=0.3)


def test_a_process_that_is_killed_loses_no_body(bench: ClaimsBench) -> None:
    bench.caller()
    bench.worker("default", "-c", "1")
    assert tasks.deadly.delay(TEXT, str(bench.folder / "flag")).get(30) == len(TEXT)
    bench.wait_empty()


def test_a_dead_letter_keeps_its_body_to_be_shown_edited_and_replayed(bench: ClaimsBench) -> None:
    app = bench.caller()
    bench.worker("default", "-c", "1")
    handle = tasks.checked.delay("z" * 250_000)
    with pytest.raises(ValueError, match="too long"):
        handle.get(30)
    bench.vhost.dead_letters("default", 1)
    assert len(bench.bodies) == 1
    assert "z" * 1000 in dlq(bench, "show", handle.id, "--json")
    fits = tasks.checked.delay("z" * 250_001)
    bench.vhost.dead_letters("default", 2)
    edited = app.dead_letters.edit(handle.id, ["z" * 150_000], {})
    assert edited.content_type == CLAIM_TYPE
    assert app.dead_letters.body(edited).args == ["z" * 150_000]
    assert json.loads(dlq(bench, "replay", handle.id, "--json")) == {"replayed": 1, "failed": []}
    found = app.AsyncResult(handle.id)
    wait_until(lambda: bench.vhost.ready("default.dlq") == 1, 20, "one is left")
    assert app.dead_letters.find(fits.id).id == fits.id
    del found
    # What the broker and the store still have is the other letter's, and what the edited one was before.
    wait_until(lambda: len(bench.bodies) == 2, 20, lambda: f"two bodies: {bench.bodies}", pause=0.1)


def test_tasks_wait_while_the_store_is_away_and_calls_are_told(bench: ClaimsBench) -> None:
    bench.caller()
    handle = tasks.size_of.delay(TEXT)
    away = bench.store.with_name("away")
    bench.store.rename(away)
    with pytest.raises(StoreUnavailable, match=f"the store of large bodies file://{bench.store} cannot be used"):
        tasks.size_of.delay(TEXT)
    assert bench.vhost.ready("default") == 1
    worker = bench.worker("default", "-c", "1")
    wait_until(lambda: "Tasks wait for their bodies" in worker.log, 20, "the worker says so")
    assert tasks.size_of.delay("small").get(30) == 5  # it holds up no other
    away.rename(bench.store)
    assert handle.get(40) == len(TEXT)
    assert bench.ledger.ids("done") >= {handle.id}
    assert [one.attempt for one in bench.ledger.entries("done") if one.task_id == handle.id] == [1]
    bench.wait_empty()


def test_what_is_decided_already_is_not_put_off_while_the_store_is_away(bench: ClaimsBench) -> None:
    """It would come back as if it were not: a poisoned task would cost another executor."""
    bench.caller()
    expired = tasks.size_of.apply_async((TEXT,), countdown=0.3, expires=0.1)
    bench.store.rename(bench.store.with_name("away"))
    bench.worker("default", "-c", "1")
    with pytest.raises(TaskRevoked):
        expired.get(30)
    (letter,) = bench.vhost.dead_letters("default", 1)
    assert letter["properties"]["headers"]["x-task-reason"] == "expired"
    shown = dlq(bench, "show", expired.id)
    assert "there is no directory" in shown
    assert "expired" in shown
    bench.store.with_name("away").rename(bench.store)
    assert TEXT in dlq(bench, "show", expired.id, "--json")


def test_a_worker_that_may_not_sign_runs_the_task_once_and_leaves_the_body(bench: ClaimsBench) -> None:
    private, public = bench.folder / "private.pem", bench.folder / "public.pem"
    key = Ed25519PrivateKey.generate()
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    bench.settings["security"] = {"verification_keys": [public.read_text()]}
    worker = bench.worker("default", "-c", "1")
    bench.settings["security"] = {"signing_key": private.read_text()}
    bench.caller()
    handle = tasks.size_of.delay(TEXT)
    assert handle.get(30) == len(TEXT)
    wait_until(lambda: "A large body cannot be deleted" in worker.log, 10, lambda: worker.log)
    bench.vhost.wait_settled("default")
    assert [one.task_id for one in bench.ledger.entries("done")] == [handle.id]
    assert len(bench.bodies) == 1


def test_settings_of_a_store_that_cannot_be_do_not_end_a_worker_that_runs(bench: ClaimsBench) -> None:
    worker = bench.worker("default", "-c", "1")
    bench.settings["claim_check"]["url"] = "nope://here/there"
    _ = bench.config
    worker.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "going on with the old" in worker.log, 30, lambda: worker.log)
    assert "claim_check.url: Protocol not known: nope" in worker.log
    bench.settings["claim_check"]["url"] = f"file://{bench.store}"
    bench.caller()
    assert tasks.size_of.delay(TEXT).get(30) == len(TEXT)


def test_messages_that_lie_about_their_bodies_are_dead_letters(bench: ClaimsBench) -> None:
    app = bench.caller()
    app.declare()
    secret = bench.folder / "secret.txt"
    secret.write_text('[["secret"],{},{}]')
    tasks.size_of.delay(TEXT)
    sound = json.loads(bench.vhost.management.messages("default")[0]["payload"])
    lies = {
        "climbs": {**sound, "key": "../secret.txt"},
        "absolute": {**sound, "key": str(secret)},
        "gone": {**sound, "key": f"2026-01-31/{'0f' * 16}"},
        "larger": {**sound, "size": 2**62},
        "another": {**sound, "sha256": "0" * 64},
        "nothing": {},
        "pickle": {**sound, "content_type": "application/x-python-serialize"},
    }
    for task_id, claim in lies.items():
        bench.publish(claim, task_id)
    app.send_task(FORGET, ("../secret.txt",), task_id="deletes")
    worker = bench.worker("default", "-c", "1")
    letters = bench.vhost.dead_letters("default", len(lies) + 1)
    reasons = {one["properties"]["correlation_id"]: one["properties"]["headers"]["x-task-reason"] for one in letters}
    assert reasons == {**dict.fromkeys(lies, "undecodable"), "deletes": "failed"}
    assert secret.exists()
    assert "secret" not in json.dumps(
        [one["properties"]["headers"]["x-task-exception-message"] for one in letters]
    ).replace("secret.txt", "")
    bench.wait_empty()  # the sound one's
    assert worker.process.poll() is None


def test_a_worker_without_the_store_refuses_what_another_can_run(bench: ClaimsBench) -> None:
    bench.caller()
    handle = tasks.size_of.delay(TEXT)
    kept = bench.settings.pop("claim_check")
    first = bench.worker("default", "-c", "1")
    (letter,) = bench.vhost.dead_letters("default", 1)
    assert "claim_check.url is not set here" in letter["properties"]["headers"]["x-task-exception-message"]
    first.stop()
    bench.settings["claim_check"] = kept
    bench.worker("default", "-c", "1")
    assert json.loads(dlq(bench, "replay", "--all", "--json"))["replayed"] == 1
    bench.wait_done({handle.id})
    bench.wait_empty()


@pytest.fixture(scope="module")
def small_node() -> Iterator[Broker]:
    """A node whose largest message is that of RabbitMQ 4, whatever its version."""
    with PrivateNode("claims", config={"max_message_size": str(16 * 1024 * 1024)}) as node:
        yield Broker("private node", node.url, node.management_url)


class TestBeyondTheBrokersLimit:
    @pytest.fixture
    def broker(self, small_node: Broker) -> Broker:
        return small_node

    def test_what_is_larger_than_the_broker_takes_passes(self, bench: ClaimsBench) -> None:
        bench.settings["serialization"] = {"max_body": "64MiB"}
        bench.caller()
        bench.worker("default", "-c", "1")
        assert tasks.size_of.delay("x" * 40_000_000).get(60) == 40_000_000
        with pytest.raises(MessageTooLarge, match=r"serialization\.max_body"):
            tasks.size_of.delay("x" * 70_000_000)
        bench.wait_empty()
        # What is returned travels whole: the task fails, and its dead letter needs the body.
        failed = tasks.doubled.delay("x" * 20_000_000)
        with pytest.raises(MessageTooLarge):
            failed.get(60)
        (letter,) = bench.vhost.dead_letters("default", 1)
        assert letter["properties"]["headers"]["x-task-exception"] == "MessageTooLarge"
        time.sleep(3 * bench.settings["claim_check"]["keep"])
        assert len(bench.bodies) == 1


def test_doctor_tries_the_store(bench: ClaimsBench) -> None:
    def doctor() -> str:
        command = [sys.executable, "-m", "amqptasks", "-A", bench.APP, "--config", str(bench.config), "doctor"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
        return done.stdout + done.stderr

    bench.caller().declare()
    assert f"large bodies can be kept in file://{bench.store}" in doctor()
    shutil.rmtree(bench.store)
    assert f"there is no directory {bench.store}" in doctor()


def test_the_claim_of_a_message_names_what_is_kept(bench: ClaimsBench) -> None:
    """As the documents show it."""
    bench.caller().declare()
    tasks.size_of.delay(TEXT)
    claim = Claim.of(bench.vhost.management.messages("default")[0]["payload"].encode())
    assert (bench.store / claim.key).stat().st_size == claim.size

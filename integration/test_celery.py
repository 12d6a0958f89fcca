"""A Celery producer sends to our worker, and our producer to a Celery worker: the wire format is the same."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import celery
import kombu
import pytest

from amqptasks.testing.ledger import PATH_VARIABLE
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench

JOBS = "integration.apps.jobs"


@pytest.fixture
def sender(bench: Bench) -> Iterator[celery.Celery]:
    """A real Celery client whose tasks go to our topology."""
    app = celery.Celery("sender", broker=bench.vhost.url)
    exchange = kombu.Exchange("amqptasks", type="direct", durable=True)
    # `no_declare`: the queue is ours, with arguments that Celery does not know.
    app.conf.task_queues = [kombu.Queue("default", exchange, routing_key="default", no_declare=True)]
    app.conf.task_default_queue = "default"
    app.conf.task_create_missing_queues = False
    bench.client().declare()
    yield app
    app.close()


def test_a_task_sent_by_celery_runs(bench: Bench, sender: celery.Celery) -> None:
    bench.worker()
    done = {sender.send_task(f"{JOBS}.note").id for _ in range(10)}
    typed = sender.send_task(f"{JOBS}.charge", ({"order": 3, "amount": Decimal("1.50")},), {"note": "from celery"})
    bench.wait_done(done)
    wait_until(lambda: typed.id in {entry.task_id for entry in bench.ledger.entries()}, 10, "charged")
    entry = next(entry for entry in bench.ledger.entries() if entry.task_id == typed.id)
    assert entry.event == "charged 3 Decimal('1.50') from celery"
    bench.vhost.wait_settled("default")


def test_celerys_countdown_expiry_limits_and_compression_are_understood(bench: Bench, sender: celery.Celery) -> None:
    bench.worker("default", "-c", "4")
    sent = datetime.now(UTC)
    later = sender.send_task(f"{JOBS}.note", countdown=1)
    packed = sender.send_task(f"{JOBS}.note", compression="gzip")
    killed = sender.send_task(f"{JOBS}.note", (30.0,), time_limit=1)
    late = sender.send_task(f"{JOBS}.note", countdown=4, expires=sent + timedelta(seconds=3))
    bench.wait_done({later.id, packed.id})
    begun = next(entry for entry in bench.ledger.entries("begin") if entry.task_id == later.id)
    assert begun.at - sent.timestamp() >= 1
    reasons = {
        letter["properties"]["correlation_id"]: letter["properties"]["headers"]["x-task-reason"]
        for letter in bench.vhost.dead_letters("default", 2)
    }
    assert reasons == {killed.id: "time_limit", late.id: "expired"}


CELERY_WORKER = """
import os, celery
from amqptasks.testing.ledger import record

app = celery.Celery("receiver", broker=os.environ["BROKER"])
app.conf.task_default_queue = "celery"

@app.task(name="receiver.note", bind=True)
def note(self, *args, **kwargs):
    record(self.request.id, f"{args!r} {kwargs!r} {self.request.retries} {self.request.timelimit}")
"""


def test_a_celery_worker_runs_what_we_send(bench: Bench) -> None:
    bench.settings["queues"] = {"default": {}, "celery": {"type": "classic", "dead_letter": {"enabled": False}}}
    (bench.folder / "receiver.py").write_text(textwrap.dedent(CELERY_WORKER))
    environment = {
        **os.environ,
        "BROKER": bench.vhost.url,
        PATH_VARIABLE: str(bench.ledger.path),
        "PYTHONPATH": f"{bench.folder}:{ROOT}",
    }
    app = bench.client()
    app.declare()
    when, number = datetime(2026, 1, 2, 3, 4, tzinfo=UTC), uuid4()
    values: dict[str, Any] = {"when": when, "price": Decimal("9.99"), "number": number}
    sent = app.send_task("receiver.note", (1, "ü"), values, queue="celery", time_limit=30, soft_time_limit=20).id
    command = [sys.executable, "-m", "celery", "-A", "receiver", "worker", "-P", "solo", "-l", "warning"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-Q", "celery"]
    with subprocess.Popen(command, env=environment, cwd=bench.folder, stdout=subprocess.DEVNULL) as worker:
        try:
            wait_until(bench.ledger.entries, 30, "Celery ran it")
        finally:
            worker.terminate()
            worker.wait(20)
    entry = bench.ledger.entries()[0]
    assert entry.task_id == sent
    assert entry.event == f"(1, 'ü') {values!r} 0 [30, 20]"


def test_celerys_stamps_reach_the_task_its_retry_and_what_follows_it(bench: Bench, sender: celery.Celery) -> None:
    bench.worker()
    stamped = f"{JOBS}.is_stamped"
    plain = sender.send_task(stamped, customer="acme", stamped_headers=["customer"])
    second = celery.signature(stamped, app=sender)
    chain = celery.chain(celery.signature(stamped, app=sender), second)
    chain.stamp(customer="acme", trail=["a", "b"])
    first = chain.apply_async()
    app = bench.client()
    ours = app.signature(stamped) | app.signature(stamped)
    ours.stamp(customer="acme").apply_async(stamped_headers=["month"], month=11)
    by_option = app.send_task(stamped, stamped_headers=["customer"], customer="acme").id
    wait_until(lambda: len(bench.ledger.entries()) == 12, 20, lambda: f"all run twice: {bench.ledger.entries()}")
    bench.vhost.wait_settled("default")
    found: dict[str, list[str]] = {}
    for entry in bench.ledger.entries():
        found.setdefault(entry.task_id, []).append(entry.event)

    def runs(shown: str) -> list[str]:
        return [f"0 {shown}", f"1 {shown}"]

    acme = "[('customer', 'acme')]"
    assert found.pop(plain.id) == found.pop(by_option) == runs(acme)
    both = runs("[('customer', 'acme'), ('trail', ['a', 'b'])]")
    assert [found.pop(one) for one in (first.parent.id, first.id)] == [both, both]
    assert list(found.values()) == [runs("[('customer', 'acme'), ('month', 11)]")] * 2


def test_a_stamp_that_nobody_names_is_an_option_that_does_not_exist(bench: Bench) -> None:
    app = bench.client()
    with pytest.raises(TypeError, match="there is no option 'customer', and `stamped_headers` does not name it"):
        app.send_task("t", customer="acme")
    with pytest.raises(TypeError, match="`stamped_headers` names 'priority', which is not given, or is an option"):
        app.send_task("t", priority=3, stamped_headers=["priority"])

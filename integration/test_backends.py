"""Every result backend behind real workers, and Celery on the other side."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import celery
import celery.result
import kombu
import pytest

from amqptasks import (
    AsyncResult,
    ChordError,
    GroupResult,
    ResultTimeout,
    SerializationError,
    StoreUnavailable,
    chord,
    group,
)
from amqptasks.protocol.results import ResultMeta, encode_result
from amqptasks.testing.ledger import PATH_VARIABLE
from amqptasks.testing.waiting import wait_until
from integration.apps import canvas
from integration.apps.canvas import (
    Declined,
    add,
    body,
    charge,
    counted,
    fails,
    halfway,
    held,
    identity,
    part,
    slow,
    strange,
    total,
)
from integration.conftest import ROOT, CanvasBench
from integration.store_servers import MONGODB, SERVERS, server_of

# Celery's client leaves sockets to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def collect_what_celery_leaves() -> Iterator[None]:
    """Here, and not in the middle of another test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


BACKENDS = ["rpc", *SERVERS, "sqlite", *(["mongodb"] if MONGODB else [])]
TASKS = "integration.apps.canvas"


def backend_url(kind: str, folder: Any) -> str:
    if kind == "rpc":
        return "rpc://"
    if kind == "sqlite":
        return f"sqlite:///{folder}/results.db"
    return MONGODB or "" if kind == "mongodb" else server_of(kind).url


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, desk: CanvasBench) -> str:
    """A running worker and a client with this backend."""
    desk.settings["result"] = {"backend": backend_url(request.param, desk.folder), "expires": "1h"}
    desk.caller()
    desk.worker("default", "-c", "2")
    return str(request.param)


def test_values_errors_states_and_compositions(backend: str, desk: CanvasBench) -> None:
    assert charge.delay(1, Decimal("9.99")).get(10) == canvas.Receipt(1, Decimal("9.99"))
    failed = fails.delay(1)
    with pytest.raises(Declined) as caught:
        failed.get(10)
    assert caught.value.args == ("always", 7)
    assert (failed.state, failed.failed(), "fails" in (failed.traceback or "")) == ("FAILURE", True, True)
    with pytest.raises(SerializationError):
        strange.delay("lock").get(10)
    gate = desk.folder / "gate"
    running = halfway.delay(str(gate))
    wait_until(lambda: running.state == "PROGRESS", 10, "progress is seen")
    assert running.info["of"] == 10
    started = held.delay(str(gate))
    wait_until(lambda: started.state == "STARTED", 10, "the start is seen")
    gate.touch()
    assert (running.get(10), started.get(10)) == ("done", "done")
    handle = (add.s(1, 2) | group(add.s(number) for number in range(5)) | total.s() | add.s(1)).delay()
    assert handle.get(10) == 26
    assert handle.parent is not None
    assert [value for _, value in group(add.s(n, 1) for n in range(5)).delay().iter(10)] != []
    with pytest.raises(ChordError):
        chord([add.s(1, 1), fails.s()], total.s()).delay().get(10)
    with pytest.raises(ResultTimeout):
        slow.delay(2.0).get(0.3)
    forgotten = identity.delay("x")
    assert forgotten.get(10) == "x"
    forgotten.forget()
    desk.vhost.wait_settled("default")


def test_another_process_gets_the_result_or_is_told(backend: str, desk: CanvasBench) -> None:
    result = add.delay(1, 2)
    assert result.get(10) == 3
    (desk.folder / "other.py").write_text(
        textwrap.dedent(f"""
        import sys
        from amqptasks import AmqpTasks, AsyncResult, ResultUnavailable
        app = AmqpTasks("other", config={str(desk.config)!r})
        try:
            print(AsyncResult(sys.argv[1]).get(10))
        except ResultUnavailable:
            print("unavailable")
        """)
    )
    command = [sys.executable, str(desk.folder / "other.py"), result.id]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, check=True)
    assert done.stdout.strip() == ("unavailable" if backend == "rpc" else "3")


@pytest.mark.parametrize("kind", [kind for kind in BACKENDS if kind != "rpc"])
def test_a_saved_group_is_restored_by_another_process(desk: CanvasBench, kind: str) -> None:
    desk.settings["result"] = {"backend": backend_url(kind, desk.folder)}
    desk.caller()
    handle = group(add.s(number, 1) for number in range(3)).delay()
    handle.save()
    (desk.folder / "other.py").write_text(
        textwrap.dedent(f"""
        import sys
        from amqptasks import AmqpTasks, GroupResult
        app = AmqpTasks("other", config={str(desk.config)!r})
        group = GroupResult.restore(sys.argv[1])
        print(group.completed_count(), flush=True)
        print(sorted(value for _, value in group.iter(20)), group.get(10), group.completed_count())
        """)
    )
    command = [sys.executable, str(desk.folder / "other.py"), handle.id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "0"
        desk.worker("default", "-c", "1")
        found, _ = other.communicate(timeout=40)
    assert found.strip() == "[1, 2, 3] [1, 2, 3] 3"
    handle.delete()
    assert GroupResult.restore(handle.id, canvas.app.results) is None


@pytest.mark.parametrize(
    ("kind", "deduplicate"), [*((kind, True) for kind in BACKENDS if kind != "rpc"), ("sqlite", False)]
)
def test_a_task_that_has_succeeded_is_not_run_again_but_what_follows_it_is_sent(
    desk: CanvasBench, kind: str, deduplicate: bool
) -> None:
    """Its process died after the result was stored, and before the broker heard of it. `deduplicate: false` runs it."""
    desk.settings["result"] = {"backend": backend_url(kind, desk.folder)}
    desk.settings["tasks"] = {"*.counted": {"deduplicate": deduplicate}}
    app = desk.caller()
    # A fixed prefetch: with `auto` what waits behind a long task is given back.
    first = desk.worker("default", "-c", "1", "--prefetch", "4")
    store = app.result_store
    assert store is not None
    gate = desk.folder / "gate"
    blocker = held.delay(str(gate))
    handle = (counted.si() | add.s(10)).delay()
    wait_until(lambda: desk.vhost.ready("default") == 0, 20, "the worker holds both")
    assert handle.parent is not None
    parent = handle.parent
    store.put(parent.id, encode_result(ResultMeta(parent.id, "SUCCESS", 5)), ready=True)
    first.kill()
    desk.worker("default", "-c", "1")
    gate.touch()
    assert handle.get(20) == (15 if deduplicate else 11)
    assert blocker.get(20) == "done"
    assert bool(desk.ledger.ids("counted")) is not deduplicate


@pytest.mark.fault
def test_while_the_store_is_away_nothing_is_acknowledged_whose_result_was_promised(desk: CanvasBench) -> None:
    server = server_of("redis")
    desk.settings["result"] = {"backend": server.url}
    desk.caller()
    desk.worker("default", "-c", "2")
    assert add.delay(1, 1).get(10) == 2
    server.stop()
    try:
        with pytest.raises(StoreUnavailable):
            AsyncResult[int]("x", canvas.app.results).get(5)
        handle = counted.delay()
        ignored = counted.apply_async(ignore_result=True)
        wait_until(lambda: len(desk.ledger.ids("counted")) == 2, 10, "both ran")
        counts = desk.vhost.management.counts
        wait_until(lambda: counts("default") == (0, 1), 10, "the one without a result is acknowledged", pause=0.1)
        time.sleep(1.0)
        assert counts("default") == (0, 1), "the one with a result is held"
    finally:
        server.start()
    assert handle.get(20) == 1
    desk.vhost.wait_settled("default")
    ran = [entry.task_id for entry in desk.ledger.entries() if entry.event == "counted"]
    assert sorted(ran) == sorted([handle.id, ignored.id]), "once each"


@pytest.mark.fault
def test_a_chord_whose_result_store_restarts_in_its_middle_runs_its_body_once(desk: CanvasBench) -> None:
    server = server_of("redis")
    desk.settings["result"] = {"backend": server.url}
    desk.caller()
    desk.worker("default", "-c", "4")
    handle = chord([part.s(number, 0.4) for number in range(40)], body.s()).delay()
    time.sleep(0.8)  # some parts have run, most have not
    server.stop()
    time.sleep(2.0)
    server.start()
    assert handle.get(60) == 40
    desk.vhost.wait_settled("default")
    (ran,) = [entry for entry in desk.ledger.entries() if entry.event.startswith("body")]
    assert (ran.task_id, ran.event) == (handle.id, "body " + ",".join(map(str, range(40))))


# --- Celery ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["rpc", "redis"])
def both(request: pytest.FixtureRequest, desk: CanvasBench) -> str:
    return backend_url(request.param, desk.folder)


@pytest.fixture
def sender(desk: CanvasBench, both: str) -> Iterator[celery.Celery]:
    """A real Celery client whose tasks go to our worker."""
    desk.settings["result"] = {"backend": both}
    desk.caller().declare()
    desk.worker("default", "-c", "2")
    app = celery.Celery("sender", broker=desk.vhost.url, backend=both, set_as_current=False)
    exchange = kombu.Exchange("amqptasks", type="direct", durable=True)
    app.conf.task_queues = [kombu.Queue("default", exchange, routing_key="default", no_declare=True)]
    app.conf.task_default_queue = "default"
    app.conf.task_create_missing_queues = False
    yield app
    app.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_celerys_client_gets_results_from_our_worker(sender: celery.Celery, both: str, desk: CanvasBench) -> None:
    def sig(name: str, *args: Any, **options: Any) -> Any:
        return sender.signature(f"{TASKS}.{name}", args=args, **options)

    assert sender.send_task(f"{TASKS}.add", (1, 2)).get(timeout=10) == 3
    with pytest.raises(Exception, match="always"):
        sender.send_task(f"{TASKS}.fails").get(timeout=10)
    chained = celery.chain(sig("add", 1, 2), sig("add", 3), sig("add", 4), app=sender).apply_async()
    assert chained.get(timeout=10) == 10
    grouped = celery.group([sig("add", n, 1) for n in range(5)], app=sender).apply_async()
    assert grouped.get(timeout=10) == [1, 2, 3, 4, 5]
    linked = sig("add", 1, 2).apply_async(link=sig("seen"))
    assert linked.get(timeout=10) == 3
    wait_until(lambda: any(e.event == "seen 3" for e in desk.ledger.entries()), 10, "the callback ran")
    sig("fails").apply_async(link_error=sig("failed_id"))
    wait_until(lambda: desk.ledger.ids("failed_id"), 10, "the errback ran")
    if both.startswith("redis"):
        joined = celery.chord([sig("add", n, 1) for n in range(10)], sig("total"), app=sender).apply_async()
        assert joined.get(timeout=10) == 55
        broken = celery.chord([sig("add", 1, 1), sig("fails")], sig("total"), app=sender).apply_async()
        with pytest.raises(Exception, match="always"):  # Celery's `get` raises what the part raised
            broken.get(timeout=10)
        wait_until(lambda: "Dependency" in str(sender.AsyncResult(broken.id).result), 10, "the body has failed")


CELERY_WORKER = """
import os, celery
from amqptasks.testing.ledger import record

app = celery.Celery("receiver", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
app.conf.task_default_queue = "celery"

@app.task(name="receiver.add")
def add(x, y):
    return x + y

@app.task(name="receiver.fails")
def fails(*args):
    raise KeyError("theirs")

@app.task(name="receiver.seen")
def seen(value):
    record(None, f"seen {value!r}")
"""


def test_our_client_gets_results_from_celerys_worker(desk: CanvasBench, both: str) -> None:
    desk.settings["queues"] = {"default": {}, "celery": {"type": "classic", "dead_letter": {"enabled": False}}}
    desk.settings["routes"] = [{"match": "receiver.*", "queue": "celery"}]
    desk.settings["result"] = {"backend": both}
    (desk.folder / "receiver.py").write_text(textwrap.dedent(CELERY_WORKER))
    environment = {
        **os.environ,
        "BROKER": desk.vhost.url,
        "BACKEND": both,
        PATH_VARIABLE: str(desk.ledger.path),
        "PYTHONPATH": f"{desk.folder}:{ROOT}",
    }
    app = desk.caller()
    app.declare()
    command = [sys.executable, "-W", "ignore", "-m", "celery", "-A", "receiver", "worker", "-P", "solo", "-l", "error"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-Q", "celery"]
    with subprocess.Popen(command, env=environment, cwd=desk.folder, stdout=subprocess.DEVNULL) as worker:
        try:
            assert app.send_task("receiver.add", (1, 2)).get(30) == 3
            with pytest.raises(KeyError, match="theirs"):
                app.send_task("receiver.fails").get(10)
            one = app.signature("receiver.add", (1, 2), queue="celery")
            then = app.signature("receiver.add", (3,), queue="celery")
            chained = (one | then | then).delay()
            assert chained.get(10) == 9
            assert group(one, one).delay().get(10) == [3, 3]
            assert (
                app.send_task("receiver.add", (2, 2), link=app.signature("receiver.seen", queue="celery")).get(10) == 4
            )
            wait_until(lambda: any(e.event == "seen 4" for e in desk.ledger.entries()), 10, "the callback ran")
            broken = app.send_task("receiver.fails", link_error=app.signature("receiver.seen", queue="celery"))
            with pytest.raises(KeyError, match="theirs"):
                broken.get(10)
            told = f"seen {broken.id!r}"
            wait_until(lambda: any(e.event == told for e in desk.ledger.entries()), 10, "the errback ran")
        finally:
            worker.terminate()
            worker.wait(20)


def test_concurrent_callers_of_one_store_get_their_own(desk: CanvasBench) -> None:
    desk.settings["result"] = {"backend": backend_url("redis", desk.folder)}
    desk.caller()
    desk.worker("default", "-c", "2")
    wrong: list[Any] = []

    def call(base: int) -> None:
        for number in range(50):
            value = part.delay(base + number).get(20)
            if value != base + number:
                wrong.append(value)

    threads = [threading.Thread(target=call, args=(base * 1000,)) for base in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

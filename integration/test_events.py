"""Events in Celery's format: what Celery's own receiver, Flower and our monitor see of our worker."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from celery import Celery
from celery.events.state import State

from amqptasks import AmqpTasks
from amqptasks.broker.broadcast import broadcast
from amqptasks.config import BrokerSettings
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench

NODE = "shop@test"
JOBS = "integration.apps.jobs"


class Monitor:
    """Celery's own receiver and state, as celery-exporter and Flower use them."""

    def __init__(self, url: str) -> None:
        self.app = Celery("monitor", broker=url)
        self.state = State()
        self.events: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        with self.app.connection_for_read() as connection:
            receiver = self.app.events.Receiver(connection, handlers={"*": self._event})
            with receiver.consumer_context() as (own, _channel, _consumers):
                self._ready.set()
                while not self._stop.is_set():
                    with contextlib.suppress(TimeoutError):
                        own.drain_events(timeout=0.1)

    def _event(self, event: dict[str, Any]) -> None:
        self.state.event(event)
        self.events.append(event)

    def of(self, task_id: str) -> list[str]:
        """The types of a task's events, in the order in which they came."""
        return [one["type"] for one in list(self.events) if one.get("uuid") == task_id]

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)


@pytest.fixture
def monitor(bench: Bench) -> Iterator[Monitor]:
    made = Monitor(bench.vhost.url)
    yield made
    made.close()


def _ask(bench: Bench, method: str, timeout: float = 10.0, **arguments: Any) -> Any:
    settings = BrokerSettings.model_validate({"url": bench.vhost.url})
    return broadcast(settings, method, arguments, destination=[NODE], timeout=timeout).get(NODE)


def _wait_task(monitor: Monitor, task_id: str, state: str) -> Any:
    def arrived() -> bool:
        found = monitor.state.tasks.get(task_id)
        return found is not None and found.state == state

    wait_until(arrived, 20, lambda: f"{task_id} is {state}: {monitor.of(task_id)}")
    return monitor.state.tasks[task_id]


def test_every_outcome_as_celerys_monitors_read_it(bench: Bench, monitor: Monitor) -> None:
    worker = bench.worker("default", "-c", "2", "-n", NODE, "-E")
    app = bench.client()
    wait_until(lambda: NODE in monitor.state.workers, 20, "the worker is seen")
    began = time.time()
    ids = {
        "succeeded": bench.send(app, "add", 2, 3),
        "failed": bench.send(app, "fails"),
        "retried": bench.send(app, "always_retries", 60.0),
        "rejected": bench.send(app, "rejects"),
        "expired": bench.send(app, "add", 1, 1, countdown=0.3, expires=0.1),
        "invalid": bench.send(app, "add", "one", 1),
        "unknown": app.send_task("no.such.task").id,
        "slow": bench.send(app, "note", 1.5),
    }
    added = _wait_task(monitor, ids["succeeded"], "SUCCESS")
    assert (added.name, added.args, added.kwargs, added.result) == (f"{JOBS}.add", "(2, 3)", "{}", "5")
    assert 0 < added.runtime < 5
    assert added.worker.hostname == NODE
    assert added.root_id == ids["succeeded"]
    assert began - 1 < added.received <= added.started <= added.succeeded
    failed = _wait_task(monitor, ids["failed"], "FAILURE")
    assert failed.exception == "ValueError('broken: ü')"
    assert re.match(r"^(\w+)\(", failed.exception)[1] == "ValueError"
    assert "in fails" in failed.traceback
    retried = _wait_task(monitor, ids["retried"], "RETRY")
    assert (retried.exception, retried.retries) == ("ValueError('still broken')", 0)
    # Celery's state does not go back from "started" to "rejected", for its own workers either.
    wait_until(lambda: "task-rejected" in monitor.of(ids["rejected"]), 20, "the rejected task")
    expired = _wait_task(monitor, ids["expired"], "REVOKED")
    assert (expired.expired, expired.terminated, expired.started) == (True, False, None)
    assert _wait_task(monitor, ids["invalid"], "FAILURE").exception.startswith("InvalidArguments(")
    unknown = _wait_task(monitor, ids["unknown"], "FAILURE")
    assert (unknown.name, unknown.exception.partition("(")[0]) == ("no.such.task", "UnknownTask")
    # What takes long is seen while it runs.
    wait_until(lambda: "task-started" in monitor.of(ids["slow"]), 20, "the slow task is seen to run")
    _wait_task(monitor, ids["slow"], "SUCCESS")
    assert monitor.of(ids["slow"]) == ["task-received", "task-started", "task-succeeded"]
    for one in monitor.events:
        assert isinstance(one["clock"], int)
        assert one["hostname"] == NODE
    clocks = [one["clock"] for one in monitor.events if one["type"].startswith("task-")]
    assert len(set(clocks)) == len(clocks), "two events of one leader have one clock"
    wait_until(lambda: monitor.state.workers[NODE].processed == len(ids), 20, "heartbeats count what was processed")
    seen = monitor.state.workers[NODE]
    assert (seen.alive, seen.freq, seen.sw_ident, seen.sw_sys) == (True, 2.0, "amqptasks", "Linux")
    assert seen.pid == worker.process.pid
    assert worker.stop() == 0
    wait_until(lambda: monitor.events[-1]["type"] == "worker-offline", 10, "the worker says that it leaves")
    assert not seen.alive


@pytest.mark.parametrize("pool", ["asyncio", "solo", "thread", "gevent"])
def test_events_of_other_pools(bench: Bench, monitor: Monitor, pool: str) -> None:
    bench.worker("default", "-P", pool, "-n", NODE, "-E")
    app = bench.client()
    slow = bench.send(app, "note" if pool == "gevent" else "asleep", 6.0)

    def heard() -> list[str]:
        # Received once more, when it was given back because the first executor takes long to start.
        return list(dict.fromkeys(monitor.of(slow)))

    wait_until(lambda: heard() == ["task-received", "task-started"], 20, lambda: str(monitor.of(slow)))
    assert _wait_task(monitor, slow, "SUCCESS").result == "None"


def test_events_are_turned_on_and_off_while_the_worker_runs(bench: Bench, monitor: Monitor) -> None:
    bench.worker("default", "-c", "2", "-n", NODE)
    app = bench.client()
    wait_until(lambda: _ask(bench, "ping", 2.0), 20, "it answers")
    quiet = bench.send(app, "add", 1, 1)
    bench.wait_done({bench.send(app, "note")})
    time.sleep(2.5)
    assert monitor.events == [], "a worker whose events are off is silent"

    done = subprocess.run(
        [sys.executable, "-m", "celery", "-b", bench.vhost.url, "control", "enable_events", "--json", "-d", NODE,
         "--timeout", "10"],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
    )  # fmt: skip
    assert "task events enabled" in done.stdout, done.stdout + done.stderr
    assert _ask(bench, "enable_events") == {"ok": "task events already enabled"}
    wait_until(lambda: any(one["type"] == "worker-online" for one in monitor.events), 10, "it says that it is online")
    loud = bench.send(app, "add", 2, 2)
    assert _wait_task(monitor, loud, "SUCCESS").result == "4"
    assert _ask(bench, "disable_events") == {"ok": "task events disabled"}
    time.sleep(1.0)
    monitor.events.clear()
    bench.send(app, "add", 3, 3)
    time.sleep(2.5)
    assert monitor.events == []
    assert quiet not in monitor.state.tasks
    # Monitors ask who is there when they connect; this is answered in any case.
    _ask(bench, "heartbeat")
    wait_until(lambda: [one["type"] for one in monitor.events] == ["worker-heartbeat"], 10, "it answers a monitor")


@pytest.mark.parametrize("results", ["rpc://", "none"])
def test_callers_tell_of_their_calls(bench: Bench, monitor: Monitor, results: str) -> None:
    bench.settings |= {"events": {"send_sent": True}, "result": {"backend": results}}
    app = bench.client()
    app.declare()
    plain = bench.send(app, "add", 1, 2, queue="default")
    later = bench.send(app, "add", 1, 3, countdown=30)
    several = [one.id for one in app.send_many([app.signature(f"{JOBS}.noop") for _ in range(3)])]
    awaited = asyncio.run(_call_and_close(app))
    # A process that calls once and ends.
    command = ["amqptasks", "--config", str(bench.config), "call", f"{JOBS}.add", "--args", "[2, 2]"]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    calls = {plain, later, *several, awaited, done.stdout.strip().splitlines()[-1]}

    def told() -> set[str]:
        return {one["uuid"] for one in monitor.events if one["type"] == "task-sent"}

    wait_until(lambda: told() == calls, 20, lambda: str(told() ^ calls))
    events = {one["uuid"]: one for one in monitor.events}
    assert events[plain]["queue"] == events[later]["queue"] == "default"
    assert (events[plain]["exchange"], events[plain]["args"]) == ("amqptasks", "(1, 2)")
    assert (events[plain]["eta"], events[later]["eta"] is None) == (None, False)
    assert events[plain]["hostname"] == f"gen{os.getpid()}@{socket.gethostname()}"


async def _call_and_close(app: AmqpTasks) -> str:
    handle = await app.asend_task(f"{JOBS}.add", (3, 4))
    await app.client.aclose()
    return handle.id


@contextlib.contextmanager
def _events_command(bench: Bench, *options: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """``amqptasks events`` once it listens."""
    log = bench.folder / "events.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "amqptasks", "-b", bench.vhost.url, "events", *options],
            **{
                "stdout": subprocess.PIPE,
                "stderr": errors,
                "cwd": ROOT,
                # Where the tests run may say how wide it is: the terminal's own width counts here.
                "env": {**{k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}, "TERM": "xterm"},
                **streams,
            },
        )
    try:
        wait_until(lambda: b"Listening" in log.read_bytes(), 20, log.read_text)
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


def test_the_events_command_prints_what_happens(bench: Bench) -> None:
    bench.worker("default", "-c", "1", "-n", NODE)
    app = bench.client()
    for option in ("--json", "--dump"):
        with _events_command(bench, option, "--enable") as process:
            assert process.stdout is not None
            wait_until(lambda: _ask(bench, "enable_events")["ok"].endswith("already enabled"), 20, "events are on")
            task = bench.send(app, "add", 2, 3)
            lines: list[str] = []
            for raw in process.stdout:
                lines.append(raw.decode())
                if "task-succeeded" in lines[-1] or "task succeeded" in lines[-1]:
                    break
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
        if option == "--json":
            events = [json.loads(one) for one in lines]
            mine = [one for one in events if one.get("uuid") == task]
            assert [one["type"] for one in mine] == ["task-received", "task-started", "task-succeeded"]
            assert mine[-1]["result"] == "5"
        else:
            assert lines[-1].startswith(f"{NODE} [")
            assert f"task succeeded: {JOBS}.add({task}) args=(2, 3) kwargs={{}} clock=" in lines[-1]
            assert "result=5" in lines[-1]
    assert _ask(bench, "disable_events") == {"ok": "task events disabled"}


def test_the_live_table_shows_workers_and_tasks(bench: Bench) -> None:
    bench.worker("default", "-c", "1", "-n", NODE, "-E")
    app = bench.client()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    screen = bytearray()
    with _events_command(bench, stdout=theirs, stdin=theirs) as process:
        os.close(theirs)

        def shows(*texts: str) -> bool:
            while select.select([ours], [], [], 0.05)[0]:
                try:
                    screen.extend(os.read(ours, 65536))
                except OSError:  # the other end is closed: Linux says so with EIO
                    break
            seen = screen.decode(errors="replace")
            return all(text in seen for text in texts)

        wait_until(lambda: shows(NODE, "online"), 20, "the worker is shown")
        tasks = [bench.send(app, "fails")]

        def told() -> bool:
            # Events may be dropped: then the next task's are shown.
            tasks.append(bench.send(app, "fails"))
            return any(shows(task, "failed", "ValueError('broken: ü')", f"{JOBS}.fails") for task in tasks)

        wait_until(
            told,
            20,
            lambda: screen[-3000:].decode(errors="replace"),
            pause=1.0,
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert shows("\x1b[?1049l"), "the terminal is left as it was"
    os.close(ours)


def test_a_monitor_that_stops_reading_harms_nobody(bench: Bench) -> None:
    bench.worker("default", "-c", "2", "-n", NODE, "-E")
    app = bench.client()
    with _events_command(bench, "--json", stdout=subprocess.DEVNULL) as process:
        (queue,) = [name for name in bench.vhost.management.queues() if name.startswith("celeryev.")]
        made = bench.vhost.management.queue(queue)
        assert made["exclusive"]
        assert made["arguments"] == {"x-expires": 60_000, "x-max-length": 2_000, "x-message-ttl": 5_000}
        process.send_signal(signal.SIGSTOP)
        marker = bench.send(app, "note")
        app.send_many([app.signature(f"{JOBS}.noop") for _ in range(5000)])
        bench.wait_done({marker, bench.send(app, "note")}, 60)
        bench.vhost.wait_settled("default", 60)

        def told() -> int:
            events = _ask(bench, "stats")["groups"]["default"]["events"]
            return sum(events.values())

        wait_until(lambda: told() == 3 * 5002, 10, lambda: f"{told()} events were sent or dropped")
        # Unread for five seconds, they are gone.
        counts = bench.vhost.management.counts
        wait_until(lambda: counts(queue)[0] <= 10, 20, lambda: f"{counts(queue)} are left", pause=0.2)
        assert _ask(bench, "ping") == {"ok": "pong"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_monitor_that_stands_still_for_ten_minutes_costs_neither_broker_nor_workers(bench: Bench) -> None:
    """Beside the same load before it: its queue is bounded and goes away, tasks start as soon, and nothing grows."""
    worker = bench.worker("default", "-c", "2", "-n", NODE, "-E")
    leader = psutil.Process(worker.leaders()[0].pid)
    app = bench.client()
    told = bench.folder / "told.json"
    most, given_up = 0, 0.0

    def load(seconds: float, look: Callable[[], None] = lambda: None) -> float:
        """Forty tasks a second. Returns the median of what a task waited, in seconds."""
        sent: dict[str, float] = {}
        due = begun = time.monotonic()
        while due < begun + seconds:
            due += 1.0
            now = time.time()
            sent |= dict.fromkeys((one.id for one in app.send_many([app.signature(f"{JOBS}.note")] * 40)), now)
            look()
            time.sleep(max(0.0, due - time.monotonic()))
        bench.wait_done(set(sent))
        waits = sorted(one.at - sent[one.task_id] for one in bench.ledger.entries("begin") if one.task_id in sent)
        assert len(waits) == len(sent), "each once"
        return statistics.median(waits)

    with told.open("wb") as output, _events_command(bench, "--json", stdout=output) as process:
        (queue,) = [name for name in bench.vhost.management.queues() if name.startswith("celeryev.")]
        app.send_many([app.signature(f"{JOBS}.noop")] * 10_000)
        load(30.0)
        before, grown = load(60.0), leader.memory_info().rss
        process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()

        def look() -> None:
            nonlocal most, given_up
            found = _event_queues(bench).get(queue)
            most = max(most, (found or {}).get("messages", 0))
            given_up = given_up or (time.monotonic() - stopped if found is None else 0.0)

        # What fits into the buffers of the connection does not wait in the queue.
        app.send_many([app.signature(f"{JOBS}.noop")] * 10_000)
        after = load(600.0, look)
        grown = leader.memory_info().rss - grown
        print(
            f"most in its queue {most}, given up after {given_up:.0f} s; "
            f"tasks wait {before:.3f} s, then {after:.3f} s; {grown / 1e6:.1f} MB more"
        )
        assert most <= 2_000
        assert _event_queues(bench) == {}, "the broker has given it up"
        assert after < before + 0.1
        assert grown < 10e6
        assert worker.log.count("Consuming") == 1, "no connection was lost"
        process.send_signal(signal.SIGCONT)
        # It begins anew, and is told of what happens from then on.
        wait_until(lambda: _event_queues(bench), 30, "it listens again", pause=0.5)
        late = bench.send(app, "note")
        wait_until(lambda: late.encode() in told.read_bytes(), 20, "it tells of a task")


def _event_queues(bench: Bench) -> dict[str, Any]:
    return {name: one for name, one in bench.vhost.management.queues().items() if name.startswith("celeryev.")}


def test_events_are_dropped_while_the_broker_takes_no_messages(node: PrivateNode, bench: Bench) -> None:
    bench.settings["broker"]["url"] = node.url
    bench.settings["result"] = {"backend": "none"}
    worker = bench.worker("default", "-c", "1", "-n", NODE, "-E")
    app = bench.client()
    first = bench.send(app, "note", 5.0)
    later = {bench.send(app, "note", 0.02) for _ in range(200)}
    wait_until(lambda: first in bench.ledger.ids("begin"), 20, "it runs")
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.00001")
    bench.wait_done({first, *later})
    assert "The broker does not take events: they are dropped" in worker.log
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.6")

    def events() -> dict[str, int]:
        settings = BrokerSettings.model_validate({"url": node.url})
        answers = broadcast(settings, "stats", {}, destination=[NODE], timeout=2.0)
        return answers[NODE]["groups"]["default"]["events"] if answers else {}

    wait_until(lambda: events().get("dropped", 0) > 0, 30, lambda: f"what was dropped is counted: {events()}")
    sent = events()["sent"]
    bench.wait_done({bench.send(app, "note")})
    wait_until(lambda: events()["sent"] >= sent + 3, 20, "events go out again")


@pytest.mark.parametrize("options", [(), ("-E",), ("-P", "thread"), ("-P", "asyncio"), ("-P", "gevent")])
def test_a_task_tells_monitors_what_it_likes(bench: Bench, monitor: Monitor, options: tuple[str, ...]) -> None:
    bench.worker("default", "-n", NODE, "-c", "2", *options)
    app = bench.client()
    task_id = bench.send(app, "tells", "task-progress", kwargs={"percent": 40, "when": 1.5})
    bench.wait_done({task_id})

    def come() -> dict[str, Any] | None:
        return next((one for one in list(monitor.events) if one["type"] == "task-progress"), None)

    event = wait_until(come, 15, lambda: f"the event comes: {monitor.events}")
    assert event is not None
    assert (event["uuid"], event["percent"], event["when"], event["hostname"]) == (task_id, 40, 1.5, NODE)
    assert isinstance(event["clock"], int)
    for kind, fields in (("no type", {}), ("task-x", {"clock": 1}), ("task-x", {"data": "x" * 70_000})):
        bad = bench.send(app, "tells", kind, kwargs=fields)
        wait_until(lambda bad=bad: _letter(bench, bad), 10, "it fails")
        assert _letter(bench, bad)["x-task-exception"].endswith("ValueError")


def _letter(bench: Bench, task_id: str) -> dict[str, Any] | None:
    letters = bench.vhost.management.messages("default.dlq")
    return next(
        (one["properties"]["headers"] for one in letters if one["properties"]["correlation_id"] == task_id), None
    )


def test_what_an_exporter_asks_for_beside_events_is_there(bench: Bench) -> None:
    """Pool processes and queues, by Celery's own client with its defaults: a broadcast, and a second to answer."""
    bench.settings["queues"]["email"] = {}
    bench.worker("default,email", "-c", "2", "-n", NODE)
    inspect = Celery("exporter", broker=bench.vhost.url).control.inspect(timeout=3.0)
    stats = wait_until(inspect.stats, 20, "it answers")
    assert stats.keys() == {NODE}
    assert len(stats[NODE]["pool"]["processes"]) == 4
    assert stats[NODE]["pool"]["max-concurrency"] == 4
    queues = inspect.active_queues()
    assert {one["name"] for one in queues[NODE]} == {"default", "email"}

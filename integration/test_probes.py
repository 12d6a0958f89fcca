"""Probes and metrics of a real worker, in each state that it can be in."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest
from celery import Celery
from prometheus_client.parser import text_string_to_metric_families

from amqptasks.broker.admin import declare
from amqptasks.config.models import Settings
from amqptasks.events import BeatPulse, Bus
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.rabbitmq import free_port
from amqptasks.testing.servers import PrometheusServer
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import BeatProcess, WorkerProcess
from amqptasks.topology import build_topology
from amqptasks.topology.permissions import permissions
from amqptasks.worker.beat_probes import BeatProbes
from amqptasks.worker.catalogue import CATALOGUE
from amqptasks.worker.listening import listen
from integration.conftest import ROOT, Bench

NODE = "shop@test"
NOTE = "integration.apps.jobs.note"


class Http:
    """A worker's HTTP server."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.slowest = 0.0
        #: What is started to answer here.
        self.worker: WorkerProcess | None = None

    def get(self, path: str, timeout: float = 5.0) -> tuple[int, str]:
        started = time.monotonic()
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)
        finally:
            self.slowest = max(self.slowest, time.monotonic() - started)

    def probes(self) -> tuple[int, int, int]:
        """Status of /livez, /readyz, /startupz."""
        return self.get("/livez")[0], self.get("/readyz")[0], self.get("/startupz")[0]

    def problems(self, path: str = "/readyz") -> list[str]:
        found: list[str] = json.loads(self.get(path)[1])["problems"]
        return found

    def wait(self, probes: tuple[int, int, int], timeout: float = 30.0) -> None:
        def what() -> str:
            return f"{probes}, not {self.probes()}\n{self.worker.log[-2000:] if self.worker else ''}"

        wait_until(lambda: self.probes() == probes, timeout, what, pause=0.1)

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Each sample's value by its name and its labels' values. A worker that is busy may answer the next time."""

        def look() -> str:
            status, text = self.get("/metrics")
            return text if status == 200 else ""

        text = wait_until(look, 20, "the metrics")
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def count(self, name: str, *labels: str) -> float:
        """The sum of a metric's samples that have these labels among theirs."""
        found = self.metrics().items()
        return sum(value for key, value in found if key[0] == name and set(labels) <= set(key[1:]))


@pytest.fixture
def http() -> Http:
    return Http()


@pytest.fixture
def start(bench: Bench, http: Http) -> Callable[..., WorkerProcess]:
    def begin(queues: str = "default", *options: str, **more: Any) -> WorkerProcess:
        http.worker = bench.worker(queues, "-c", "2", "-n", NODE, "--http", http.address, *options, **more)
        return http.worker

    return begin


Start = Callable[..., WorkerProcess]


def desk(worker: WorkerProcess) -> psutil.Process:
    (one,) = [one for one in psutil.Process(worker.process.pid).children() if one.name() == "amqptasks-desk"]
    return one


# -- probes -----------------------------------------------------------------------------------------------------------


def test_probes_from_start_to_end(bench: Bench, http: Http, start: Start, proxy: TcpProxy, through_proxy: str) -> None:
    """The broker is away, comes, goes, comes again; then the worker is told to stop while a task runs."""
    proxy.refuse()
    worker = start(url=through_proxy, ready=False)
    http.wait((200, 503, 503))
    assert http.problems() == http.problems("/startupz") == ["waiting for the broker"]
    assert http.count("amqptasks_ready") == 0
    proxy.accept()
    http.wait((200, 200, 200), 60)
    proxy.refuse()
    http.wait((200, 503, 200))
    assert http.problems() == ["queue 'default': not connected to the broker"]
    assert http.count("amqptasks_connected", "default") == 0
    proxy.accept()
    http.wait((200, 200, 200))
    gate = bench.folder / "gate"
    task = bench.send(bench.client(), "waits_for", str(gate))
    wait_until(lambda: task in bench.ledger.ids("begin"), 20, "the task runs")
    worker.process.send_signal(signal.SIGTERM)
    http.wait((200, 503, 200))
    assert http.problems()[0] == "the worker is stopping"
    gate.touch()
    assert worker.wait() == 0
    assert http.get("/livez")[0] == 0


@pytest.mark.timing
def test_a_worker_whose_executors_are_all_busy_is_alive_and_ready(bench: Bench, http: Http, start: Start) -> None:
    """Its leader stops consuming for as long as every executor has a long task: that is no failure."""
    worker = start("default")
    app = bench.client()
    # Short tasks make the prefetch grow, so that long ones are held that could run elsewhere.
    bench.wait_done({bench.send(app, "note") for _ in range(200)})
    wait_until(lambda: http.count("amqptasks_prefetch", "default") > 6, 20, "the prefetch grows")
    long = {bench.send(app, "note", 9.0) for _ in range(6)}
    wait_until(lambda: len(bench.ledger.ids("begin") & long) == 2, 20, "both executors are busy")
    wait_until(lambda: bench.vhost.ready("default") == 4, 20, "what cannot start goes back")
    wait_until(lambda: http.count("amqptasks_tasks_running", "default") == 2, 10, "both tasks are seen")
    answering = desk(worker)
    used = _processor_seconds(answering)
    asked = 0
    until = time.monotonic() + 4.0
    http.slowest = 0.0
    while time.monotonic() < until:
        assert http.probes() == (200, 200, 200), http.problems()
        asked += 3
        time.sleep(0.05)
    assert bench.vhost.ready("default") == 4 < http.count("amqptasks_prefetch", "default"), "it does not consume"
    assert http.count("amqptasks_consuming", "default") == 1
    # All that answering costs, with what the process does besides.
    assert (_processor_seconds(answering) - used) / asked < 0.05
    took = sorted(_seconds(http, path) for path in ("/livez", "/readyz", "/startupz") * 20)
    assert took[len(took) // 2] < 0.05, took


def _processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _seconds(http: Http, path: str) -> float:
    started = time.monotonic()
    http.get(path)
    return time.monotonic() - started


@pytest.mark.timeout(120)
def test_executors_that_are_all_stopped_are_replaced_within_a_minute(bench: Bench, http: Http, start: Start) -> None:
    """With a task in each and without a time limit: nothing else would end them."""
    worker = start("default")
    gate = bench.folder / "gate"
    ids = {bench.send(bench.client(), "waits_for", str(gate)) for _ in range(2)}
    bench.wait_done(ids, event="begin")
    stopped = worker.executors()
    for one in stopped:
        one.suspend()
    gate.touch()
    begun = time.monotonic()
    bench.wait_done(ids, timeout=60)
    assert time.monotonic() - begun > 25, "an operator who looks at a process has half a minute"
    assert not {one.pid for one in stopped} & {one.pid for one in worker.executors()}
    assert worker.log.count("Executor killed: it is stopped, with tasks") == 2
    http.wait((200, 200, 200))
    assert worker.stop() == 0


def test_ready_says_which_queue_has_lost_its_consumer(
    bench: Bench, http: Http, start: Start, restricted_user: Callable[[str, str, str], str]
) -> None:
    """A queue is deleted, and the worker's user may not make it again."""
    bench.settings["queues"]["email"] = {}
    settings = Settings.model_validate(bench.settings)
    topology = build_topology(settings)
    declare(topology, settings.broker)
    role = permissions(topology, settings.topology.prefix)["worker"]
    start("default,email", url=restricted_user(role.configure, role.write, role.read))
    http.wait((200, 200, 200))
    bench.vhost.management.delete_queue("email")
    http.wait((200, 503, 200))
    status, body = http.get("/readyz")
    said = json.loads(body)
    assert status == 503
    assert said["problems"] == ["queue 'email': connected, and the broker has no consumer of it"]
    assert (said["queues"]["default"], said["hostname"]) == ("consuming", NODE)
    declare(topology, settings.broker)
    http.wait((200, 200, 200))


@pytest.mark.fault
def test_a_leader_whose_loop_stands_still_fails_readiness_then_liveness(http: Http, start: Start) -> None:
    worker = start("default")
    http.wait((200, 200, 200))
    (leader,) = worker.leaders()
    leader.suspend()
    http.wait((200, 503, 200), 15)
    assert http.problems() == ["queue 'default': its leader does not answer"]
    http.wait((503, 503, 200), 60)
    assert "its leader has not answered for" in http.problems("/livez")[0]
    leader.resume()
    http.wait((200, 200, 200))


@pytest.mark.fault
def test_a_supervisor_whose_loop_stands_still_fails_both(http: Http, start: Start) -> None:
    worker = start("default")
    http.wait((200, 200, 200))
    worker.process.send_signal(signal.SIGSTOP)
    try:
        http.wait((503, 503, 200), 60)
        assert "the supervisor has not answered" in http.problems("/livez")[0]
        assert http.get("/metrics")[0] == 503
    finally:
        worker.process.send_signal(signal.SIGCONT)
    http.wait((200, 200, 200))


@pytest.mark.fault
def test_a_desk_that_dies_refuses_nobody(bench: Bench, http: Http, start: Start) -> None:
    worker = start("default")
    http.wait((200, 200, 200))
    ids = {bench.send(bench.client(), "note") for _ in range(5)}
    bench.wait_done(ids)
    wait_until(lambda: http.count("celery_task_succeeded_total", NOTE) == 5, 10, "five are counted")
    desk(worker).kill()
    assert http.get("/livez", timeout=20)[0] == 200
    http.wait((200, 200, 200))
    assert http.count("celery_task_succeeded_total", NOTE) == 5


def test_without_remote_control_there_are_probes_and_no_connection_for_them(
    bench: Bench, http: Http, start: Start
) -> None:
    bench.settings["worker"] = {"remote_control": False}
    start("default")
    http.wait((200, 200, 200))
    names = [one["client_properties"]["connection_name"] for one in bench.vhost.management.connections()]
    assert not [name for name in names if "/desk/" in name]


def test_what_no_client_should_send_harms_nothing(http: Http, start: Start) -> None:
    worker = start("default")
    http.wait((200, 200, 200))
    before = desk(worker).pid
    host, port = http.address.split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(20)]
    for bad in (b"\x00\xff\r\n\r\n", b"GET /" + b"a" * 100_000 + b"\r\n\r\n", b"POST /livez HTTP/1.1\r\n\r\n", b"GET"):
        with socket.create_connection((host, int(port))) as one:
            one.sendall(bad)
    assert http.probes() == (200, 200, 200), "twenty silent clients hold nobody up"
    assert http.get("/../../etc/passwd")[0] == 404
    assert desk(worker).pid == before
    for one in idle:
        one.close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:{taken}", "Address already in use"),
        ("nosuch.invalid:9808", "cannot listen on"),
        ("9808x", "no address"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line_at_the_start(bench: Bench, address: str, said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bench.settings["worker"] = {"http": address.format(taken=taken.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, "-m", "amqptasks", "-A", Bench.APP, "--config", str(bench.config), "worker"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_counters_equal_the_ledger_after_reconnects(
    bench: Bench, http: Http, start: Start, proxy: TcpProxy, through_proxy: str
) -> None:
    start("default", url=through_proxy)
    app = bench.client()
    ids: set[str] = set()
    for turn in range(5):
        ids |= {bench.send(app, "note", 0.01) for _ in range(30)}
        wait_until(lambda some=30 * turn + 10: len(bench.ledger.ids("begin")) > some, 30, "some ran")
        before = http.count("amqptasks_reconnects_total", "consume")
        proxy.cut()
        wait_until(lambda was=before: http.count("amqptasks_reconnects_total", "consume") > was, 30, "it is back")
    failing = [bench.send(app, "fails") for _ in range(3)]
    retrying = bench.send(app, "always_retries", 0.1)
    bench.wait_done(ids)
    bench.vhost.dead_letters("default", 4)
    bench.vhost.wait_settled("default")
    ran = len(bench.ledger.entries("done"))
    assert http.count("celery_task_succeeded_total", NOTE) == ran
    assert http.count("celery_task_started_total", NOTE) == ran
    assert http.count("celery_task_runtime_count", NOTE) == ran
    assert http.count("celery_task_queue_wait_time_count", NOTE) == ran
    # A message whose ack was lost on the way comes and runs again: each run of it counts.
    assert len(ids) <= http.count("celery_task_sent_total", NOTE) <= ran
    assert http.count("celery_task_failed_total", "ValueError") == 4
    assert http.count("celery_task_retried_total") == len(bench.ledger.entries("try")) - len(failing) - 1 == 2
    assert bench.ledger.ids("try") == {*failing, retrying}
    assert http.count("amqptasks_dead_letters_total", "failed") == 3
    assert http.count("amqptasks_dead_letters_total", "retries_exhausted") == 1
    assert http.count("amqptasks_reconnects_total", "default", "consume") >= 5
    assert http.count("amqptasks_publish_seconds_count", "default") == http.count(
        "amqptasks_publishes_total", "confirmed"
    )


def test_counters_go_up_and_never_down_when_leaders_die(bench: Bench, http: Http, start: Start) -> None:
    worker = start("default")
    app = bench.client()
    ids: set[str] = set()
    last = dict.fromkeys(_totals(http), 0.0)
    for turn in range(3):
        ids |= {bench.send(app, "note", 0.01) for _ in range(40)}
        wait_until(lambda some=40 * turn + 20: len(bench.ledger.ids("done")) > some, 30, "some ran")
        (leader,) = worker.leaders()
        leader.kill()
        now = _totals(http)
        assert all(now[key] >= last[key] for key in last), "a counter went down"
        last = now
        wait_until(lambda gone=leader.pid: [one for one in worker.leaders() if one.pid != gone], 30, "another leader")
    bench.wait_done(ids)
    bench.vhost.wait_settled("default")
    # A run that has ended when its leader dies may be unknown to it, and then another is counted: never neither.
    ends = len(bench.ledger.entries("done"))
    assert len(ids) <= http.count("celery_task_succeeded_total", NOTE) <= ends
    http.wait((200, 200, 200))
    # The desk asks the supervisor once a second.
    wait_until(lambda: http.count("amqptasks_leader_restarts_total", "default") == 3, 10, "all restarts are counted")


def _totals(http: Http) -> dict[tuple[str, ...], float]:
    found = http.metrics().items()
    return {key: value for key, value in found if key[0].endswith(("_total", "_count", "_bucket", "_sum"))}


def test_counters_go_on_when_new_code_takes_over(bench: Bench, http: Http, start: Start) -> None:
    """SIGHUP: a task that the old leader ends afterwards is counted too, and no request is refused meanwhile."""
    worker = start("default")
    app = bench.client()
    bench.wait_done({bench.send(app, "note") for _ in range(4)})
    long = bench.send(app, "note", 5.0)
    wait_until(lambda: long in bench.ledger.ids("begin"), 20, "the long task runs")
    (old,) = worker.leaders()
    worker.process.send_signal(signal.SIGHUP)

    def replaced() -> bool:
        assert http.get("/livez", timeout=20)[0] == 200
        return any(one.pid != old.pid for one in worker.leaders())

    wait_until(replaced, 30, "a new leader", pause=0.05)
    http.wait((200, 200, 200))
    assert http.count("celery_task_succeeded_total", NOTE) == 4
    bench.wait_done({long})
    wait_until(lambda: http.count("celery_task_succeeded_total", NOTE) == 5, 10, "the last one is counted")
    bench.wait_done({bench.send(app, "note")})
    wait_until(lambda: http.count("celery_task_succeeded_total", NOTE) == 6, 10, "the new leader counts on")


def test_strangers_make_no_series(bench: Bench, http: Http, start: Start) -> None:
    start("default", "--prefetch", "100")
    app = bench.client()
    app.send_task("no.such.task.first", (), queue="default")
    wait_until(lambda: http.count("celery_task_failed_total", "UnknownTask") == 1, 20, "the first stranger is counted")
    before = len(http.metrics())
    for number in range(200):
        app.send_task(f"no.such.task.{number}", (), queue="default", headers={"origin": f"gen1@host{number}"})
    wait_until(lambda: http.count("celery_task_failed_total", "UnknownTask") == 201, 30, "all strangers are counted")
    assert len(http.metrics()) == before
    assert {key[1] for key in http.metrics() if key[0] == "celery_worker_up"} == {NODE}


@pytest.mark.timing
@pytest.mark.timeout(180)
def test_two_hundred_workers_that_come_and_go_leave_no_series(bench: Bench, http: Http, start: Start) -> None:
    """Their events, their questions to each other, and their calls, as Celery sends them."""
    start("default", "-E")
    ours = bench.client()
    bench.wait_done({bench.send(ours, "note")})
    wait_until(lambda: http.count("celery_task_succeeded_total", NOTE) == 1, 20, "one is counted")
    before = set(http.metrics())
    ids = set()
    with Celery("others", broker=bench.vhost.url) as theirs, theirs.connection_for_write() as connection:
        for number in range(200):
            name = f"shop@pod-{number}"
            with theirs.events.Dispatcher(connection, hostname=name) as told:
                told.send("worker-online", freq=2.0)
                told.send("task-received", uuid=f"theirs-{number}", name=NOTE, args="()", kwargs="{}")
                told.send("worker-heartbeat", freq=2.0, active=1, processed=number)
                told.send("worker-offline", freq=2.0)
            theirs.control.broadcast("hello", arguments={"from_node": name, "revoked": {}}, connection=connection)
            ids.add(bench.send(ours, "note", headers={"origin": f"gen{number}@{name}"}))
    bench.wait_done(ids, timeout=60)
    wait_until(lambda: http.count("celery_task_succeeded_total", NOTE) == 201, 20, "all calls are counted")
    assert set(http.metrics()) == before
    took = sorted(_seconds(http, "/metrics") for _ in range(20))
    assert took[len(took) // 2] < 0.2, took


def test_a_worker_under_another_name_has_as_many_series(bench: Bench, http: Http) -> None:
    """A pod has a new name each time. What is scraped never knows the names of before."""
    seen: list[set[tuple[str, ...]]] = []
    for name in ("shop@pod-1", "shop@pod-2"):
        http.worker = bench.worker("default", "-c", "2", "-n", name, "--http", http.address)
        bench.wait_done({bench.send(bench.client(), "note")})
        wait_until(lambda: http.count("celery_task_succeeded_total", NOTE) == 1, 20, "one is counted")
        found = set(http.metrics())
        assert {key[1] for key in found if key[0] == "celery_worker_up"} == {name}
        seen.append({tuple("its own" if one == name else one for one in key) for key in found})
        assert http.worker.stop() == 0
    assert seen[0] == seen[1]


def test_what_the_broker_holds_is_told_with_a_management_url(bench: Bench, http: Http, start: Start) -> None:
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url
    bench.settings["queues"]["email"] = {}
    app = bench.client()
    start("default", "-P", "solo")
    letter = bench.send(app, "fails")
    bench.send(app, "note", 0.0, queue="email", countdown=600)
    bench.vhost.dead_letters("default", 1)
    for _ in range(3):
        bench.send(app, "note", queue="email")
    assert letter
    wait_until(lambda: http.count("amqptasks_queue_ready", "email") == 3, 40, "the depth of email", pause=0.5)
    assert http.count("celery_queue_length", "email") == 3
    assert http.count("celery_queue_length", "default") == 0
    assert http.count("amqptasks_dlq_messages", "default") == 1
    assert http.count("amqptasks_delayed_messages") == 1
    assert http.count("amqptasks_broker_poll_ok") == 1
    assert 0 < http.count("amqptasks_queue_oldest_age_seconds", "email") < 60
    assert http.count("amqptasks_queue_oldest_age_seconds", "default") == 0
    assert "guest:guest" not in http.get("/metrics")[1]


def test_a_management_api_that_refuses_is_a_metric_and_a_line_of_log(bench: Bench, http: Http, start: Start) -> None:
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url.replace("guest:", "guest:wr0ng")
    worker = start("default")
    http.wait((200, 200, 200))
    wait_until(lambda: "Cannot ask the management API" in worker.log, 20, "it says so")
    assert http.count("amqptasks_broker_poll_ok") == 0
    assert "wr0ng" not in worker.log
    assert not [key for key in http.metrics() if key[0] == "amqptasks_queue_ready"]


@pytest.mark.timing
def test_every_metric_is_in_the_catalogue_and_a_scrape_is_fast(bench: Bench, http: Http, start: Start) -> None:
    start("default")
    app = bench.client()
    bench.wait_done({bench.send(app, "note") for _ in range(20)})
    http.wait((200, 200, 200))
    _, text = http.get("/metrics")
    families = {
        family.name + ("_total" if family.type == "counter" else "") for family in text_string_to_metric_families(text)
    }
    assert families <= set(CATALOGUE), families - set(CATALOGUE)
    took = sorted(_seconds(http, "/metrics") for _ in range(20))
    assert took[len(took) // 2] < 0.2, took
    assert http.count("celery_active_worker_count", "default") == 1
    assert http.count("celery_active_consumer_count", "default") == 1
    assert http.count("celery_active_process_count", "default") == 2
    assert http.count("amqptasks_resident_bytes", "executor") > 1 << 20
    assert http.count("amqptasks_resident_bytes", "supervisor") > 1 << 20


def test_a_real_prometheus_scrapes_a_worker_and_evaluates_the_rules(http: Http, start: Start) -> None:
    start("default")
    with PrometheusServer(http.address, ROOT / "helm" / "amqptasks" / "files" / "alerts.yaml") as prometheus:

        def ask(path: str) -> Any:
            with urllib.request.urlopen(f"{prometheus.url}/api/v1/{path}", timeout=10) as answer:
                return json.load(answer)["data"]

        def consuming() -> bool:
            found = ask("query?query=amqptasks_consuming")["result"]
            return [(one["metric"]["queue"], one["value"][1]) for one in found] == [("default", "1")]

        wait_until(consuming, 30, "Prometheus knows that the queue is consumed", pause=0.2)
        (group,) = ask("rules")["groups"]
        assert len(group["rules"]) >= 12
        wait_until(
            lambda: {one["health"] for one in ask("rules")["groups"][0]["rules"]} == {"ok"}, 30, "rules are well"
        )
        wait_until(lambda: ask("query?query=ALERTS")["result"] == [], 30, "nothing is wrong", pause=0.5)


def test_a_beat_that_hangs_or_dies_shows(bench: Bench, http: Http, start: Start) -> None:
    bench.settings["schedule"] = {"often": {"task": NOTE, "every": 0.5}}
    worker = start("default", "-B")
    http.wait((200, 200, 200))
    wait_until(lambda: http.count("amqptasks_beat_leads") == 1, 20, "the beat leads")
    wait_until(lambda: http.count("amqptasks_beat_last_tick_seconds") > time.time() - 10, 20, "it ticks")
    assert http.count("amqptasks_beat_next_due_seconds") == pytest.approx(time.time(), abs=10)
    (beat,) = [one for one in psutil.Process(worker.process.pid).children() if one.name() == "amqptasks-beat"]
    beat.suspend()
    http.wait((200, 503, 200), 20)
    assert http.problems() == ["process 'beat': does not answer"]
    assert http.count("amqptasks_beat_connected") == 0
    http.wait((503, 503, 200), 60)
    beat.kill()
    http.wait((200, 200, 200))


def test_a_beat_of_its_own_answers_too(bench: Bench, http: Http, proxy: TcpProxy, through_proxy: str) -> None:
    bench.settings["schedule"] = {"often": {"task": NOTE, "every": 0.5}}
    proxy.refuse()
    log = bench.folder / "beat.log"
    environment = {"PYTHONPATH": str(ROOT)}
    beat = BeatProcess(
        Bench.APP, "--http", http.address, config=bench.config, log=log, environment=environment,
        global_options=["-b", through_proxy],
    )  # fmt: skip
    try:
        http.wait((200, 503, 503))
        assert http.problems() == ["waiting for the broker"]
        assert http.count("amqptasks_beat_connected") == 0
        proxy.accept()
        http.wait((200, 200, 200))
        wait_until(lambda: http.count("amqptasks_beat_leads") == 1, 20, "it leads")
        wait_until(lambda: http.count("amqptasks_beat_last_tick_seconds") > time.time() - 10, 20, "it ticks")
        assert http.count("amqptasks_beat_next_due_seconds") == pytest.approx(time.time(), abs=10)
        assert http.count("amqptasks_resident_bytes", "beat") > 1_000_000
        assert {key[0] for key in http.metrics()} <= set(CATALOGUE)
        assert json.loads(http.get("/readyz")[1])["leads"] is True
        proxy.refuse()
        proxy.cut()
        http.wait((200, 503, 200))
        assert http.problems() == ["not connected to the broker"]
        assert http.count("amqptasks_ready") == 0
        proxy.accept()
        http.wait((200, 200, 200))
        assert beat.stop() == 0
    finally:
        beat.kill()


def test_a_beat_whose_loop_stands_still_fails_readiness_then_liveness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that answers lives on when the loop does not turn. Nothing else of the process is needed for that."""
    listening = listen(f"127.0.0.1:{free_port()}")
    assert listening is not None
    http, bus = Http(), Bus()
    http.address = listening.address
    probes = BeatProbes("h", listening, bus)
    probes.start()
    assert http.probes() == (200, 503, 503)
    bus.emit(BeatPulse(True, False, 1, None))
    assert http.probes() == (200, 200, 200)
    for limit, expected in (("READY_SECONDS", (200, 503, 200)), ("ALIVE_SECONDS", (503, 503, 200))):
        monkeypatch.setattr(f"amqptasks.worker.beat_probes.{limit}", 0.1)
        http.wait(expected)
    assert http.problems("/livez")[0].startswith("its loop has stood still for ")
    bus.emit(BeatPulse(True, False, 1, None))
    monkeypatch.undo()
    assert http.probes() == (200, 200, 200)
    now = datetime.now(UTC)
    bus.emit(BeatPulse(True, True, 1, now, now + timedelta(seconds=30)))
    assert http.probes() == (200, 200, 200)
    assert http.count("amqptasks_beat_next_due_seconds") == pytest.approx(time.time() + 30, abs=10)
    # It leads, its loop turns, and nothing is sent: a commit that hangs.
    bus.emit(BeatPulse(True, True, 1, now, now - timedelta(seconds=61)))
    assert http.probes() == (200, 503, 200)
    assert "its next tick is 6" in http.problems()[0]

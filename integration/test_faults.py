"""What must hold while processes die and connections break. Loss and duplicates are judged from the ledger."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pika
import psutil
import pytest

from amqptasks import AmqpTasks, PublishError
from amqptasks.broker.wire import EncodedProperties
from amqptasks.testing.management import Management
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench
from integration.seeds import VARIABLE, run_seed
from integration.strangers import strange_channel

pytestmark = pytest.mark.fault


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_gone(processes: list[psutil.Process]) -> None:
    def gone() -> bool:
        return not any(alive(one) for one in processes)

    wait_until(gone, 20, "its processes are gone")


@pytest.mark.timeout(180)
def test_a_thousand_tasks_survive_workers_killed_at_random(bench: Bench) -> None:
    seed = run_seed()
    print(f"{VARIABLE}={seed}")
    dice = random.Random(seed)
    # A task that is hit three times by chance is none.
    bench.settings["worker"] = {"poison_limit": 5}
    app = bench.client()
    ids = {result.id for result in app.send_many([app.signature("integration.apps.jobs.note", (0.01,))] * 1000)}
    assert len(ids) == 1000
    worker = bench.worker("default", "-c", "4")
    deadline = time.monotonic() + 120
    kills: Counter[str] = Counter()
    while not ids <= bench.ledger.ids():
        assert time.monotonic() < deadline, (
            f"{len(ids - bench.ledger.ids())} tasks missing after {kills}\n{worker.log[-3000:]}"
        )
        time.sleep(dice.uniform(0.1, 0.4))
        victim = dice.choice(["executor", "executor", "executor", "leader", "supervisor"])
        kills[victim] += 1
        if victim == "supervisor":
            worker.kill()
            worker = bench.worker("default", "-c", "4")
        else:
            family = worker.executors() if victim == "executor" else worker.leaders()
            if family:
                kill(dice.choice(family))
    bench.vhost.wait_settled("default", 60)
    assert bench.vhost.management.messages("default.dlq") == [], "killed processes must not make poison of tasks"
    runs = Counter(entry.task_id for entry in bench.ledger.entries("done"))
    print(f"kills {dict(kills)}, runs {sum(runs.values())} for 1000 tasks")
    assert worker.stop() == 0


def test_an_executor_that_dies_is_replaced_and_its_connection_lives_on(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "2")

    def consuming() -> set[str]:
        found = bench.vhost.management.connections()
        return {one["name"] for one in found if "/consume" in one["client_properties"].get("connection_name", "")}

    connections = wait_until(consuming, 10, "the management API knows the connection")
    before = {process.pid for process in worker.executors()}
    for process in worker.executors():
        kill(process)
    wait_until(lambda: len({p.pid for p in worker.executors()} - before) == 2, 15, "two new executors")
    bench.wait_done({bench.send(app, "note")})
    assert consuming() == connections


def test_a_leader_that_dies_is_replaced_and_its_executors_die_with_it(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "2")
    leader, executors = worker.leaders()[0], worker.executors()
    slow = bench.send(app, "note", 1.0)
    bench.wait_done({slow}, event="begin")
    kill(leader)
    wait_gone(executors)
    bench.wait_done({slow})
    bench.vhost.wait_settled("default")


def test_nothing_runs_on_when_the_supervisor_is_killed(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "2")
    family = worker.leaders() + worker.executors()
    slow = bench.send(app, "note", 2.0)
    bench.wait_done({slow}, event="begin")
    worker.process.kill()
    wait_gone(family)
    wait_until(lambda: bench.vhost.ready("default") == 1, 10, "the broker has the task again")


@pytest.mark.timing
def test_sigterm_finishes_what_runs_gives_the_rest_back_and_exits_0(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "2", "--prefetch", "10")
    ids = [bench.send(app, "note", 1.5) for _ in range(10)]
    wait_until(lambda: len(bench.ledger.entries("begin")) == 2, 10, "two run")
    started = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    wait_until(lambda: bench.vhost.ready("default") == 8, 1.2, "the rest is back in the queue at once")
    assert worker.wait() == 0
    assert time.monotonic() - started < 5
    assert len(bench.ledger.entries("done")) == 2
    bench.worker("default", "-c", "8")
    bench.wait_done(set(ids))
    assert len(bench.ledger.entries("begin")) == 10, "nothing was run twice"


def test_a_signal_to_the_whole_process_group_is_as_orderly(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "2")
    running = bench.send(app, "note", 1.0)
    bench.wait_done({running}, event="begin")
    os.killpg(worker.process.pid, signal.SIGTERM)
    assert worker.wait() == 0
    assert running in bench.ledger.ids()


@pytest.mark.timing
def test_when_the_grace_period_is_over_the_task_goes_back_and_the_exit_code_is_0(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "1", "--grace-period", "1")
    task_id = bench.send(app, "note", 30.0)
    bench.wait_done({task_id}, event="begin")
    started = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - started < 4
    wait_until(lambda: bench.vhost.ready("default") == 1, 5, "the task is back")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_a_second_signal_stops_at_once(bench: Bench, number: signal.Signals) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    task_id = bench.send(app, "note", 30.0)
    bench.wait_done({task_id}, event="begin")
    worker.process.send_signal(number)
    wait_until(lambda: "Stopping: running tasks finish" in worker.log, 5, "the first signal is heard")
    time.sleep(0.4)
    worker.process.send_signal(number)
    assert worker.wait(5) == 1
    wait_until(lambda: bench.vhost.ready("default") == 1, 5, "the task is back")


def test_after_a_cut_connection_the_running_task_is_adopted_and_not_run_again(
    bench: Bench, proxy: TcpProxy, through_proxy: str
) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "2", url=through_proxy)
    task_id = bench.send(app, "note", 3.0)
    bench.wait_done({task_id}, event="begin")
    proxy.cut()
    bench.wait_done({task_id})
    bench.vhost.wait_settled("default")
    assert [entry.event for entry in bench.ledger.entries() if entry.task_id == task_id] == ["begin", "done"]
    others = {bench.send(app, "note") for _ in range(20)}
    bench.wait_done(others, timeout=10)
    assert worker.stop() == 0


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_an_ack_that_is_lost_with_its_connection_costs_no_second_run(
    bench: Bench, proxy: TcpProxy, through_proxy: str, kind: str
) -> None:
    """It was sent, and did not arrive: the broker gives the message out again, and it needs nothing but another ack."""
    bench.settings["queues"] = {"default": {"type": kind}}
    app = bench.client()
    worker = bench.worker("default", "-c", "1", url=through_proxy)
    release = bench.folder / "release"
    task_id = bench.send(app, "waits_for", str(release), ignore_result=True)
    bench.wait_done({task_id}, event="begin")
    proxy.stall()
    release.touch()
    bench.wait_done({task_id})
    time.sleep(0.5)  # the ack is on its way
    proxy.cut()
    proxy.resume()
    wait_until(lambda: worker.log.count("Consuming") == 2, 20, "it consumes again")
    bench.wait_done({bench.send(app, "note", ignore_result=True)})
    bench.vhost.wait_settled("default")
    assert len([one for one in bench.ledger.entries("begin") if one.task_id == task_id]) == 1


def test_a_task_that_ends_while_the_connection_is_down_is_acknowledged_when_it_comes_back(
    bench: Bench, proxy: TcpProxy, through_proxy: str
) -> None:
    app = bench.client()
    bench.worker("default", "-c", "1", url=through_proxy)
    done, failed = bench.send(app, "note", 1.0), ""
    bench.wait_done({done}, event="begin")
    proxy.refuse()
    bench.wait_done({done})
    proxy.accept()
    bench.vhost.wait_settled("default", 30)
    assert len([entry for entry in bench.ledger.entries("begin") if entry.task_id == done]) == 1
    failed = bench.send(app, "always_retries", 0.1)
    assert bench.vhost.dead_letters("default", 1)[0]["properties"]["correlation_id"] == failed


@pytest.mark.timeout(180)
def test_work_goes_on_after_every_kind_of_interruption(bench: Bench, proxy: TcpProxy, through_proxy: str) -> None:
    bench.settings["broker"]["heartbeat"] = 2
    app = bench.client()
    worker = bench.worker("default", "-c", "4", url=through_proxy)
    ids: set[str] = set()

    def feed(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ids.add(bench.send(app, "note", 0.05))
            time.sleep(0.05)

    for interruption in ("cut", "stall", "close", "cut", "stall", "close"):
        feed(0.5)
        if interruption == "cut":
            proxy.cut()
        elif interruption == "stall":
            proxy.stall()
            feed(7)
            proxy.resume()
        else:
            for connection in bench.vhost.management.connections():
                if "consume" in connection.get("client_properties", {}).get("connection_name", ""):
                    bench.vhost.management.close_connection(connection["name"])
        feed(0.5)
        ids.add(bench.send(app, "note"))
        bench.wait_done(ids, timeout=30)
    bench.vhost.wait_settled("default")
    assert len(worker.executors()) == 4
    assert worker.stop() == 0


def test_a_deleted_queue_is_declared_again_and_consumed(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    bench.wait_done({bench.send(app, "note")})
    bench.vhost.management.delete_queue("default")
    wait_until(lambda: "Declared the topology again" in worker.log, 15, "declared again")
    bench.wait_done({bench.send(app, "note")}, timeout=20)


def test_a_dead_letter_that_cannot_be_published_keeps_its_task_until_it_can(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    bench.wait_done({bench.send(app, "note")})
    said = "The outcome of a task cannot be published"
    failing: set[str] = set()
    for number in range(1, 4):
        bench.vhost.management.request("DELETE", f"exchanges/{bench.vhost.name}/amqptasks.dlx")
        failing.add(bench.send(app, "fails"))
        wait_until(lambda number=number: worker.log.count(said) >= number, 15, "it says so")
        # Its exchange is declared again, and then bound; what comes between goes to amqptasks.unroutable.
        letters = bench.vhost.dead_letters("default", number)
        assert {letter["properties"]["correlation_id"] for letter in letters} == failing
        bench.vhost.wait_settled("default")


@pytest.mark.timeout(120)
def test_confirmed_tasks_survive_a_broker_that_is_killed(node: PrivateNode, bench: Bench) -> None:
    bench.settings["broker"]["url"] = node.url
    bench.settings["broker"]["publish_timeout"] = 60
    app = bench.client()
    ids = {bench.send(app, "note", 0.02) for _ in range(200)}
    worker = bench.worker("default", "-c", "2")
    bench.wait_done(set(), timeout=1)
    wait_until(lambda: len(bench.ledger.ids()) > 20, 20, "some are done")
    node.kill()
    node.start()
    ids.add(bench.send(app, "note"))
    bench.wait_done(ids, timeout=60)
    assert worker.stop() == 0


@pytest.mark.timeout(180)
def test_of_five_thousand_sends_while_the_broker_is_killed_three_times_none_is_lost(node: PrivateNode) -> None:
    app = AmqpTasks("restarts", config={"broker": {"url": node.url, "publish_timeout": 60}})
    sent = {app.send_task("shop.charge").id}
    # A queue that is younger than a second may be gone after the kill, whatever it confirmed: docs/guarantees.md.
    time.sleep(1.5)

    def send(_: int) -> None:
        with contextlib.suppress(PublishError):  # told, so not lost
            sent.add(app.send_task("shop.charge").id)

    with ThreadPoolExecutor(8) as pool:
        sends = [pool.submit(send, number) for number in range(5000)]
        for part in (0.2, 0.4, 0.6):
            wait_until(lambda part=part: len(sent) > 5000 * part, 60, f"{part:.0%} are sent")
            node.kill()
            node.start()
        for one in sends:
            one.result()
    app.close()
    assert len(sent) > 4900
    found = Counter(
        one["properties"]["correlation_id"] for one in Management(node.management_url).messages("default", 6000)
    )
    assert sent - set(found) == set()


def test_bad_messages_are_dead_lettered_with_a_reason_and_good_ones_run(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    sound = {"task": "integration.apps.jobs.note", "id": "x"}
    body = b"[[],{},{}]"
    bad = [
        (os.urandom(64), sound, "application/json"),
        (b"\xff\xfe[[],{},{}]", sound, "application/json"),
        (b"x" * 1_000_000, sound, "application/json"),
        (b'{"json": "of another shape"}', sound, "application/json"),
        (body, sound, "text/plain"),
        (b"\x80\x04.", sound, "application/x-python-serialize"),
        (b"not zlib", {**sound, "compression": "application/x-gzip"}, "application/json"),
        (body, {**sound, "compression": "application/x-magic"}, "application/json"),
        (body, {"task": "integration.apps.jobs.note"}, "application/json"),
        (body, {"id": "y", "hello": "world"}, "application/json"),
        (body, {**sound, "retries": -5}, "application/json"),
        (body, {**sound, "eta": "the day after"}, "application/json"),
        (body, {**sound, "stray": b"\xff\xfe\x00"}, None),
        (b"[" * 200_000, sound, "application/json"),
    ]
    published = [
        (payload, pika.BasicProperties(headers=headers, content_type=content_type, correlation_id="bad"))
        for payload, headers, content_type in bad
    ]
    # A header table with a time beyond what a clock can show, as raw bytes: flags, table, nothing else.
    table = b"\x01t" + b"T" + b"\xff" * 8
    hostile = EncodedProperties(struct.pack(">HI", 1 << 13, len(table)) + table)
    published.append((body, hostile))
    ids = set()
    published *= 50
    with strange_channel(bench.vhost.url) as channel:
        for payload, properties in published:
            channel.basic_publish("amqptasks", "default", payload, properties)
            ids.add(bench.send(app, "note", ignore_result=True))
    worker = bench.worker("default", "-c", "2", "--prefetch", "4")
    pids = {process.pid for process in worker.leaders()}
    letters = bench.vhost.dead_letters("default", len(published), timeout=60)
    reasons = Counter(letter["properties"]["headers"]["x-task-reason"] for letter in letters)
    assert reasons == {"undecodable": len(published)}
    assert all(letter["properties"]["headers"]["x-task-exception-message"] for letter in letters)
    bench.wait_done(ids)
    bench.vhost.wait_settled("default")
    assert {process.pid for process in worker.leaders()} == pids, "no bad message ends a leader"


@pytest.mark.timing
def test_unknown_tasks_wait_in_the_dead_letter_queue_without_a_hot_loop(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker()
    for _ in range(20):
        bench.send(app, "version_two")
    letters = bench.vhost.dead_letters("default", 20)
    assert {letter["properties"]["headers"]["x-task-reason"] for letter in letters} == {"unknown_task"}
    leader = worker.leaders()[0]
    leader.cpu_percent()
    time.sleep(1.0)
    assert leader.cpu_percent() < 5


def test_consuming_goes_on_under_an_alarm(node: PrivateNode, bench: Bench) -> None:
    bench.settings["broker"]["url"] = node.url
    app = bench.client()
    # A result is a message, and would have to wait for the end of the alarm like the dead letter.
    ids = {bench.send(app, "note", 0.5, ignore_result=True) for _ in range(6)}
    failing = bench.send(app, "fails", ignore_result=True)
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.00001")
    worker = bench.worker("default", "-c", "2")
    bench.wait_done(ids)
    management = Management(node.management_url)
    # The failed task's dead letter cannot be published yet, so it alone is still held.
    wait_until(lambda: management.counts("default") == (0, 1), 10, "all but one are acknowledged")
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.6")
    wait_until(lambda: management.counts("default") == (0, 0), 20, "and that one when the alarm is over")
    assert management.messages("default.dlq")[0]["properties"]["correlation_id"] == failing
    assert worker.stop() == 0

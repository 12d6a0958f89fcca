"""What others suffer from after an interruption: workers that look alive and consume nothing, tasks that hold others
back, counters that condemn the innocent."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from amqptasks import PublishError
from amqptasks.testing.disks import SmallDisk
from amqptasks.testing.management import Management, ManagementError
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.rabbitmq import PrivateNode, free_port
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench
from integration.seeds import VARIABLE, run_seed

pytestmark = pytest.mark.fault


def consumers(bench: Bench) -> dict[str, tuple[int, int]]:
    """Queue -> how many consume it, and their prefetch together."""
    found: dict[str, tuple[int, int]] = {}
    for one in bench.vhost.management.request("GET", f"consumers/{bench.vhost.name}"):
        name = one["queue"]["name"]
        if not name.startswith("amqptasks.") and ".reply." not in name and ".pidbox" not in name:
            count, prefetch = found.get(name, (0, 0))
            found[name] = (count + 1, prefetch + one["prefetch_count"])
    return found


@pytest.mark.timeout(180)
def test_after_interruptions_under_load_and_idle_each_queue_has_its_consumer_and_prefetch_again(
    bench: Bench, proxy: TcpProxy, through_proxy: str
) -> None:
    bench.settings["broker"]["heartbeat"] = 2
    bench.settings["queues"] = {"default": {}, "email": {"prefetch": 7}, "media": {"max_priority": 5, "prefetch": 3}}
    app = bench.client()
    worker = bench.worker("email,media,default", "-c", "2", "--prefetch", "4", url=through_proxy)
    before = wait_until(lambda: len(consumers(bench)) == 3 and consumers(bench), 10, "three consumers")
    sent: set[str] = set()

    def feed() -> None:
        sent.update(bench.send(app, "note", 0.02, queue=queue) for queue in ("default", "email", "media"))

    for busy in (True, False):
        for interruption in ("cut", "stall", "close"):
            if busy:
                feed()
            if interruption == "cut":
                proxy.cut()
            elif interruption == "stall":
                proxy.stall()
                time.sleep(6)
                proxy.resume()
            else:
                for connection in bench.vhost.management.connections():
                    if "/consume" in connection["client_properties"].get("connection_name", ""):
                        bench.vhost.management.close_connection(connection["name"])
            feed()
            bench.wait_done(sent, timeout=30)
        wait_until(lambda: consumers(bench) == before, 15, lambda: f"{before} again, not {consumers(bench)}")
    assert len(worker.executors()) == 6
    assert worker.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_after_twenty_interruptions_under_load_and_twenty_idle_the_same_consumer_is_there(
    node: PrivateNode, bench: Bench
) -> None:
    """Reset, silence, closed by the broker, RabbitMQ stopped and started: five times each, and again without tasks."""
    management = Management(node.management_url)
    bench.settings["broker"] = {"url": node.url, "heartbeat": 2, "publish_timeout": 60}
    app = bench.client()
    app.declare()
    time.sleep(1.5)  # docs/guarantees.md: a queue younger than a second
    with TcpProxy("127.0.0.1", node.port) as proxy:
        url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
        worker = bench.worker("default", "-c", "4", "--prefetch", "8", url=url)

        def consuming() -> list[int]:
            found = management.request("GET", "consumers/%2F")
            return [one["prefetch_count"] for one in found if one["queue"]["name"] == "default"]

        def stall() -> None:
            proxy.stall()
            time.sleep(6)
            proxy.resume()

        def restart() -> None:
            node.rabbitmqctl("stop_app")
            node.rabbitmqctl("start_app")

        def close() -> None:
            node.rabbitmqctl("close_all_connections", "over")

        def send(count: int, seconds: float) -> set[str]:
            return {bench.send(app, "note", seconds, ignore_result=True) for _ in range(count)}

        wait_until(lambda: consuming() == [8], 20, "it consumes")
        sent: set[str] = set()
        for busy in (True, False):
            for interrupt in (proxy.cut, stall, close, restart) * 5:
                sent |= send(20, 0.2) if busy else set()
                interrupt()
                after = send(10, 0.0) if busy else set()
                bench.wait_done(after, timeout=30)
                sent |= after
        bench.wait_done(sent | send(10, 0.0), timeout=30)
        wait_until(lambda: consuming() == [8], 30, lambda: f"one consumer of eight again, not {consuming()}")
        assert len(worker.executors()) == 4
        assert worker.stop() == 0


def test_a_worker_of_another_host_that_gets_a_task_again_is_told_so(
    bench: Bench, proxy: TcpProxy, through_proxy: str
) -> None:
    """Who lost the connection goes on, whoever else gets the task runs it too: tasks see that they came again."""
    app = bench.client()
    parted = bench.worker("default", "-c", "1", url=through_proxy)
    task_id = bench.send(app, "says_whether_it_came_again", 3.0)
    bench.wait_done({task_id}, event="redelivered=False")
    proxy.refuse()
    bench.worker("default", "-c", "1")
    bench.wait_done({task_id}, event="redelivered=True")
    wait_until(lambda: len(bench.ledger.entries("done")) == 2, 15, lambda: f"both end: {bench.ledger.entries()}")
    proxy.accept()
    bench.vhost.wait_settled("default")
    bench.wait_done({bench.send(app, "note")})
    assert parted.stop() == 0


@pytest.fixture
def blackhole() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_worker_finds_the_live_node_behind_a_dead_and_a_silent_one(bench: Bench, blackhole: int) -> None:
    def at(port: int) -> str:
        return f"amqp://guest:guest@127.0.0.1:{port}/{bench.vhost.name}"

    app = bench.client()
    task_id = bench.send(app, "note")
    bench.settings["broker"] = {"url": [at(free_port()), at(blackhole), bench.vhost.url], "connection_timeout": 2}
    started = time.monotonic()
    worker = bench.worker("default", "-c", "1")
    bench.wait_done({task_id})
    assert time.monotonic() - started < 25
    assert worker.stop() == 0


def hold_nothing_back(bench: Bench, later: int, wait: float) -> None:
    app = bench.client()
    app.declare()
    calls = [app.signature("integration.apps.jobs.note", countdown=3600, ignore_result=True) for _ in range(1000)]
    for _ in range(later // 1000):
        app.send_many(calls)
    soon: dict[str, tuple[float, float]] = {}
    for _ in range(10):
        called = time.time()
        soon[bench.send(app, "note", countdown=wait, ignore_result=True)] = called + wait, time.time() + wait
    worker = bench.worker("default", "-c", "2", "--prefetch", "4")
    (leader,) = worker.leaders()
    before = leader.memory_info().rss
    now = {bench.send(app, "note", ignore_result=True) for _ in range(100)}
    bench.wait_done(now, timeout=wait - 1)
    assert bench.vhost.unacked("default") <= 4
    bench.vhost.wait_settled("default")
    worker.kill()
    worker = bench.worker("default", "-c", "2", "--prefetch", "4")
    ready = time.time()
    bench.wait_done(set(soon), timeout=wait + 10)
    begun = {entry.task_id: entry.at for entry in bench.ledger.entries("begin")}
    assert min(begun[one] - earliest for one, (earliest, _) in soon.items()) > 0
    assert max(begun[one] - max(latest, ready) for one, (_, latest) in soon.items()) < 5
    (leader,) = worker.leaders()
    assert leader.memory_info().rss < before * 1.1 + 5_000_000
    levels = [queue.name for queue in app.topology.queues if ".delay." in queue.name]
    wait_until(lambda: sum(sum(bench.vhost.management.counts(one)) for one in levels) == later, 20, "they wait")
    assert len(bench.ledger.entries("done")) == 110
    assert "lost" not in worker.log
    assert worker.stop() == 0


def test_delayed_tasks_hold_nothing_back_and_take_no_place_in_a_worker(bench: Bench) -> None:
    hold_nothing_back(bench, 5_000, 15.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fifty_thousand_delayed_tasks_hold_nothing_back_though_the_broker_is_impatient(bench: Bench) -> None:
    """Some wait for longer than a policy lets a worker hold a message; RabbitMQ looks once a minute."""
    with contextlib.suppress(ManagementError):  # before 3.12 there is no such policy
        bench.vhost.management.set_policy("impatient", "^default$", {"consumer-timeout": 10_000})
    hold_nothing_back(bench, 50_000, 90.0)


def test_tasks_that_raise_and_connections_that_are_lost_leave_nothing_behind_in_a_leader(
    bench: Bench, proxy: TcpProxy, through_proxy: str
) -> None:
    """Five hundred tasks and five reconnects, whose pauses grow; `integration/test_soak.py` has thousands of tasks."""
    app = bench.client()
    worker = bench.worker("default", "-c", "2", url=through_proxy)
    (leader,) = worker.leaders()

    def fail(count: int) -> None:
        calls = [app.signature("integration.apps.jobs.fails", ignore_result=True) for _ in range(count)]
        app.send_many(calls)
        bench.vhost.wait_settled("default", 30)

    def held() -> tuple[int, int]:
        return leader.num_fds(), leader.num_threads()

    fail(100)
    before, memory = held(), leader.memory_info().rss
    for _ in range(5):
        fail(100)
        stood = worker.log.count("Consuming")
        proxy.cut()
        wait_until(lambda stood=stood: worker.log.count("Consuming") > stood, 20, lambda: worker.log[-2000:])
    fail(50)
    wait_until(lambda: held() == before, 10, lambda: f"(files, threads) {before} again, not {held()}")
    assert leader.memory_info().rss < memory + 10_000_000
    assert worker.stop() == 0


@pytest.mark.timeout(180)
def test_a_queue_deleted_under_load_comes_back_and_only_what_stood_in_it_is_gone(bench: Bench) -> None:
    app = bench.client()
    workers = [bench.worker("default", "-c", "2") for _ in range(2)]
    sent: dict[str, float] = {}
    deleted: list[float] = []
    stop = threading.Event()

    def publish() -> None:
        # Less than a busy machine's workers do, so that little waits, and little can stand in the queue.
        while not stop.wait(0.025):
            with contextlib.suppress(PublishError):  # told, so not lost
                task_id = bench.send(app, "note", 0.002, ignore_result=True)
                sent[task_id] = time.monotonic()

    with ThreadPoolExecutor(2) as pool:
        publishers = [pool.submit(publish) for _ in range(2)]
        try:
            for _ in range(3):
                before = len(bench.ledger.ids())
                wait_until(lambda before=before: len(bench.ledger.ids()) > before + 200, 30, "work goes on")
                bench.vhost.management.delete_queue("default")
                deleted.append(time.monotonic())
            before = len(bench.ledger.ids())
            wait_until(lambda: len(bench.ledger.ids()) > before + 200, 30, "work goes on")
        finally:
            stop.set()
        for one in publishers:
            one.result()
    bench.vhost.wait_settled("default", 30)
    lost = {task_id: at for task_id, at in sent.items() if task_id not in bench.ledger.ids()}
    print(f"{len(sent)} sent, {len(lost)} stood in the queue when it was deleted")
    assert all(any(at < then + 1 and at > then - 5 for then in deleted) for at in lost.values())
    assert len(lost) < len(sent) / 4
    assert [worker.stop() for worker in workers] == [0, 0]


@pytest.mark.timeout(120)
def test_big_arguments_and_processes_that_die_or_stand_still_leave_no_deadlock(bench: Bench) -> None:
    """Arguments of up to 8 MB fill the sockets between leader and executors while these are killed and stopped."""
    seed = run_seed()
    print(f"{VARIABLE}={seed}")
    dice = random.Random(seed)
    # A task that is hit three times by chance is none.
    bench.settings["worker"] = {"poison_limit": 10}
    app = bench.client()
    app.declare()
    worker = bench.worker("default", "-c", "3")
    sizes = [0, 1_000, 300_000, 2_000_000, 8_000_000]
    ids = {bench.send(app, "takes", "x" * dice.choice(sizes), 0.01, ignore_result=True) for _ in range(80)}
    deadline = time.monotonic() + 60
    while not ids <= bench.ledger.ids():
        assert time.monotonic() < deadline, f"{len(ids - bench.ledger.ids())} are missing\n{worker.log[-3000:]}"
        executors = worker.executors()
        if executors:
            victim = dice.choice(executors)
            with contextlib.suppress(psutil.NoSuchProcess):
                if dice.random() < 0.3:
                    victim.kill()
                else:
                    victim.suspend()
                    time.sleep(0.3)
                    victim.resume()
        time.sleep(0.2)
    bench.vhost.wait_settled("default")
    assert bench.vhost.management.messages("default.dlq") == [], "killed processes must not make poison of tasks"
    assert worker.stop() == 0


def test_an_executor_that_stands_still_is_replaced_at_its_time_limit(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    stuck = bench.send(app, "note", 30.0, time_limit=5, ignore_result=True)
    bench.wait_done({stuck}, event="begin")
    (executor,) = worker.executors()
    executor.suspend()
    wait_until(lambda: executor.status() == psutil.STATUS_STOPPED, 4, "it stands still")
    letter = bench.vhost.dead_letters("default", 1)[0]
    assert letter["properties"]["headers"]["x-task-reason"] == "time_limit"
    bench.wait_done({bench.send(app, "note")})
    assert not executor.is_running()
    assert worker.stop() == 0


def test_a_task_that_may_cost_many_executors_is_not_dropped_at_the_brokers_own_limit(bench: Bench) -> None:
    """From 4.0 on RabbitMQ drops what it has delivered twenty times; a crash here is a new message with its count."""
    bench.settings["queues"] = {"default": {"poison_limit": 50}}
    app = bench.client()
    task_id = bench.send(app, "kills_itself", 24)
    worker = bench.worker("default", "-c", "2")
    deadline = time.monotonic() + 60
    while task_id not in bench.ledger.ids():
        assert time.monotonic() < deadline, worker.log[-2000:]
        bench.send(app, "note", ignore_result=True)  # a task that ends shows that executors are worth replacing at once
        time.sleep(0.1)
    assert len([one for one in bench.ledger.entries("try") if one.task_id == task_id]) == 25
    bench.vhost.wait_settled("default")
    assert worker.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_restarts_of_workers_do_not_count_against_what_only_waited_in_them(bench: Bench) -> None:
    """Given back one by one at each restart. RabbitMQ 4.0 to 4.2 count that, twenty times at most."""
    restarts = 30
    bench.settings["queues"] = {"default": {"delivery_limit": 100}}
    app = bench.client()
    app.declare()
    ids = {bench.send(app, "note", 600.0, ignore_result=True) for _ in range(4)}
    for _ in range(restarts):
        worker = bench.worker("default", "-c", "1", "--prefetch", "10", "--grace-period", "0")
        wait_until(lambda: bench.vhost.unacked("default") == 4, 10, "it holds all of them")
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        wait_until(lambda: bench.vhost.ready("default") == 4, 10, "all are back")
    assert bench.vhost.management.messages("default.dlq") == []
    assert {one["properties"]["correlation_id"] for one in bench.vhost.management.messages("default")} == ids


def test_states_that_a_task_tells_while_the_broker_takes_nothing_fill_no_memory(
    bench: Bench, node: PrivateNode
) -> None:
    bench.settings["broker"]["url"] = node.url
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    bench.wait_done({bench.send(app, "chatters", 0.2, 10)})
    (leader,) = worker.leaders()
    talking = bench.send(app, "chatters", 6.0, 50_000)
    bench.wait_done({talking}, event="begin")
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.00001")
    before = leader.memory_info().rss
    most = 0

    def ended() -> bool:
        nonlocal most
        most = max(most, leader.memory_info().rss)
        return talking in bench.ledger.ids()

    wait_until(ended, 20, "it has ended")
    print(f"{(most - before) / 1e6:.0f} MB more")
    assert most - before < 40e6
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.6")
    bench.wait_done({bench.send(app, "note")})
    assert worker.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root; the alarm before it is in the ordeal")
@pytest.mark.timeout(180)
def test_a_disk_that_is_really_full_loses_nothing_that_was_confirmed(bench: Bench) -> None:
    """Without the alarm that is to come before. RabbitMQ wants a restart afterwards."""
    node = PrivateNode("full", config={"disk_free_limit.absolute": "1KB"})
    bench.settings["broker"] = {"url": node.url, "publish_timeout": 4}
    with SmallDisk(node.folder / "data", 200) as disk, contextlib.ExitStack() as stack:
        stack.callback(node.remove)
        node.start()
        app = bench.client()
        app.declare()
        worker = bench.worker("default", "-c", "1")
        bench.wait_done({bench.send(app, "note")})
        time.sleep(1.5)  # docs/guarantees.md: a queue younger than a second
        disk.fill(leave=4_000_000)
        sent: set[str] = set()

        def publish() -> None:
            for _ in range(1000):
                sent.add(bench.send(app, "takes", "x" * 50_000, 0.2, ignore_result=True))

        with pytest.raises(PublishError):
            publish()
        print(f"{len(sent)} were confirmed before the disk was full")
        disk.clear()
        node.restart()
        sent.add(bench.send(app, "note", ignore_result=True))
        bench.wait_done(sent, timeout=60)
        assert worker.stop() == 0
        bench.close()

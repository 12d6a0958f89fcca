"""Every metric of the catalogue in one scenario, with its value."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pika
import pytest
from prometheus_client.parser import text_string_to_metric_families

from amqptasks.testing.management import Management
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from amqptasks.worker.catalogue import CATALOGUE
from integration.conftest import Bench, Broker, VirtualHost
from integration.strangers import strange_channel
from integration.test_probes import Http

JOBS, NODE, DEFAULT = "integration.apps.jobs", "shop@test", "default"


@pytest.mark.timeout(180)
def test_all_that_can_happen_is_counted_and_every_metric_is_there(node: PrivateNode, tmp_path: Path) -> None:
    management = Management(node.management_url)
    bench = Bench(VirtualHost("/", node.url, management, Broker("own", node.url, node.management_url)), tmp_path)
    try:
        _scenario(bench, node, management)
    finally:
        bench.close()


def _scenario(bench: Bench, node: PrivateNode, management: Management) -> None:
    http = Http()
    bench.settings["broker"]["management_url"] = node.management_url
    bench.settings["queues"] |= {"brief": {"max_tasks_per_child": 1, "concurrency": 1}, "email": {}}
    bench.settings["schedule"] = {"often": {"task": f"{JOBS}.noop", "every": 1, "options": {"queue": "brief"}}}
    bench.settings["tasks"] = {f"{JOBS}.paced": {"rate_limit": "100/s"}}
    app = bench.client()
    app.declare()
    revoked = bench.send(app, "note")
    app.control.revoke(revoked)
    _expired(bench)
    for task in ("note", "note", "note", "fails", "rejects", "ignores", "always_retries"):
        bench.send(app, task)
    bench.send(app, "kills_itself", 1)
    # No queue takes it when its time has come: the worker, which declares what is missing, starts after that.
    management.delete_queue("email")
    bench.send(app, "note", queue="email", countdown=0.5)
    wait_until(lambda: bench.vhost.ready("amqptasks.unroutable") == 1, 20, "it is unroutable")
    options = ("-c", "2", "--prefetch", "2", "-n", NODE, "--http", http.address, "-B")
    worker = bench.worker("default,brief", *options)
    http.wait((200, 200, 200))

    def has(value: float, name: str, *labels: str, timeout: float = 20) -> None:
        seen = f"{name} {labels}"
        wait_until(lambda: http.count(name, *labels) == value, timeout, lambda: f"{seen}: {http.count(name, *labels)}")

    def grows(name: str, *labels: str) -> None:
        wait_until(lambda: http.count(name, *labels) >= 1, 30, lambda: f"{name} {labels}\n{http.get('/metrics')[1]}")

    _of_tasks(http, has, grows)
    # Two run, two wait here, two in the broker.
    for _ in range(6):
        bench.send(app, "note", 4.0)
    has(2, "amqptasks_tasks_running", DEFAULT)
    assert http.count("celery_worker_tasks_active", NODE) >= 2
    has(2, "amqptasks_concurrency", DEFAULT)
    has(2, "amqptasks_prefetch", DEFAULT)
    bench.vhost.wait_settled(DEFAULT, timeout=40)
    _of_the_broker(bench, worker, node, management, http, has, grows)
    _of_the_worker(http, has)
    families = text_string_to_metric_families(http.get("/metrics")[1])
    names = {one.name + ("_total" if one.type == "counter" else "") for one in families}
    assert names == set(CATALOGUE)
    assert worker.stop() == 0


def _of_tasks(http: Http, has: Callable[..., None], grows: Callable[..., None]) -> None:
    note, default = f"{JOBS}.note", DEFAULT
    has(3, "celery_task_succeeded_total", note, default)
    has(1, "celery_task_succeeded_total", f"{JOBS}.ignores")
    has(1, "celery_task_succeeded_total", f"{JOBS}.kills_itself")
    has(1, "celery_task_failed_total", f"{JOBS}.fails", "ValueError")
    has(1, "celery_task_failed_total", f"{JOBS}.always_retries", "ValueError")
    has(2, "celery_task_retried_total", f"{JOBS}.always_retries")
    has(1, "celery_task_rejected_total", f"{JOBS}.rejects")
    has(2, "celery_task_revoked_total", note)
    has(5, "celery_task_received_total", note, default)
    has(5, "celery_task_sent_total", note, default)
    has(3, "celery_task_started_total", note, default)
    has(2, "celery_task_started_total", f"{JOBS}.kills_itself")
    has(3, "celery_task_runtime_count", note)
    has(3, "celery_task_queue_wait_time_count", note)
    for reason in ("failed", "retries_exhausted", "rejected", "revoked", "expired"):
        has(1, "amqptasks_dead_letters_total", default, reason)
    has(1, "amqptasks_outcomes_total", default, note, "failed", "expired")
    has(1, "amqptasks_outcomes_total", default, f"{JOBS}.kills_itself", "lost")
    has(1, "amqptasks_executor_restarts_total", default, "died")
    grows("amqptasks_executor_restarts_total", "brief", "recycled_tasks")
    has(1, "amqptasks_unroutable_messages")
    has(5, "amqptasks_dlq_messages", default)
    has(0, "amqptasks_delayed_messages")
    has(1, "amqptasks_broker_poll_ok")
    assert http.count("amqptasks_broker_poll_age_seconds") < 60


def _of_the_worker(http: Http, has: Callable[..., None]) -> None:
    has(1, "celery_worker_up", NODE)
    has(1, "amqptasks_ready")
    has(1, "amqptasks_build_info")
    assert time.time() - 180 < http.count("amqptasks_start_time_seconds") < time.time()
    for name in ("celery_active_consumer_count", "celery_active_worker_count", "amqptasks_consuming"):
        has(1, name, DEFAULT)
    has(2, "celery_active_process_count", DEFAULT)
    for role in ("desk", "supervisor", "leader", "executor"):
        assert http.count("amqptasks_resident_bytes", role) > 1 << 20
    assert http.count("amqptasks_leader_answer_age_seconds", DEFAULT) < 5
    has(1, "amqptasks_beat_connected")
    has(1, "amqptasks_beat_leads")
    for name in ("amqptasks_beat_last_tick_seconds", "amqptasks_beat_next_due_seconds"):
        assert http.count(name) == pytest.approx(time.time(), abs=10)


def _expired(bench: Bench) -> None:
    """Of a client that has the broker keep it though nobody wants it any more."""
    headers = {"task": f"{JOBS}.note", "id": "late", "expires": "2020-01-01T00:00:00+00:00"}
    with strange_channel(bench.vhost.url) as channel:
        properties = pika.BasicProperties(headers=headers, content_type="application/json")
        channel.basic_publish("", "default", b"[[], {}, {}]", properties)


def _of_the_broker(
    bench: Bench,
    worker: WorkerProcess,
    node: PrivateNode,
    management: Management,
    http: Http,
    has: Callable[..., None],
    grows: Callable[..., None],
) -> None:
    """It refuses, returns, blocks, loses connections; a leader dies."""
    app = bench.client()
    management.set_policy("full", "^default\\.dlq$", {"max-length": 0, "overflow": "reject-publish"})
    bench.send(app, "fails")
    grows("amqptasks_publishes_total", "default", "nacked")
    management.request("DELETE", f"policies/{quote('/', safe='')}/full")
    bench.vhost.wait_settled("default", timeout=40)
    # What waits for its turn goes to a queue that nobody leads to, until the worker has bound it again.
    waiting = f"amqptasks.rate.{JOBS}.paced"
    management.unbind("amqptasks", waiting, waiting)
    paced = bench.send(app, "paced")
    grows("amqptasks_publishes_total", "default", "returned")
    bench.vhost.wait_settled("default", timeout=40)
    assert http.count("amqptasks_publish_seconds_count", "default") == http.count(
        "amqptasks_publishes_total", "default", "confirmed"
    )

    bench.wait_done({paced})
    running = bench.send(app, "note", 6.0)
    bench.wait_done({running}, event="begin")
    for one in management.connections():
        if "/default/" in one.get("user_provided_name", ""):
            management.close_connection(one["name"])
    for role in ("consume", "publish"):
        grows("amqptasks_reconnects_total", "default", role)
    has(1, "amqptasks_connected", "default")
    grows("amqptasks_redeliveries_total", "default")
    bench.vhost.wait_settled("default", timeout=40)

    # A connection is told that it is blocked when it publishes.
    bench.send(app, "fails", countdown=12.0)
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.00001")
    has(1, "amqptasks_publish_blocked", "default", timeout=40)
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.6")
    has(0, "amqptasks_publish_blocked", "default")
    bench.vhost.wait_settled("default", timeout=40)

    (leader,) = [one for one in worker.leaders() if one.name().startswith("amqptasks:def")]
    leader.kill()
    has(1, "amqptasks_leader_restarts_total", "default")
    has(1, "amqptasks_consuming", "default")
    for name in ("amqptasks_queue_ready", "celery_queue_length", "amqptasks_queue_unacknowledged"):
        has(0, name, "default")
    has(0, "amqptasks_queue_oldest_age_seconds", "default")
    has(0, "amqptasks_tasks_waiting", "default")

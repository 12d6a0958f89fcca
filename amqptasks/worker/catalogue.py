"""Every metric that a worker shows: name, kind, labels, meaning. `docs/monitoring.md` is checked against this."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["CATALOGUE", "Metric"]


class Metric(NamedTuple):
    """One metric family."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "counter", labels, help)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "gauge", labels, help)


def _histogram(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "histogram", labels, help)


_TASK = ("name", "hostname", "queue_name")

#: Names and labels of the Celery exporters, so that their dashboards show something.
_CELERY = (
    _counter(
        "celery_task_sent_total",
        "Calls, counted when their first attempt has ended: a worker cannot see what still waits.",
        *_TASK,
    ),
    _counter(
        "celery_task_received_total",
        "Messages that the worker took from the queue, retries and redeliveries included.",
        *_TASK,
    ),
    _counter("celery_task_started_total", "Runs, counted when they have ended.", *_TASK),
    _counter("celery_task_succeeded_total", "Runs that returned, or raised Ignore.", *_TASK),
    _counter("celery_task_failed_total", "Calls that failed for good.", *_TASK, "exception"),
    _counter("celery_task_rejected_total", "Calls that raised Reject.", *_TASK),
    _counter("celery_task_revoked_total", "Calls that were revoked or had expired.", *_TASK),
    _counter("celery_task_retried_total", "Runs that asked to run again.", *_TASK),
    _histogram("celery_task_runtime", "Seconds that a run took.", *_TASK),
    _histogram(
        "celery_task_queue_wait_time",
        "Seconds from being published, or due when that was later, to the start of a run. "
        "Milliseconds are resolved; clocks of two hosts are compared. Only of messages that amqptasks"
        " published.",
        *_TASK,
    ),
    _gauge("celery_worker_up", "1 while the worker answers.", "hostname"),
    _gauge("celery_worker_tasks_active", "Tasks that run now.", "hostname"),
    _gauge("celery_queue_length", "Messages that wait in the broker.", "queue_name"),
    _gauge("celery_active_consumer_count", "Consumers of this worker: 1, or 0 while it has none.", "queue_name"),
    _gauge("celery_active_worker_count", "1 for each queue that this worker serves.", "queue_name"),
    _gauge("celery_active_process_count", "Executor processes of this worker.", "queue_name"),
)
#: Of this worker, by queue.
_LEADER = (
    _counter(
        "amqptasks_outcomes_total",
        "Deliveries by what became of them; reason is that of a failure.",
        "queue",
        "task",
        "outcome",
        "reason",
    ),
    _counter("amqptasks_dead_letters_total", "Messages that went to the queue's DLQ.", "queue", "reason"),
    _counter("amqptasks_redeliveries_total", "Messages that the broker delivered again.", "queue"),
    _counter(
        "amqptasks_publishes_total",
        "Verdicts of the broker on what the worker published: confirmed, returned, nacked. A message "
        "that is tried again counts again.",
        "queue",
        "result",
    ),
    _histogram(
        "amqptasks_publish_seconds",
        "Seconds from a message being handed to the connection to its confirm, waiting for a connection included.",
        "queue",
    ),
    _counter("amqptasks_reconnects_total", "Connections that came back; role is consume or publish.", "queue", "role"),
    _counter("amqptasks_leader_restarts_total", "Leaders that died and were replaced.", "queue"),
    _counter("amqptasks_executor_restarts_total", "Executors that were replaced, by cause.", "queue", "cause"),
    _gauge("amqptasks_connected", "1 while the connection that consumes is open.", "queue"),
    _gauge(
        "amqptasks_consuming",
        "1 while the broker has this worker's consumer, or it pauses because every executor is busy.",
        "queue",
    ),
    _gauge("amqptasks_publish_blocked", "1 while the broker takes no messages (an alarm of memory or disk).", "queue"),
    _gauge("amqptasks_prefetch", "Messages that the worker may hold.", "queue"),
    _gauge("amqptasks_concurrency", "Tasks that may run at once.", "queue"),
    _gauge("amqptasks_tasks_running", "Tasks that run now.", "queue"),
    _gauge("amqptasks_tasks_waiting", "Messages that the worker holds and has not started.", "queue"),
    _gauge(
        "amqptasks_leader_answer_age_seconds",
        "Seconds since the leader answered last; it is asked every second.",
        "queue",
    ),
    _gauge(
        "amqptasks_resident_bytes",
        "Resident memory by role, memory shared between processes counted in each.",
        "role",
        "queue",
    ),
)
#: Of the broker, when `broker.management_url` is set.
_BROKER = (
    _gauge("amqptasks_queue_ready", "Messages that wait in the broker.", "queue"),
    _gauge("amqptasks_queue_unacknowledged", "Messages that consumers hold, of any worker.", "queue"),
    _gauge(
        "amqptasks_queue_oldest_age_seconds",
        "How old the oldest message that waits is at most: seconds since the queue was seen empty, or"
        " since the message that this worker received last was published, whichever is less.",
        "queue",
    ),
    _gauge("amqptasks_dlq_messages", "Messages in the queue's DLQ.", "queue"),
    _gauge("amqptasks_delayed_messages", "Messages that wait for their time in the delay ladder."),
    _gauge("amqptasks_unroutable_messages", "Messages that no queue would take, kept in a queue of their own."),
    _gauge(
        "amqptasks_broker_poll_age_seconds",
        "Seconds since the management API answered last; the values above are as old.",
    ),
    _gauge("amqptasks_broker_poll_ok", "1 when the last request to the management API succeeded."),
)
#: Of the process.
_WORKER = (
    _gauge("amqptasks_build_info", "1; the versions are in the labels.", "version", "python"),
    _gauge("amqptasks_start_time_seconds", "When the worker started, in seconds since the epoch."),
    _gauge("amqptasks_ready", "1 when /readyz says 200."),
    _gauge("amqptasks_beat_connected", "1 while the beat of this process or worker leads or stands by."),
    _gauge("amqptasks_beat_leads", "1 while that beat is the one that publishes."),
    _gauge(
        "amqptasks_beat_last_tick_seconds",
        "When that beat published a periodic call last, in seconds since the epoch.",
    ),
    _gauge(
        "amqptasks_beat_next_due_seconds",
        "When that beat, if it leads, is to publish the next one, in seconds since the epoch; late when past.",
    ),
)

CATALOGUE: dict[str, Metric] = {one.name: one for one in (*_CELERY, *_LEADER, *_BROKER, *_WORKER)}

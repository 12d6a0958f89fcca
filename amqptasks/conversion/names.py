"""Names of Celery's settings, as Celery 5.7 has them, and what is said of those that are not taken over."""

from __future__ import annotations

__all__ = ["ALREADY_SO", "current_name", "is_lost"]

#: What another part of the conversion writes.
_WRITTEN = """
accept_content beat_schedule broker_connection_max_retries broker_connection_retry_on_startup
broker_connection_timeout broker_heartbeat broker_transport_options broker_url broker_use_ssl imports include
result_backend result_expires
task_always_eager task_annotations task_compression task_default_priority task_default_queue task_default_rate_limit
task_eager_propagates task_ignore_result task_publish_retry task_publish_retry_policy task_queue_max_priority
task_queues task_routes task_send_sent_event task_serializer task_soft_time_limit task_store_eager_result
task_time_limit task_track_started timezone worker_concurrency worker_disable_rate_limits
worker_enable_remote_control worker_max_memory_per_child worker_max_tasks_per_child worker_pool
worker_send_task_events worker_soft_shutdown_timeout
"""

_LATE = "always so: a task is acknowledged after its outcome is durable"
_FAILED = "a task that fails for good is always kept, in <queue>.dlq"
_IN_BROKER = "what was sent is kept in the broker; any number of schedulers may run"
_RECONNECTS = "always so: lost connections come back, over all nodes of broker.url"
_CHORDS = "chords meet in a queue of the broker, and poll nothing"
#: These need no setting here.
ALREADY_SO = {
    "task_acks_late": _LATE,
    "task_reject_on_worker_lost": "always so; after worker.poison_limit executors the message is a dead letter",
    "task_acks_on_failure_or_timeout": _FAILED,
    "task_acks_on_failure": _FAILED,
    "task_acks_on_timeout": _FAILED,
    "task_store_errors_even_if_ignored": _FAILED,
    "task_default_delivery_mode": "always persistent",
    "task_create_missing_queues": "queues are declared here; those that routes and the schedule name were added",
    "task_default_queue_type": "quorum unless a queue says otherwise",
    "task_create_missing_queue_type": "quorum unless a queue says otherwise",
    "task_protocol": "always 2",
    "task_remote_tracebacks": "always so: AsyncResult.traceback",
    "enable_utc": "times are always sent in UTC; `timezone` is for schedules",
    "worker_detect_quorum_queues": "not needed: no global QoS is used",
    "broker_native_delayed_delivery_queue_type": "delays wait in the broker's own ladder, of quorum queues",
    "worker_deduplicate_successful_tasks": "so by default where a result store is; tasks: deduplicate",
    "worker_state_db": "revokes are kept in the broker",
    "worker_prefetch_multiplier": "prefetch: auto follows the run time; worker.prefetch fixes it, in messages",
    "worker_disable_prefetch": "prefetch: auto holds nothing back behind long tasks; worker.prefetch fixes it",
    "worker_enable_prefetch_count_reduction": "the prefetch is the old one after a reconnect",
    "worker_cancel_long_running_tasks_on_connection_loss": "running tasks go on, and are not run twice here",
    "worker_eta_task_limit": "delayed tasks wait in the broker, not in the worker",
    "beat_scheduler": _IN_BROKER,
    "beat_schedule_filename": _IN_BROKER,
    "beat_sync_every": _IN_BROKER,
    "beat_max_loop_interval": _IN_BROKER,
    "result_persistent": "always so",
    "result_chord_join_timeout": _CHORDS,
    "result_chord_retry_interval": _CHORDS,
    "broker_connection_retry": _RECONNECTS,
    "broker_channel_error_retry": _RECONNECTS,
    "broker_failover_strategy": _RECONNECTS,
    "broker_pool_limit": "a process has one connection to publish with",
    "broker_pool_acquire_timeout": "a process has one connection to publish with",
}

#: What else begins with one of these is a setting of Celery's that stays behind.
_SECTIONS = (
    *("task_", "worker_", "broker_", "result_", "beat_", "event_", "control_", "security_"),
    *("celery_", "celeryd_", "celerybeat_"),
    # of result stores
    *("redis_", "mongodb_", "cassandra_", "elasticsearch_", "couchbase_", "arangodb_"),
    *("s3_", "azureblockblob_", "gcs_", "cosmosdbsql_", "dynamodb_"),
    # the same, not taking Django's DATABASE_ROUTERS and CACHE_MIDDLEWARE_… for Celery's
    *("cache_backend", "database_create_tables", "database_engine", "database_short", "database_table", "database_url"),
)

_TAKEN = frozenset(_WRITTEN.split()) | ALREADY_SO.keys()
#: Names of Celery 3, in lower case, that no rule below finds.
_OLD = {
    "celery_always_eager": "task_always_eager",
    "celery_eager_propagates_exceptions": "task_eager_propagates",
    "celery_message_compression": "task_compression",
    "celery_task_result_expires": "result_expires",
    "celery_send_events": "worker_send_task_events",
    "celery_send_task_sent_event": "task_send_sent_event",
    "celery_task_publish_retry": "task_publish_retry",
    "celery_task_publish_retry_policy": "task_publish_retry_policy",
    "celery_backend": "result_backend",
}
#: Their prefixes, and what they are now.
_PREFIXES = (
    ("celeryd_task_", "task_"),
    ("celeryd_", "worker_"),
    ("celerybeat_", "beat_"),
    ("celery_", ""),
    ("celery_", "task_"),
    ("celery_", "worker_"),
    ("celery_", "result_"),
    ("celery_", "event_"),
)


def current_name(name: str) -> str | None:
    """The name that Celery has for a setting today; None for what is no setting of Celery's.

    Names of Celery 3 (``CELERYD_CONCURRENCY``) and those of a Django project (``CELERY_TASK_ROUTES``) are understood.
    """
    lower = name.lower()
    if lower in _TAKEN:
        return lower
    if lower in _OLD:
        return _OLD[lower]
    for old, new in _PREFIXES:
        if lower.startswith(old) and (found := new + lower.removeprefix(old)) in _TAKEN:
            return found
    return lower if lower.startswith(_SECTIONS) else None


def is_lost(key: str) -> bool:
    """Whether a setting, by its name of today, has no counterpart."""
    return key not in _TAKEN

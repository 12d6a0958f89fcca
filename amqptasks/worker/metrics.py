"""The page /metrics: the boards' counts, the leaders' last answers and the broker's queues, in Prometheus's words."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from amqptasks import __version__
from amqptasks.config import Settings
from amqptasks.outcome import Reason
from amqptasks.worker.board import Counts
from amqptasks.worker.catalogue import CATALOGUE
from amqptasks.worker.depths import Depths
from amqptasks.worker.health import READY_SECONDS, Snapshot
from amqptasks.worker.tally import BUCKETS

__all__ = ["CONTENT_TYPE_LATEST", "Exposition", "Samples", "resident_bytes"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_BOUNDS = [*(str(bound) for bound in BUCKETS), "+Inf"]
_REVOKED = (Reason.REVOKED, Reason.EXPIRED)
_MAKERS: dict[str, Callable[..., Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class Samples:
    """One exposition: families by name, each with its samples."""

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}
        #: Samples of which several add up to one.
        self._sums: dict[tuple[str, tuple[str, ...]], float] = {}

    def _family(self, name: str) -> Any:
        family = self._families.get(name)
        if family is None:
            _, kind, labels, text = CATALOGUE[name]
            family = self._families[name] = _MAKERS[kind](name, text, labels=labels)
        return family

    def put(self, name: str, value: float, *labels: str) -> None:
        """A sample; of several with the same labels the sum."""
        key = (name, labels)
        self._sums[key] = self._sums.get(key, 0.0) + value

    def histogram(self, name: str, values: list[float], *labels: str) -> None:
        """Counts of each bucket, then the sum."""
        buckets = list(zip(_BOUNDS, accumulate(values[:-1]), strict=True))
        self._family(name).add_metric(labels, buckets, values[-1])

    def collect(self) -> Iterable[Family]:
        """As a registry."""
        for (name, labels), value in self._sums.items():
            self._family(name).add_metric(labels, value)
        self._sums.clear()
        return [self._families[name] for name in CATALOGUE if name in self._families]

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self)  # it wants something that collects

    def beat(self, *, connected: bool, leads: bool, tick: float | None, due: float | None) -> None:
        """The samples of a scheduler. `tick`, `due`: of the last and the next call, in seconds since the epoch."""
        self.put("amqptasks_beat_connected", connected)
        self.put("amqptasks_beat_leads", leads)
        if tick is not None:
            self.put("amqptasks_beat_last_tick_seconds", tick)
        if due is not None:
            self.put("amqptasks_beat_next_due_seconds", due)


class Exposition:
    """Writes the page."""

    def __init__(self, settings: Settings, hostname: str, started: float, depths: Depths | None) -> None:
        self._hostname = hostname
        self._started = started
        self._depths = depths
        self._lettered = {name for name, queue in settings.queues.items() if queue.dead_letter.enabled}

    def page(self, counts: Mapping[str, Counts], known: Snapshot, *, ready: bool) -> bytes:
        """The text. `counts` are the boards' sums by queue."""
        page = Samples()
        page.put("celery_worker_up", 1, self._hostname)
        page.put("amqptasks_build_info", 1, __version__, platform.python_version())
        page.put("amqptasks_start_time_seconds", self._started)
        page.put("amqptasks_ready", ready)
        for queue, table in counts.items():
            for key, values in table.items():
                self._count(page, queue, key, values)
        for queue in known.queues:
            self._state(page, queue, known)
        self._memory(page, known)
        self._beat(page, known.worker.get("helpers", {}).get("beat"))
        if self._depths is not None:
            newest = {queue: state.get("newest") for queue, (_, state) in known.queues.items()}
            for name, value, labels in self._depths.samples(newest):
                page.put(name, value, *labels)
        return page.text()

    def _count(self, page: Samples, queue: str, key: tuple[str, ...], values: list[float]) -> None:
        task = (key[1] if len(key) > 1 else "", self._hostname, queue)
        match key:
            case ("outcome", name, word, reason, exception):
                page.put("amqptasks_outcomes_total", values[0], queue, name, word, reason)
                self._outcome(page, queue, word, reason, exception, task, values[0])
            case ("received" | "sent" as word, _):
                page.put(f"celery_task_{word}_total", values[0], *task)
            case ("killed", _):
                page.put("celery_task_started_total", values[0], *task)
            case ("redelivered",):
                page.put("amqptasks_redeliveries_total", values[0], queue)
            case ("runtime", _):
                page.histogram("celery_task_runtime", values, *task)
                page.put("celery_task_started_total", sum(values[:-1]), *task)
            case ("wait", _):
                page.histogram("celery_task_queue_wait_time", values, *task)
            case ("publish", result):
                page.put("amqptasks_publishes_total", values[0], queue, result)
            case ("publish_seconds",):
                page.histogram("amqptasks_publish_seconds", values, queue)
            case ("reconnect", role):
                page.put("amqptasks_reconnects_total", values[0], queue, role)
            case ("restarts", cause):
                page.put("amqptasks_executor_restarts_total", values[0], queue, cause)

    def _outcome(
        self,
        page: Samples,
        queue: str,
        word: str,
        reason: str,
        exception: str,
        task: tuple[str, str, str],
        count: float,
    ) -> None:
        if word == "failed":
            if queue in self._lettered:
                page.put("amqptasks_dead_letters_total", count, queue, reason)
            if reason == Reason.REJECTED:
                page.put("celery_task_rejected_total", count, *task)
            elif reason in _REVOKED:
                page.put("celery_task_revoked_total", count, *task)
            else:
                page.put("celery_task_failed_total", count, *task, exception)
        elif word in ("succeeded", "ignored"):
            page.put("celery_task_succeeded_total", count, *task)
        elif word == "retried":
            page.put("celery_task_retried_total", count, *task)

    def _state(self, page: Samples, queue: str, known: Snapshot) -> None:
        heard, state = known.queues[queue]
        page.put("amqptasks_leader_restarts_total", known.worker["groups"].get(queue, {}).get("restarts", 0), queue)
        page.put("amqptasks_leader_answer_age_seconds", time.monotonic() - heard, queue)
        page.put("celery_active_worker_count", 1, queue)
        consuming = bool(state) and (state["consuming"] or state["paused"])
        page.put("amqptasks_consuming", consuming, queue)
        page.put("amqptasks_connected", bool(state) and state["connected"], queue)
        page.put("celery_active_consumer_count", consuming, queue)
        if not state:
            return
        page.put("celery_worker_tasks_active", state["running"], self._hostname)
        page.put("celery_active_process_count", len(state["executors"]), queue)
        page.put("amqptasks_publish_blocked", state["blocked"], queue)
        page.put("amqptasks_prefetch", state["prefetch"], queue)
        page.put("amqptasks_concurrency", state["concurrency"], queue)
        page.put("amqptasks_tasks_running", state["running"], queue)
        page.put("amqptasks_tasks_waiting", state["waiting"], queue)

    def _beat(self, page: Samples, beat: Mapping[str, Any] | None) -> None:
        if beat is None:
            return
        pulse = beat["pulse"] if beat["pid"] and beat["pulse"]["age"] < READY_SECONDS else {}
        page.beat(
            connected=bool(pulse.get("connected")),
            leads=bool(pulse.get("leads")),
            tick=pulse.get("last_tick"),
            due=pulse.get("next_due"),
        )

    def _memory(self, page: Samples, known: Snapshot) -> None:
        page.put("amqptasks_resident_bytes", resident_bytes(os.getpid()), "desk", "")
        page.put("amqptasks_resident_bytes", resident_bytes(os.getppid()), "supervisor", "")
        for queue, (_, state) in known.queues.items():
            leader = known.worker["groups"].get(queue, {}).get("pid") or 0
            page.put("amqptasks_resident_bytes", resident_bytes(leader), "leader", queue)
            page.put(
                "amqptasks_resident_bytes", sum(map(resident_bytes, state.get("executors", ()))), "executor", queue
            )


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 for a process that is gone (proc(5), statm)."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return 0

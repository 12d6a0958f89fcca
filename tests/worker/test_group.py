"""How many tasks run at once when nobody says."""

from __future__ import annotations

import os

import pytest

from amqptasks.config import Settings
from amqptasks.errors import ConfigError
from amqptasks.worker import group
from amqptasks.worker.group import Recycling, plan_groups, usable_cores


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000 100000", 1), ("50000 100000", 1), ("900000000 100000", None), ("max 100000", None)]
)
def test_a_containers_quota_cuts_the_cores(tmp_path, quota, expected):
    file = tmp_path / "cpu.max"
    file.write_text(quota + "\n")
    assert usable_cores(file) == (expected or len(os.sched_getaffinity(0)))


def test_without_a_container_the_affinity_counts(tmp_path):
    assert usable_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


def plan(queue: dict[str, object], worker: dict[str, object] | None = None, **flags):
    settings = Settings.model_validate({"queues": {"default": queue}, "worker": worker or {}})
    return plan_groups(settings, ["default"], **flags)[0]


@pytest.mark.parametrize(
    ("queue", "flags", "shape"),
    [
        ({"pool": "threads", "concurrency": 10, "processes": 3}, {}, ("thread", 3, 10)),
        ({"pool": "prefork", "concurrency": 3}, {}, ("process", 3, 3)),
        ({"pool": "asyncio"}, {}, ("asyncio", 1, 100)),
        ({"pool": "gevent", "processes": 2}, {}, ("gevent", 2, 100)),
        ({"pool": "asyncio", "concurrency": 5}, {"pool": "solo"}, ("solo", 1, 1)),
        ({"concurrency": 5}, {"concurrency": 7}, ("process", 7, 7)),
        ({"autoscale": {"max": 8, "min": 2}, "concurrency": 5}, {}, ("process", 2, 2)),
        ({"pool": "thread"}, {"autoscale": (50, 10)}, ("thread", 1, 10)),
    ],
)
def test_pools_by_their_names_and_sizes(queue, flags, shape):
    made = plan(queue, **flags)
    assert (made.pool, made.processes, made.concurrency) == shape


def test_flags_win_over_the_queue_and_that_over_the_worker():
    worker = {"max_tasks_per_child": 1000, "max_memory_per_child": "1GB", "max_memory_per_child_hard": "2GB"}
    flags = Recycling(tasks=10)
    made = plan({"max_memory_per_child": "300MB"}, worker, recycling=flags).recycling
    assert (made.tasks, made.memory, made.memory_hard) == (10, 300_000_000, 2_000_000_000)


@pytest.mark.parametrize(
    ("queue", "flags", "message"),
    [
        ({"pool": "eventlet"}, {}, "use asyncio or gevent"),
        ({}, {"pool": "swimming"}, "'swimming' is not known; use process, thread"),
        ({"pool": "solo"}, {"autoscale": (3, 1)}, "pool solo runs one task"),
        ({"pool": "asyncio"}, {"concurrency": 10_000}, "give it more `processes`"),
    ],
)
def test_what_cannot_be_is_refused(queue, flags, message):
    with pytest.raises(ConfigError, match=message):
        plan(queue, **flags)


def test_gevent_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(group, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install 'amqptasks\[gevent\]'"):
        plan({"pool": "gevent"})

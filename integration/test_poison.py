"""Tasks that end their process each time: bounded attempts wherever they run, and nobody else pays for it."""

from __future__ import annotations

import secrets
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from amqptasks.errors import WorkerLost
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench

pytestmark = pytest.mark.fault

LIMIT = 3
KINDS = pytest.mark.parametrize("queue", [{}, {"max_priority": 5}], ids=["quorum", "classic"])


def poisoned(bench: Bench, ids: set[str]) -> dict[str, dict[str, Any]]:
    """The headers of the dead letters, of which all are poison, and no others."""
    letters = [one["properties"] for one in bench.vhost.dead_letters("default", len(ids), timeout=60)]
    found = {one["correlation_id"]: one["headers"] for one in letters}
    assert found.keys() == ids
    assert {headers["x-task-reason"] for headers in found.values()} == {"poison"}
    return found


@KINDS
@pytest.mark.timeout(120)
def test_poison_has_its_attempts_over_all_workers_together_and_costs_no_healthy_task(
    bench: Bench, queue: dict[str, Any]
) -> None:
    """Two workers, a hundred healthy tasks, and among them some that end in a segmentation fault and the like."""
    bench.settings["queues"] = {"default": queue}
    app = bench.client()
    workers = [bench.worker("default", "-c", "2") for _ in range(2)]
    ends = {signal.SIGSEGV: "SIGSEGV", signal.SIGKILL: "SIGKILL", signal.SIGABRT: "SIGABRT"}
    poison: dict[str, str] = {}
    healthy: set[str] = set()
    for number, name in ends.items():
        healthy |= {bench.send(app, "note", 0.05) for _ in range(25)}
        poison[bench.send(app, "kills_itself", 1_000_000, int(number))] = name
    healthy |= {bench.send(app, "note", 0.05) for _ in range(25)}
    letters = poisoned(bench, set(poison))
    for task_id, name in poison.items():
        message = letters[task_id]["x-task-exception-message"]
        assert f"was killed by {name}; the task has cost {LIMIT} executors" in message
    tries = bench.ledger.entries("try")
    assert Counter(entry.task_id for entry in tries) == dict.fromkeys(poison, LIMIT)
    bench.wait_done(healthy)
    bench.vhost.wait_settled("default")
    assert Counter(entry.task_id for entry in bench.ledger.entries("begin")) == dict.fromkeys(healthy, 1)
    assert [one.stop() for one in workers] == [0, 0]


class MemoryGroup:
    """Processes that share so much memory: of those that want more the kernel kills the largest (cgroups, 1 and 2)."""

    ROOT = Path("/sys/fs/cgroup")

    def __init__(self, limit: int) -> None:
        first = self.ROOT / "memory"
        self._folder = (first if first.is_dir() else self.ROOT) / f"amqptasks-{secrets.token_hex(4)}"
        self._folder.mkdir()
        names = {"memory.limit_in_bytes", "memory.max"} & {one.name for one in self._folder.iterdir()}
        try:
            (self._folder / names.pop()).write_text(str(limit))
        except (KeyError, OSError):
            self._folder.rmdir()
            raise

    def add(self, process: psutil.Process) -> None:
        """This process, and those that it starts from now on."""
        (self._folder / "cgroup.procs").write_text(str(process.pid))

    @property
    def killed(self) -> int:
        """How many processes the kernel has killed."""
        names = ("memory.oom_control", "memory.events")
        text = next(file for name in names if (file := self._folder / name).exists()).read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])

    def remove(self) -> None:
        """When none is left in it."""
        wait_until(lambda: not (self._folder / "cgroup.procs").read_text(), 10, "its processes have gone")
        self._folder.rmdir()


@pytest.fixture
def memory_group() -> Iterator[MemoryGroup]:
    try:
        group = MemoryGroup(400_000_000)
    except (KeyError, OSError) as error:
        pytest.skip(f"memory can only be limited where its control groups can be written to: {error!r}")
    yield group
    group.remove()


def test_a_task_that_the_kernel_kills_because_memory_is_out_is_poison(memory_group: MemoryGroup, bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "2")
    supervisor = psutil.Process(worker.process.pid)
    for one in [supervisor, *supervisor.children(recursive=True)]:
        memory_group.add(one)
    poison = app.send_task("integration.apps.jobs.swells")
    healthy = {bench.send(app, "note", 0.02) for _ in range(100)}
    letters = poisoned(bench, {poison.id})
    message = letters[poison.id]["x-task-exception-message"]
    assert f"was killed by SIGKILL; the task has cost {LIMIT} executors" in message
    assert memory_group.killed == LIMIT
    bench.wait_done(healthy)
    bench.vhost.wait_settled("default")
    assert Counter(entry.task_id for entry in bench.ledger.entries("begin")) == dict.fromkeys(healthy, 1)
    assert worker.stop() == 0


@KINDS
@pytest.mark.timeout(120)
def test_a_task_that_takes_all_memory_each_time_is_poison(bench: Bench, queue: dict[str, Any]) -> None:
    """Killed by the worker, whose limit is lower than the machine's."""
    bench.settings["queues"] = {"default": {**queue, "max_memory_per_child_hard": "300MB"}}
    app = bench.client()
    worker = bench.worker("default", "-c", "2")
    poison = app.send_task("integration.apps.jobs.swells")
    healthy = {bench.send(app, "note", 0.02) for _ in range(100)}
    letters = poisoned(bench, {poison.id})
    assert f"the task has cost {LIMIT} executors" in letters[poison.id]["x-task-exception-message"]
    assert len(bench.ledger.entries("try")) == LIMIT
    assert worker.log.count("it passed the hard limit of memory") == LIMIT
    with pytest.raises(WorkerLost):
        poison.get(timeout=10)
    bench.wait_done(healthy)
    bench.vhost.wait_settled("default")
    assert Counter(entry.task_id for entry in bench.ledger.entries("begin")) == dict.fromkeys(healthy, 1)
    assert worker.stop() == 0

#!/usr/bin/env python3
"""What a task costs a worker, in microseconds of processor time, and what for: by a sampling profiler (py-spy).

A worker with defaults and two executors drains no-op tasks from a quorum queue of a private node. The profiler looks at
the leader and at both executors while it does. A sample counts for the innermost of our functions on its stack that
stands in the table below; what the processes computed in all, and what the broker did, is the kernel's own account.

    python -m benchmarks.costs [--tasks 200000] [--seconds 5] [--rabbitmq 4.3] [--functions] [--docs]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.curves.measure import ROOT, Bench, computed
from benchmarks.curves.shapes import Shape
from benchmarks.race.environment import enter, environment_folder
from benchmarks.race.node import machine, private_node
from benchmarks.race.report import replace_block, table

__all__ = ["EXECUTOR", "LEADER", "Costs", "attribute", "stacks"]

#: What is done -> files, with functions where a file does several things. The first that fits counts.
Parts = Mapping[str, Sequence[str]]
LEADER: Parts = {
    "read frames, decode headers": ("broker/inflow.py", "broker/wire.py"),
    "look at it: expired, unknown, revoked, crashes": (
        "worker/intake.py",
        "worker/leader.py:_message",
        "worker/leader.py:_take",
        "worker/attendants.py",
        "worker/revoked.py",
        "worker/delivery.py",
        "broker/consumer.py:take",
    ),
    "hand over to executors": (
        "worker/wire.py:pack_jobs",
        "worker/dispatch.py:pump",
        "worker/dispatch.py:_send",
        "worker/dispatch.py:submit",
        "worker/handle.py:send",
    ),
    "take reports": ("worker/wire.py", "worker/dispatch.py:_report", "worker/dispatch.py:_read", "worker/handle.py"),
    "metrics": ("worker/tally.py", "worker/board.py"),
    "ack": ("broker/consumer.py:send_ack", "worker/settlement.py:_flush", "worker/settlement.py:flush"),
    "settle": ("worker/settlement.py", "worker/effects.py", "broker/acks.py"),
    "sockets and the loop": ("pika/", "broker/link.py", "worker/"),
}
EXECUTOR: Parts = {
    "log": ("observability/logs.py", "structlog/", "logging/"),
    "metrics and Sentry": ("observability/", "sentry_sdk/"),
    "decode": ("protocol/", "json/", "execution/job.py"),
    "validate": ("validation.py", "pydantic/", "task.py:validate", "calls.py"),
    "run": ("benchmarks/", "execution/runner.py:start"),
    "request": ("request.py", "execution/runner.py:build_request"),
    "take jobs, report": ("worker/wire.py", "worker/executor.py", "worker/cell.py"),
    "outcome": ("execution/", "events.py", "outcome.py", "signals.py"),
}
LEADER_ROLE, EXECUTOR_ROLE, BROKER_ROLE = "leader", "executors", "broker"
_REST = "the rest"
_FRAME = re.compile(r"^(?P<function>.*) \((?P<file>.*?)(?::\d+)?\)$")


def stacks(raw: str) -> list[tuple[list[tuple[str, str]], int]]:
    """py-spy's raw format: frames from the outermost in, as (file, function), and how many samples."""
    found = []
    for line in raw.splitlines():
        frames, _, many = line.rpartition(" ")
        matches = (_FRAME.match(frame) for frame in frames.split(";"))
        found.append(([(one["file"], one["function"]) for one in matches if one], int(many)))
    return found


def _fits(file: str, function: str, places: Iterable[str]) -> bool:
    for place in places:
        where, _, what = place.partition(":")
        if (where in file if where.endswith("/") else file.endswith(where)) and what in ("", function):
            return True
    return False


def attribute(found: Iterable[tuple[list[tuple[str, str]], int]], parts: Parts) -> Counter[str]:
    """Samples by what was done."""
    counted: Counter[str] = Counter()
    for frames, many in found:
        name = next(
            (
                name
                for file, function in reversed(frames)
                for name, places in parts.items()
                if _fits(file, function, places)
            ),
            _REST,
        )
        counted[name] += many
    return counted


class Costs:
    """Microseconds of processor time a task, in a process or several alike.

    Args:
        total: of all of them together.
        parts: by what was done, from most to least.
        functions: the innermost functions, ours or not.
    """

    def __init__(self, cpu: float, tasks: float, raw: Sequence[str], parts: Parts) -> None:
        self.total = cpu / tasks * 1e6
        found = [one for text in raw for one in stacks(text)]
        samples = sum(many for _frames, many in found)
        counted = attribute(found, parts)
        self.parts = {name: self.total * many / samples for name, many in counted.most_common()}
        inner: Counter[str] = Counter()
        for frames, many in found:
            if frames:
                inner["{1} ({0})".format(*frames[-1])] += many
        self.functions = {name: self.total * many / samples for name, many in inner.most_common(25)}


@dataclass(frozen=True)
class Profile:
    """Tasks a second under the profiler, and what is spent on each. `broker`: microseconds of its processor time."""

    rate: float
    leader: Costs
    executors: Costs
    broker: float


def _spy(process: psutil.Process, file: Path, seconds: float) -> subprocess.Popen[bytes]:
    command = [
        f"{sys.prefix}/bin/py-spy",
        "record",
        "--pid",
        str(process.pid),
        "--duration",
        f"{seconds:.0f}",
        "--rate",
        "250",
    ]
    quiet = subprocess.DEVNULL
    return subprocess.Popen([*command, "--format", "raw", "--function", "--output", file], stdout=quiet, stderr=quiet)


def profile(bench: Bench, broker: psutil.Process, folder: Path, tasks: int, seconds: float) -> Profile:
    """Let a worker drain tasks, and look at it for so many seconds."""
    with bench.drain(Shape("profile", tasks=tasks)) as drain:
        time.sleep(1)  # the first second is not like the others: prefetch and credit follow the run time
        roles = {LEADER_ROLE: drain.worker.leaders(), EXECUTOR_ROLE: drain.worker.executors()}
        files = {role: [folder / f"{one.pid}.raw" for one in found] for role, found in roles.items()}
        spies = [_spy(one, file, seconds) for role in roles for one, file in zip(roles[role], files[role], strict=True)]
        time.sleep(0.5)
        everybody = {**roles, BROKER_ROLE: [broker]}
        began, ran = time.monotonic(), drain.ran()
        before = {role: computed(found) for role, found in everybody.items()}
        time.sleep(seconds - 1)
        passed, ran = time.monotonic() - began, drain.ran() - ran
        cpu = {role: computed(found) - before[role] for role, found in everybody.items()}
        if any(spy.wait(60) for spy in spies):
            raise RuntimeError("py-spy failed: may this user trace processes (ptrace)?")
    if ran >= tasks:
        raise RuntimeError("the queue ran empty: more --tasks, or fewer --seconds")
    costs = {
        role: Costs(cpu[role], ran, [file.read_text() for file in files[role]], parts)
        for role, parts in ((LEADER_ROLE, LEADER), (EXECUTOR_ROLE, EXECUTOR))
    }
    return Profile(ran / passed, costs[LEADER_ROLE], costs[EXECUTOR_ROLE], cpu[BROKER_ROLE] / ran * 1e6)


def markdown(found: Profile) -> str:
    """A table: leader, executors, broker."""
    rows = []
    for role, costs in ((LEADER_ROLE, found.leader), (EXECUTOR_ROLE, found.executors)):
        rows.append([f"**{role}**", f"**{costs.total:.1f}**"])
        rows += [[name, f"{cost:.1f}"] for name, cost in costs.parts.items()]
    rows.append([f"**{BROKER_ROLE}**", f"**{found.broker:.1f}**"])
    return table(["", "µs a task"], rows)


def main() -> None:
    """Parse flags, go into the environment that has the profiler, look, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rabbitmq", help="version: 4.0 or 4.3 from a tree of its own; by default the installed one")
    parser.add_argument("--functions", action="store_true", help="the innermost functions, too")
    parser.add_argument("--env", metavar="DIR", help="where the race's environment is (default: in the user's cache)")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    enter(environment_folder(options.env), "benchmarks.costs")
    with private_node(options.rabbitmq) as node, tempfile.TemporaryDirectory(prefix="costs-") as folder:
        here = machine(node.url, options.rabbitmq)
        bench, broker = Bench(node.url, Path(folder)), psutil.Process(node.pid)
        found = profile(bench, broker, Path(folder), options.tasks, options.seconds)
    text = f"{here}; {found.rate:,.0f} tasks/s under the profiler.\n\n{markdown(found)}"
    print(text)
    if options.functions:
        for role, costs in ((LEADER_ROLE, found.leader), (EXECUTOR_ROLE, found.executors)):
            print(f"\n{role}: innermost functions")
            for name, cost in costs.functions.items():
                print(f"{cost:8.2f} µs  {name}")
    if options.docs:
        replace_block(ROOT / "docs" / "performance.md", f"costs {here.series}", text)


if __name__ == "__main__":
    main()

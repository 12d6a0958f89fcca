"""A password that was given on the command line is not what everybody on the machine reads there."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench

SECRET = "secret-word"  # of `restricted_user`


def command_lines(session: int) -> dict[int, str]:
    """What `ps` shows of each process of a session."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == session:
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # it has just ended
    return found


@contextmanager
def watched(session: int) -> Iterator[dict[int, set[str]]]:
    """All that is seen meanwhile, process by process."""
    seen: dict[int, set[str]] = {}
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.005):
            for pid, line in command_lines(session).items():
                seen.setdefault(pid, set()).add(line)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        stop.set()
        watcher.join()


@pytest.mark.timeout(120)
def test_no_process_of_a_worker_shows_the_password_of_its_command_line(
    bench: Bench, restricted_user: Callable[[str, str, str], str]
) -> None:
    """Supervisor, desk, leaders, executors, beat; those that are executed anew (gevent's, SIGHUP's) at no moment."""
    bench.settings["queues"] = {"default": {"concurrency": 1}, "email": {"pool": "gevent"}}
    url = restricted_user(".*", ".*", ".*")
    app = bench.client()
    worker = bench.worker("default,email", "-B", "--max-tasks-per-child", "5", url=url)

    def work() -> None:
        bench.wait_done({bench.send(app, "note", queue=queue) for queue in ("default", "email") for _ in range(12)})

    with watched(worker.process.pid) as seen:
        work()
        worker.process.send_signal(signal.SIGHUP)
        wait_until(lambda: worker.log.count(" ready.") == 2, 60, lambda: f"ready again\n{worker.log[-3000:]}")
        work()
    everything = [line for lines in seen.values() for line in lines]
    print(f"{len(seen)} processes, {len(everything)} command lines")
    assert len(seen) > 10
    assert any("gevent" in line for line in everything)
    assert [line for line in everything if SECRET in line] == []
    masked = url.replace(SECRET, "*" * len(SECRET))
    assert all(masked in line for line in everything if line.strip())
    assert worker.stop() == 0
    assert SECRET not in worker.log

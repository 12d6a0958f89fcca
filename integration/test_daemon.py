"""A worker as service managers run it: detached, watched, asked where it stands, stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from amqptasks.testing.ledger import PATH_VARIABLE
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from integration.conftest import ROOT, Bench

APP = "integration.apps.jobs:app"


def command(bench: Bench, *flags: str) -> list[str]:
    return [sys.executable, "-m", "amqptasks", "-A", APP, "--config", str(bench.config), "worker", *flags]


def environment(bench: Bench, **more: str) -> dict[str, str]:
    return {**os.environ, PATH_VARIABLE: str(bench.ledger.path), "PYTHONPATH": str(ROOT), **more}


@contextmanager
def killed_at_last(pidfile: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if pidfile.exists():
            os.kill(int(pidfile.read_text()), signal.SIGKILL)


def test_a_forking_unit_with_detach_pidfile_and_logfile_works_as_written(bench: Bench) -> None:
    """What systemd does with `Type=forking`: run the command, wait for its end, read the pid file, stop it."""
    pidfile, logfile = bench.folder / "run" / "worker.pid", bench.folder / "log" / "worker.log"
    pidfile.parent.mkdir()
    logfile.parent.mkdir()
    # The word of the documents' unit, and --detach.
    flags = ["--loglevel=info", f"--pidfile={pidfile}", f"--logfile={logfile}", "--detach"]
    with killed_at_last(pidfile):
        starter = subprocess.run(
            command(bench, *flags), env=environment(bench), check=False, capture_output=True, text=True, timeout=30
        )
        assert starter.returncode == 0, starter.stderr
        assert "amqptasks" in starter.stderr, "the banner is for who starts it"
        pid = int(pidfile.read_text())
        assert os.getsid(pid) not in (pid, os.getsid(0)), "a session without a terminal"
        wait_until(lambda: " ready." in logfile.read_text(), 20, logfile.read_text)
        app = bench.client()
        task_id = bench.send(app, "note", 1.0)
        bench.wait_done({task_id}, event="begin")
        os.kill(pid, signal.SIGHUP)
        wait_until(lambda: logfile.read_text().count(" ready.") == 2, 30, logfile.read_text)
        assert int(pidfile.read_text()) == pid, "the new code runs in the same process"
        second = subprocess.run(
            command(bench, *flags), env=environment(bench), check=False, capture_output=True, text=True, timeout=30
        )
        assert second.returncode == 1
        assert f"process {pid} runs with it" in second.stderr
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not psutil.pid_exists(pid), 20, "it has stopped")
    assert not pidfile.exists()
    assert task_id in bench.ledger.ids()
    assert "Stopped exit_code=0" in logfile.read_text()
    assert "\x1b[" not in logfile.read_text()


def test_without_detach_the_same_flags_stay_in_the_foreground(bench: Bench) -> None:
    pidfile, logfile = bench.folder / "w.pid", bench.folder / "%n.log"
    worker = bench.worker(
        "default", f"--pidfile={pidfile}", f"--logfile={logfile}", "-n", "w1@%h", "--loglevel=INFO", ready=False
    )
    log = bench.folder / "w1.log"
    wait_until(lambda: log.exists() and " ready." in log.read_text(), 20, lambda: worker.log)
    assert int(pidfile.read_text()) == worker.process.pid
    assert worker.stop() == 0
    assert not pidfile.exists()
    assert " ready." not in worker.log


@pytest.mark.parametrize("wrong", ["queue", "pidfile"])
def test_a_detached_start_that_is_wrong_ends_with_its_code_and_tells_why(bench: Bench, wrong: str) -> None:
    flags = ["--detach", f"--pidfile={bench.folder}/missing/w.pid"] if wrong == "pidfile" else ["--detach", "-Q", "no"]
    done = subprocess.run(
        command(bench, *flags), env=environment(bench), check=False, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert ("queue 'no' is not declared" if wrong == "queue" else "No such file or directory") in done.stderr
    assert "Traceback" not in done.stderr


def test_systemd_is_told_ready_alive_reloading_and_stopping(bench: Bench, tmp_path: Path) -> None:
    address = tmp_path / "notify"
    got: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.setblocking(False)

        def hear() -> list[str]:
            while True:
                try:
                    got.append(manager.recv(4096).decode())
                except BlockingIOError:
                    return got

        def count(what: str) -> int:
            return sum(what in one.split("\n") for one in hear())

        more = environment(bench, NOTIFY_SOCKET=str(address), WATCHDOG_USEC="400000")
        with WorkerProcess(APP, "default", config=bench.config, log=bench.folder / "w.log", environment=more) as worker:
            wait_until(lambda: count("READY=1"), 20, lambda: worker.log)
            assert " ready." in worker.log
            ready = next(one for one in got if one.startswith("READY=1"))
            assert f"MAINPID={worker.process.pid}" in ready.split("\n")
            before = count("WATCHDOG=1")
            wait_until(lambda: count("WATCHDOG=1") >= before + 4, 10, "a sign of life each 0.2 s")
            worker.process.send_signal(signal.SIGHUP)
            wait_until(lambda: count("READY=1") == 2, 30, lambda: f"{got}\n{worker.log}")
            order = [one.split("\n")[0] for one in got if "WATCHDOG" not in one]
            assert order.index("RELOADING=1") < len(order) - 1 - order[::-1].index("READY=1")
            gate = bench.folder / "gate"
            slow = bench.send(bench.client(), "waits_for", str(gate))
            bench.wait_done({slow}, event="begin")
            worker.process.send_signal(signal.SIGTERM)
            wait_until(lambda: count("STOPPING=1"), 10, lambda: worker.log)
            before = count("WATCHDOG=1")
            wait_until(lambda: count("WATCHDOG=1") > before, 10, "it lives while it drains")
            gate.touch()
            assert worker.wait() == 0


def test_usr1_writes_where_every_process_stands_and_harms_none(bench: Bench) -> None:
    worker = bench.worker("default", "-c", "2")
    app = bench.client()
    held = bench.send(app, "occupies", "gil", 3.0)
    bench.wait_done({held}, event="begin")
    family = {one.pid for one in worker.leaders() + worker.executors()}
    worker.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: worker.log.count("most recent call first") >= 5, 10, lambda: worker.log)
    wait_until(lambda: "in occupies" in worker.log, 5, "also while C code holds the lock")
    for name in ("supervisor.py", "executor.py", "executor of default"):
        assert name in worker.log
    bench.wait_done({held})
    assert {one.pid for one in worker.leaders() + worker.executors()} == family
    os.kill(worker.executors()[0].pid, signal.SIGUSR1)
    others = {bench.send(app, "note") for _ in range(10)}
    bench.wait_done(others)
    assert worker.stop() == 0


def test_what_the_grace_period_leaves_is_given_back_by_id_and_the_exit_code_is_0(bench: Bench) -> None:
    bench.settings["logging"] = {"format": "json"}
    app = bench.client()
    worker = bench.worker("default", "-c", "2", "--grace-period", "1")
    ids = {bench.send(app, "note", 30.0) for _ in range(2)}
    bench.wait_done(ids, event="begin")
    started = time.monotonic()
    os.killpg(worker.process.pid, signal.SIGTERM)
    assert worker.wait() == 0
    assert time.monotonic() - started < 20
    records = [json.loads(line) for line in worker.log.splitlines() if line.startswith("{")]
    assert {one["task_id"] for one in records if "goes back to its queue: not finished" in one["event"]} == ids
    wait_until(lambda: bench.vhost.ready("default") == 2, 5, "both are back")
    assert bench.vhost.management.messages("default.dlq") == []


@pytest.mark.parametrize(("heartbeat", "seconds"), [(2, 10.0), pytest.param(10, 25.0, marks=pytest.mark.slow)])
def test_heartbeats_go_on_while_a_worker_drains(bench: Bench, heartbeat: int, seconds: float) -> None:
    """The broker drops a connection from which it heard nothing for two heartbeats."""
    bench.settings["broker"]["heartbeat"] = heartbeat
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    task_id = bench.send(app, "note", seconds)
    bench.wait_done({task_id}, event="begin")
    assert worker.stop() == 0
    assert "Connection lost" not in worker.log
    assert [entry.event for entry in bench.ledger.entries() if entry.task_id == task_id] == ["begin", "done"]
    assert bench.vhost.ready("default") == 0


def test_quit_gives_back_at_once(bench: Bench) -> None:
    app = bench.client()
    worker = bench.worker("default", "-c", "1")
    task_id = bench.send(app, "note", 30.0)
    bench.wait_done({task_id}, event="begin")
    worker.process.send_signal(signal.SIGQUIT)
    assert worker.wait(8) == 1
    assert f"[{task_id}] goes back to its queue" in worker.log
    wait_until(lambda: bench.vhost.ready("default") == 1, 5, "the task is back")

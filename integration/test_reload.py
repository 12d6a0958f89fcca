"""`amqptasks worker --reload`: changed files, mistakes in them, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from amqptasks.testing.ledger import PATH_VARIABLE
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench

APP = """
from amqptasks import AmqpTasks
from amqptasks.testing.ledger import record

app = AmqpTasks("dev")


@app.task(bind=True, name="dev.tell")
def tell(self):
    record(self.request.id, "{what}")
"""


class Dev:
    """A worker with --reload in a folder of its own."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.folder = bench.folder / "dev"
        self.folder.mkdir()
        self.write("one")
        self.log = self.folder / "worker.log"
        self.app = bench.client()
        command = [sys.executable, "-m", "amqptasks", "-A", "dev_app:app", "--config", str(bench.config)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "worker", "-Q", "default", "-c", "1", "--reload"],
                cwd=self.folder,
                env={**os.environ, PATH_VARIABLE: str(bench.ledger.path), "PYTHONPATH": f"{self.folder}:{ROOT}"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.wait(lambda: self.count(" ready.") == 1, "it is ready")

    def write(self, what: str) -> None:
        (self.folder / "dev_app.py").write_text(APP.replace("{what}", what))

    def count(self, text: str) -> int:
        return self.log.read_text().count(text)

    def wait(self, look: Callable[[], bool], what: str) -> None:
        wait_until(look, 30, lambda: f"{what}:\n{self.log.read_text()}", pause=0.1)

    def run(self) -> str:
        """What the task tells now."""
        sent = self.app.send_task("dev.tell").id
        wait_until(lambda: [one for one in self.bench.ledger.entries() if one.task_id == sent], 20, "it ran")
        return next(one.event for one in self.bench.ledger.entries() if one.task_id == sent)


@pytest.fixture
def dev(bench: Bench) -> Iterator[Dev]:
    made = Dev(bench)
    worker = psutil.Process(made.process.pid)
    tree = worker.children(recursive=True)
    yield made
    if made.process.poll() is None:
        made.process.kill()
    made.process.wait(10)
    _, left = psutil.wait_procs(tree, timeout=15)
    assert not left, "the worker ends with the process above it"


def test_changed_code_runs_and_a_mistake_leaves_the_old_in_force(dev: Dev) -> None:
    assert dev.run() == "one"
    dev.write("two")
    dev.wait(lambda: dev.count(" ready.") == 2, "the new code is ready")
    assert "Changed: dev_app.py" in dev.log.read_text()
    # For a moment both take messages: the old leader has to hear that it is relieved.
    wait_until(lambda: dev.run() == "two", 20, "the new code alone runs")
    (dev.folder / "dev_app.py").write_text("def broken(:\n")
    dev.wait(lambda: dev.count("do not start; going on with the old") == 1, "the mistake is told")
    assert dev.count("dev_app.py") >= 2
    assert dev.run() == "two"
    dev.write("three")
    dev.wait(lambda: dev.count(" ready.") == 3, "the mended code is ready")
    wait_until(lambda: dev.run() == "three", 20, "the mended code alone runs")
    dev.process.send_signal(signal.SIGTERM)
    assert dev.process.wait(30) == 0


def test_the_worker_ends_with_the_process_that_watches(dev: Dev) -> None:
    dev.process.send_signal(signal.SIGKILL)  # the fixture looks whether anything is left


def test_it_is_not_for_the_background(bench: Bench) -> None:
    command = [sys.executable, "-m", "amqptasks", "-A", bench.APP, "--config", str(bench.config), "worker"]
    done = subprocess.run([*command, "--reload", "-D"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--reload is to develop with, in the foreground: not with --detach" in done.stderr


def test_without_the_package_it_says_what_to_install(bench: Bench) -> None:
    (bench.folder / "watchfiles.py").write_text("raise ImportError('not here')\n")
    command = [sys.executable, "-m", "amqptasks", "-A", bench.APP, "--config", str(bench.config), "worker", "--reload"]
    environment = {**os.environ, "PYTHONPATH": f"{bench.folder}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'amqptasks[reload]'" in done.stderr

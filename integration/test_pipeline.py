"""The data pipeline of the examples, and results at the command line."""

from __future__ import annotations

import csv
import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from amqptasks.testing.workers import WorkerProcess
from integration.conftest import ROOT, VirtualHost

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(vhost: VirtualHost, tmp_path: Path) -> Run:
    """Runs the command line with a configuration; the store is a file."""
    config = tmp_path / "amqptasks.yaml"
    settings = {"broker": {"url": vhost.url}, "result": {"backend": f"sqlite:///{tmp_path}/results.db"}}
    config.write_text(yaml.safe_dump(settings))

    def command(*arguments: str, app: str = "examples.pipeline:app") -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-m", "amqptasks", "-A", app, "--config", str(config), *arguments]
        return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)

    return command


def test_a_pipeline_extracts_transforms_in_parallel_and_loads(run: Run, vhost: VirtualHost, tmp_path: Path) -> None:
    dice, sums = random.Random(1), dict.fromkeys(("north", "south", "west"), Decimal(0))
    source, target = tmp_path / "sales.csv", tmp_path / "sales.db"
    with source.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["region", "amount"])
        for number in range(20_000):
            region, amount = dice.choice(list(sums)), Decimal(dice.randrange(10_000)) / 100
            lines.writerow([region, "none" if number % 1000 == 7 else amount])
            if number % 1000 != 7:
                sums[region] += amount
    with WorkerProcess(
        "examples.pipeline:app",
        "default",
        *("-c", "2"),
        config=tmp_path / "amqptasks.yaml",
        log=tmp_path / "log",
        environment={"PYTHONPATH": str(ROOT)},
    ) as worker:
        worker.wait_ready()
        done = run(
            "call", "pipeline.sales", "--args", json.dumps([str(source), str(target)]), "--wait", "--timeout", "30"
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == {"regions": 3, "blocks": 40, "rejected": 20}
        failed = run("call", "pipeline.sales", "--args", '["/nowhere.csv", "x"]', "--wait", "--timeout", "30")
        assert failed.returncode == 1
        assert failed.stderr.startswith("FAILURE: FileNotFoundError(2, 'No such file or directory'")
        assert "Traceback" not in failed.stderr
        late = run("call", "pipeline.sales", "--args", "[]", "--countdown", "50", "--wait", "--timeout", "0.2")
        assert late.returncode == 1
        sent = run("call", "pipeline.transform", "--args", json.dumps([str(source), 0]))
        shown = run("result", sent.stdout.strip(), "--timeout", "20", "--json")
        table = json.loads(shown.stdout)
        assert (shown.returncode, table["state"], table["result"]["rejected"]) == (0, "SUCCESS", 1)
        assert worker.stop() == 0
    with sqlite3.connect(target) as database:
        found = {region: Decimal(total) for region, total in database.execute("SELECT region, total FROM sales")}
    database.close()
    assert found == sums


def test_the_result_of_a_task_that_only_its_caller_can_see_is_explained(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "amqptasks.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "result": {"backend": "rpc://"}}))
    done = run("result", "abc")
    assert done.returncode == 2
    assert "results go to the process that called" in done.stderr
    assert len(done.stderr.splitlines()) == 1

"""What the ledger keeps and how it judges."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amqptasks.testing.ledger import PATH_VARIABLE, Judgement, Ledger, record, record_confirmed


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "ledger"))
    return Ledger(tmp_path / "ledger")


def test_a_flawless_run(ledger: Ledger) -> None:
    for task_id in ("a", "b"):
        record_confirmed(task_id, time.time() - 1)
        record(task_id, "done")
    record("b", "done")  # it came again
    record("never confirmed", "done")
    verdict = ledger.judge()
    assert verdict.flawless
    assert verdict.again == 1


def test_a_line_that_somebody_is_writing_is_not_read_yet(ledger: Ledger) -> None:
    record("a", "done")
    whole = ledger.path.read_text()
    for length in range(len(whole)):
        ledger.path.write_text(whole + whole[:length])
        assert len(ledger.entries()) == 1


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("lost", {}),
        ("dead", {"dead": ["x"]}),
        ("kept", {"kept": ["x"]}),
        ("gone", {"deleted": time.time() + 1e6}),  # collected long before it runs
    ],
)
def test_a_task_that_has_not_ended_is_told_apart(ledger: Ledger, field: str, wrong: dict[str, object]) -> None:
    record_confirmed("x", time.time())
    verdict = ledger.judge(**wrong)
    assert {name: found for name, found in vars(verdict).items() if found} == {field: frozenset("x")}
    assert not verdict.flawless


def test_a_task_that_ended_is_condemned_all_the_same_when_it_is_a_dead_letter_too(ledger: Ledger) -> None:
    record_confirmed("x", time.time())
    record("x", "done")
    assert not ledger.judge(dead=["x"]).flawless
    assert not ledger.judge(held=1).flawless
    assert ledger.judge().flawless


def test_what_ended_before_it_was_due_is_early(ledger: Ledger) -> None:
    record_confirmed("x", time.time() + 60)
    record("x", "done")
    assert ledger.judge().early == {"x"}


def test_what_is_due_after_a_queue_was_deleted_is_lost_when_it_does_not_end(ledger: Ledger) -> None:
    record_confirmed("x", time.time())
    assert ledger.judge(deleted=time.time() - 60) == Judgement(frozenset("x"), 0, frozenset(), 0.0)


def test_what_a_process_has_confirmed_is_there_though_it_is_killed_at_once(ledger: Ledger) -> None:
    program = (
        "import os, signal\n"
        "from amqptasks.testing.ledger import record_confirmed\n"
        "record_confirmed('x', 12.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    assert ledger.confirmed() == {"x": 12.5}


def test_who_writes_goes_on_after_it_was_cleared(ledger: Ledger) -> None:
    record("x", "done")
    ledger.clear()
    record("y", "done")
    assert ledger.ids() == {"y"}

"""Twenty thousand tasks while faults of every kind come at random: none is lost, none early."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from amqptasks.testing.chaos import FAULTS
from integration.ordeal import ordeal

TASKS = 20_000


@pytest.mark.timeout(360)
def test_of_twenty_thousand_tasks_under_random_faults_none_is_lost_or_early(tmp_path: Path) -> None:
    seed = int(time.time())
    print(f"seed {seed}")
    with ordeal(tmp_path) as made:
        found = made.run(list(FAULTS), random.Random(seed), tasks=TASKS)
        print(f"{found.sent} sent, {found.told} told, {found.injected} faults, run again {found.judgement.again}")
        assert found.sent >= TASKS
        assert found.judgement.lost == frozenset()
        assert found.judgement.early == frozenset()
        assert made.end() == [0, 0]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["executor frozen", "leader frozen"])
def test_a_process_that_stands_still_for_a_moment_has_no_task_run_again(tmp_path: Path, fault: str) -> None:
    """What an executor has reported counts, though its leader reads it late."""
    with ordeal(tmp_path) as made:
        found = made.run([fault], random.Random(1), seconds=6)
        assert found.injected >= 2
        assert (found.judgement.lost, found.judgement.again) == (frozenset(), 0)

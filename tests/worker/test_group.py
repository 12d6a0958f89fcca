"""How many tasks run at once when nobody says."""

from __future__ import annotations

import os

import pytest

from amqptasks.worker.group import usable_cores


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000 100000", 1), ("50000 100000", 1), ("900000000 100000", None), ("max 100000", None)]
)
def test_a_containers_quota_cuts_the_cores(tmp_path, quota, expected):
    file = tmp_path / "cpu.max"
    file.write_text(quota + "\n")
    assert usable_cores(file) == (expected or len(os.sched_getaffinity(0)))


def test_without_a_container_the_affinity_counts(tmp_path):
    assert usable_cores(tmp_path / "none") == len(os.sched_getaffinity(0))

"""A worker that has run many tasks holds no more than one that has run some."""

from __future__ import annotations

import pytest

from benchmarks.soak import soak


@pytest.mark.timeout(180)
def test_sixty_thousand_tasks_leave_neither_memory_nor_files_nor_threads_behind() -> None:
    samples = soak(lambda tasks, _seconds: tasks < 80_000)
    warm, last = samples[0], samples[-1]
    assert (warm.tasks, last.tasks) == (20_000, 80_000)
    assert (last.files, last.threads) == (warm.files, warm.threads)
    assert last.memory < warm.memory * 1.1, samples

"""What a task costs does not grow unseen: function calls and system calls of client, leader and executor."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.guards import compare
from integration.conftest import VirtualHost


@pytest.mark.timeout(400)
def test_a_task_costs_the_work_that_it_is_known_to_cost(vhost: VirtualHost, tmp_path: Path) -> None:
    """Where this fails on purpose: ``python -m benchmarks.guards --store``, and say in the commit why it costs more."""
    _, found = compare(vhost.url, tmp_path)
    assert not found, "\n".join(found)

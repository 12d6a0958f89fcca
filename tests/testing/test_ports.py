"""Ports that servers of tests get."""

from __future__ import annotations

import subprocess
import sys

from amqptasks.testing.rabbitmq import free_port

_TAKE = """
from amqptasks.testing.rabbitmq import free_port
print(*(free_port() for _ in range(4000)), flush=True)
input()
"""


def test_no_port_is_given_out_twice_here_or_to_another_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _TAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None
        there = [int(port) for port in one.stdout.readline().split()]
        here = [free_port() for _ in range(4000)]
        one.communicate("\n")
    assert len(there) == 4000
    assert len({*there, *here}) == 8000

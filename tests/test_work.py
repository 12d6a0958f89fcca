"""Counting work: what counts for each task, and how `strace -c` is read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from amqptasks.testing.rabbitmq import NodeError
from amqptasks.testing.work import each, strace


def test_what_is_called_once_a_batch_does_not_count() -> None:
    assert each({"once": 99, "batch": 90, "twice": 203, "rare": 1}, 100) == {"once": 1, "twice": 2}


def test_the_system_calls_of_all_threads_of_a_process_are_counted() -> None:
    program = (
        "import os, sys, threading\n"
        "def run():\n for _ in range(250): os.getppid()\n"
        "print('up', flush=True); sys.stdin.readline()\n"
        "threads = [threading.Thread(target=run) for _ in range(2)]\n"
        "[one.start() for one in threads]; [one.join() for one in threads]\n"
        "print('done', flush=True); sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        with strace({"it": process.pid}) as counted:
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
        assert counted["it"]["getppid"] == 500
        process.stdin.close()
    # Those that follow a process which ended are done as well.
    assert process.returncode == 0


def test_what_cannot_be_attached_to_is_said() -> None:
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    with pytest.raises(NodeError, match=r"strace .*No such process"), strace({"gone": gone}):
        signal.pause()

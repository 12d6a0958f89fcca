"""A web process pays little for the import, and nothing for what it does not use."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
{statement}
heavy = {{"sentry_sdk", "cryptography"}}
heavy |= {{"aio_pika", "click", "rich", "amqptasks.worker", "amqptasks.cli", "psutil", "testcontainers"}}
print(sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import amqptasks",
        "from amqptasks import AmqpTasks; app = AmqpTasks('web', config={}); app.settings; app.client",
    ],
)
def test_neither_worker_nor_sentry_nor_aio_pika_is_imported(statement: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statement=statement)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_package_alone_imports_next_to_nothing() -> None:
    program = (
        "import sys, amqptasks; print(len([name for name in sys.modules if name.startswith(('pydantic', 'pika'))]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"

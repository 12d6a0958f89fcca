"""Tasks with large arguments."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from amqptasks import AmqpTasks
from amqptasks.testing.ledger import record

app = AmqpTasks("claims")


@app.task(bind=True)
def size_of(self: Any, text: str) -> int:
    """How long the text is."""
    record(self.request.id, "done", self.request.retries + 1)
    return len(text)


@app.task
async def async_size_of(text: str) -> int:
    """The same, on an event loop."""
    return len(text)


@app.task
def doubled(text: str) -> str:
    """Twice as much."""
    return text * 2


@app.task(bind=True, max_retries=3, default_retry_delay=0.2)
def again(self: Any, text: str, other: bool = False) -> str:
    """Fail once, and run again with the same text, or with another that is as long."""
    if self.request.retries == 0:
        if other:
            raise self.retry(args=(text.swapcase(),), kwargs={})
        raise self.retry()
    return text[0]


@app.task(bind=True)
def deadly(self: Any, text: str, flag: str) -> int:
    """Kill the process that runs it, as long as there is no such file."""
    if not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    record(self.request.id, "done")
    return len(text)


@app.task
def checked(text: str) -> int:
    """Fail for a text that is too long."""
    if len(text) > 200_000:
        raise ValueError("too long")
    return len(text)

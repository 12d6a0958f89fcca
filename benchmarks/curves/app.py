"""What the curves' worker runs: tasks that do nothing, marks that write down when they ran. Light, as workers are."""

from __future__ import annotations

from amqptasks import AmqpTasks
from benchmarks.race import work

__all__ = ["app"]

app = AmqpTasks("curves")


@app.task(name="curves.noop", ignore_result=True)
def noop(data: str = "") -> None:
    """Nothing."""


@app.task(name="curves.mark", ignore_result=True)
def mark(data: str = "") -> None:
    """Write the time."""
    work.mark()

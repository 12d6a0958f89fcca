"""A process that publishes for the ordeal, until SIGTERM: each call that returned is in the ledger at once.

    python -m integration.publishing CONFIG SEED [URL]

Three kinds of tasks: most run once, some fail and are retried, some are delayed. Each thread draws them from dice of
its own, so that a seed gives the same tasks however threads take turns.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from dataclasses import dataclass

from amqptasks import AmqpTasks
from amqptasks.errors import PublishError
from amqptasks.testing.ledger import record, record_confirmed

__all__ = ["TOLD", "Draw", "draw"]

THREADS = 2
#: What the ledger has for a call that raised.
TOLD = "told"


@dataclass(frozen=True)
class Draw:
    """A task to send, and after how many seconds it may run."""

    name: str
    args: tuple[float, ...]
    wait: float = 0.0


def draw(dice: random.Random) -> Draw:
    """What is sent next."""
    kind = dice.random()
    if kind < 0.05:
        return Draw("recovers", (1,))
    return Draw("note", (0.002,), wait=1.0 if kind < 0.1 else 0.0)


def _send(app: AmqpTasks, what: Draw) -> None:
    name, wait = f"integration.apps.jobs.{what.name}", what.wait
    called = time.time()
    try:
        result = app.send_task(name, what.args, countdown=wait or None, ignore_result=True)
    except PublishError:
        record(None, TOLD)
        return
    record_confirmed(result.id, called + wait)


def main(config: str, seed: str, url: str | None = None) -> None:
    app = AmqpTasks("publisher", config=config, broker=url)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def publish(number: int) -> None:
        dice = random.Random(f"{seed}-{number}")
        while not stop.is_set():
            _send(app, draw(dice))

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(THREADS)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    app.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What the guards look at: an app with a task that does nothing, and a client that publishes when it is told to.

    python -m benchmarks.guarded CONFIG one|many

reads from its input how many calls to publish, and writes a line when they are confirmed. With ``one`` each waits for
its own confirm, with ``many`` they share it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from amqptasks import AmqpTasks
from amqptasks.testing.work import count_calls

count_calls()
app = AmqpTasks("guarded")


@app.task(name="guarded.noop", ignore_result=True)
def noop() -> None:
    """Nothing."""


@app.task(name="guarded.mark", ignore_result=True)
def mark(file: str) -> None:
    """Make a file."""
    Path(file).touch()


def main() -> None:
    """Publish as often as the input says."""
    config, how = sys.argv[1:]
    app.configure(config=config)
    print("ready", flush=True)
    for line in sys.stdin:
        if how == "many":
            app.send_many([noop.s() for _ in range(int(line))])
        else:
            for _ in range(int(line)):
                noop.delay()
        print("confirmed", flush=True)


if __name__ == "__main__":
    main()

"""A migration that kills itself: ``python -m integration.apps.migrator CONFIG QUEUE STEP[+SECONDS] [--rollback]``.

At the beginning of the step, or so many seconds after it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from amqptasks.broker.management import ManagementApi
from amqptasks.config import load_settings
from amqptasks.migration import Migration, Step
from amqptasks.topology import build_topology


def main() -> None:
    config, queue, moment = sys.argv[1:4]
    name, _, seconds = moment.partition("+")
    fatal = Step(name)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def tell(step: Step, text: str) -> None:
        print(step.value, text, flush=True)
        if step is fatal:
            if not seconds:
                die()
            timer = threading.Timer(float(seconds), die)
            timer.daemon = True
            timer.start()

    settings = load_settings(config)
    with ManagementApi(settings.broker, purpose="a test") as api:
        Migration(settings, build_topology(settings), queue, api, rollback="--rollback" in sys.argv, tell=tell).run()


if __name__ == "__main__":
    main()

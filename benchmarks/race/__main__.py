"""amqptasks, Celery, Dramatiq, Taskiq, FastStream and bare pika in one run on one private node, with equal guarantees:
durable queues, persistent and confirmed messages, acknowledged after the task. Rounds are interleaved; medians, ratios.

The first call installs the peers into an environment of the race's own.

    python -m benchmarks.race                            # what fits into ten minutes, on the installed RabbitMQ
    python -m benchmarks.race --rabbitmq 4.3 --docs      # the same there; writes docs/performance.md
    python -m benchmarks.race --all --rounds 5 --seconds 10 --tasks 100000
    python -m benchmarks.race --only drain --systems amqptasks,celery-prefork,bare-pika --rounds 1 --tasks 5000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.race.environment import enter, environment_folder

DISCIPLINES = ("drain", "publish", "trip", "help")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.race", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default=",".join(DISCIPLINES), help="disciplines: drain, publish, trip, help")
    add("--systems", help="names with commas; all by default, which is what a published table has")
    add("--rounds", type=int, default=3)
    add("--tasks", type=int, default=20_000, help="no-op tasks of a drain; other disciplines have a part of it")
    add("--seconds", type=float, default=2.5, help="longest time of one drain or one way to publish")
    add("--calls", type=int, default=200, help="round trips in each round")
    add("--queues", default="quorum,classic", help="their types; the first is for all disciplines")
    add("--all", action="store_true", help="every discipline on each type of queue, not only the no-op drain")
    add("--rabbitmq", help="version: 4.0 or 4.3 from a tree of its own; by default the installed one")
    add("--env", metavar="DIR", help="where the peers are installed (default: in the user's cache)")
    add("--json", type=Path, metavar="FILE", help="write every value of every round there")
    add("--read", type=Path, metavar="FILE", help="run nothing: show what --json wrote")
    add("--docs", action="store_true", help="write tables and chart into docs/performance.md and docs/images")
    options = parser.parse_args()
    options.only = [one.strip() for one in options.only.split(",")]
    if unknown := set(options.only) - set(DISCIPLINES):
        parser.error(f"no discipline is named {', '.join(sorted(unknown))}; there are {', '.join(DISCIPLINES)}")
    return options


def main() -> None:
    """Go into the race's environment, and race."""
    options = parse()
    enter(environment_folder(options.env), "benchmarks.race")
    # Only there can it be imported.
    from benchmarks.race import run

    run.run(options)


if __name__ == "__main__":
    main()

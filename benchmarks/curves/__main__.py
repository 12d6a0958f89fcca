"""What a task costs when something grows: executors, queues, messages that wait, their size, prefetch, delayed tasks.

No-op tasks on quorum queues of a private node. Rounds are interleaved; medians.

    python -m benchmarks.curves                          # all, three rounds
    python -m benchmarks.curves --only size,prefetch --rounds 1
    python -m benchmarks.curves --docs                   # writes docs/performance.md and its picture
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.race.environment import enter, environment_folder


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", help="curves, with commas: processes, queues, waiting, size, prefetch, delayed")
    add("--rounds", type=int, default=3)
    add("--rabbitmq", help="version: 4.0 or 4.3 from a tree of its own; by default the installed one")
    add("--env", metavar="DIR", help="where the race's environment is (default: in the user's cache)")
    add("--json", type=Path, metavar="FILE", help="write every value of every round there")
    add("--docs", action="store_true", help="write table and picture into docs/performance.md and docs/images")
    return parser.parse_args()


def main() -> None:
    """Go into the race's environment, where the picture is drawn, and measure."""
    options = parse()
    enter(environment_folder(options.env), "benchmarks.curves")
    # Only there can it be imported.
    from benchmarks.curves import run

    run.run(options)


if __name__ == "__main__":
    main()

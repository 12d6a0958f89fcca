"""A client's process: publishes or makes round trips, and prints what it measured as JSON."""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

from benchmarks.race.system import CALLERS, THREADS, WINDOW

__all__: list[str] = []

#: Calls before the measuring begins: connections are open then.
_WARM = 8
#: What a way's count is a multiple of: every thread and every coroutine has as much to do as the others.
_STEPS = {"threads": THREADS, "bulk": WINDOW, "callers": CALLERS}


def _publish(client: Any, counts: dict[str, int], seconds: float) -> dict[str, float]:
    """Messages a second by the way; fewer than `counts` where that would take longer than `seconds`."""
    found = {}
    for way, count in counts.items():
        method = getattr(client, way, None)
        if method is None:
            continue
        step = _STEPS.get(way, 1)

        def rate(many: int, method: Any = method) -> float:
            started = time.perf_counter()
            method(many)
            return many / (time.perf_counter() - started)

        some = -(-max(step, count // 50) // step) * step
        method(some)
        fits = min(count, rate(some) * seconds)
        found[way] = rate(max(step, int(fits) // step * step))
    return found


def _trips(client: Any, calls: int) -> list[float]:
    times = []
    for number in range(-_WARM, calls):
        started = time.perf_counter()
        value = client.trip(number)
        times.append(time.perf_counter() - started)
        if value != number + 1:
            raise RuntimeError(f"{number} + 1 is not {value}")
    return times[_WARM:]


def main(module: str, what: str, argument: str) -> None:
    """Import the system's file and measure."""
    client = importlib.import_module(f"benchmarks.race.systems.{module}").client()
    found = _publish(client, *json.loads(argument)) if what == "publish" else _trips(client, int(argument))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How samples of a profiler become what a task costs, and points become curves."""

from __future__ import annotations

import pytest

from benchmarks.costs import EXECUTOR, LEADER, Costs, attribute, stacks
from benchmarks.curves.measure import Point
from benchmarks.curves.report import markdown, medians
from benchmarks.curves.shapes import CURVES, Curve, Shape

RAW = """\
run (amqptasks/worker/leader.py);feed (amqptasks/broker/inflow.py);decode_properties (amqptasks/broker/wire.py) 30
run (amqptasks/worker/leader.py);start (pika/adapters/select_connection.py) 10
run (amqptasks/worker/leader.py);_flush (amqptasks/worker/settlement.py);send_ack (amqptasks/broker/consumer.py) 5
_bootstrap (threading.py) 5
"""


def test_a_sample_counts_for_the_innermost_function_that_is_known() -> None:
    counted = attribute(stacks(RAW), LEADER)
    assert counted == {"read frames, decode headers": 30, "sockets and the loop": 10, "ack": 5, "the rest": 5}


def test_the_parts_of_the_cost_add_up_to_the_processor_time() -> None:
    costs = Costs(0.5, 10_000, [RAW, RAW], LEADER)
    assert costs.total == pytest.approx(50)
    assert sum(costs.parts.values()) == pytest.approx(50)
    assert costs.parts["read frames, decode headers"] == pytest.approx(30)
    assert next(iter(costs.functions)) == "decode_properties (amqptasks/broker/wire.py)"


def test_functions_of_libraries_count_for_what_called_them() -> None:
    raw = "run (amqptasks/execution/runner.py);validate (amqptasks/validation.py);inner (somewhere/else.py) 4\n"
    assert attribute(stacks(raw), EXECUTOR) == {"validate": 4}


def test_a_curve_has_the_median_of_its_rounds() -> None:
    curve = Curve("size", "size of the argument", (Shape("1 KiB"), Shape("1 MiB")))
    points = medians(
        {
            ("size", "1 KiB"): [Point(100, 5), Point(300, 7), Point(200, 6)],
            ("size", "1 MiB"): [Point(1, 5000)],
        }
    )
    assert markdown([curve], points) == (
        "| size of the argument | tasks/s | µs of CPU a task |\n| --- | ---: | ---: |\n"
        "| 1 KiB | 200 | 6 |\n| 1 MiB | 1 | 5,000 |"
    )


def test_no_curve_drains_more_than_waits() -> None:
    assert all(shape.filled >= shape.tasks for curve in CURVES for shape in curve.shapes)

"""How a race's values become medians, ratios, goals and a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.race.goals import goals
from benchmarks.race.records import OURS, Record, Records
from benchmarks.race.report import markdown, replace_block


def race(measure: str, **values: list[float]) -> Records:
    systems = {"ours": OURS, "celery": "celery prefork", "other": "dramatiq", "bare": "bare pika"}
    return Records(
        Record(measure, "quorum", systems[name], number, value)
        for name, rounds in values.items()
        for number, value in enumerate(rounds)
    )


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    records = race("drain-noop", ours=[100, 50, 90], celery=[10, 10, 10])
    assert records.median("drain-noop", "quorum", OURS) == 90
    assert records.lead("drain-noop", "quorum", "celery prefork") == 9
    assert records.lead("drain-noop", "quorum", "taskiq") is None
    less = race("trip-p50", ours=[2, 2], celery=[4, 6])
    assert less.lead("trip-p50", "quorum", "celery prefork") == 2.5


def test_a_goal_that_is_missed_is_said_to_be_missed() -> None:
    records = race("drain-noop", ours=[70], celery=[10], other=[60], bare=[90])
    told = {goal.text: goal.reached for goal in goals(records)}
    assert told == {
        "no-op drain, quorum, beside celery prefork": True,
        "no-op drain, quorum, beside the best peer (dramatiq)": False,
        "no-op drain, quorum, beside bare pika": True,
    }
    page = markdown(records, "here.", None)
    assert "| no-op drain, quorum, beside the best peer (dramatiq) | ≥ 3.00 × | 1.17 × | **no** |" in page


def test_what_a_page_says_besides_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- race -->\nold\n<!-- end of race -->\nafter\n")
    replace_block(page, "race", "new")
    assert page.read_text() == "before\n<!-- race -->\n\nnew\n\n<!-- end of race -->\nafter\n"
    with pytest.raises(ValueError, match="has no <!-- other -->"):
        replace_block(page, "other", "new")

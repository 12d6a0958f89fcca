"""What must not run gets its outcome from headers alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from amqptasks.outcome import Failed, Postponed, Reason
from amqptasks.worker.delivery import VERDICT_HEADER
from amqptasks.worker.intake import examine

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
TASKS = {"shop.charge"}


def headers(**changed: Any) -> dict[str, Any]:
    return {"task": "shop.charge", "id": "abc", "retries": 0, **changed}


def test_a_sound_message_may_run() -> None:
    assert examine(headers(), TASKS, now=NOW) is None


@pytest.mark.parametrize(
    "bad",
    [
        None,
        {},
        {"id": "abc"},
        headers(task=7),
        headers(id=None),
        headers(id=""),
        headers(id=["x"]),
        headers(retries=-1),
        headers(retries="many"),
        headers(retries=True),
        headers(timelimit=5),
        headers(timelimit=[float("nan"), None]),
        headers(timelimit=[None, float("inf")]),
        headers(retries=2**63 - 1),
        headers(timelimit=[1]),
        headers(timelimit=["soon", None]),
        headers(eta="tomorrow"),
        headers(eta=12),
        headers(expires="9999-99-99"),
        headers(compression=5),
    ],
)
def test_headers_that_no_sender_of_tasks_writes_are_undecodable(bad: dict[str, Any] | None) -> None:
    outcome = examine(bad, TASKS, now=NOW)
    assert isinstance(outcome, Failed)
    assert outcome.reason is Reason.UNDECODABLE
    assert outcome.message


def test_an_unknown_task_is_named() -> None:
    outcome = examine(headers(task="shop.refund"), TASKS, now=NOW)
    assert isinstance(outcome, Failed)
    assert outcome.reason is Reason.UNKNOWN_TASK
    assert "shop.refund" in outcome.message


def test_what_is_decided_needs_no_task() -> None:
    assert examine(headers(**{"task": "of.another.app", VERDICT_HEADER: ["ChordError", "why"]}), TASKS, now=NOW) is None


def test_what_has_expired_does_not_run() -> None:
    outcome = examine(headers(expires=(NOW - timedelta(seconds=1)).isoformat()), TASKS, now=NOW)
    assert isinstance(outcome, Failed)
    assert outcome.reason is Reason.EXPIRED
    assert examine(headers(expires=(NOW + timedelta(seconds=1)).isoformat()), TASKS, now=NOW) is None


def test_what_came_before_its_time_waits_for_the_rest() -> None:
    outcome = examine(headers(eta=(NOW + timedelta(seconds=5)).isoformat()), TASKS, now=NOW)
    assert outcome == Postponed(5.0)
    assert examine(headers(eta=(NOW - timedelta(seconds=5)).isoformat()), TASKS, now=NOW) is None


def test_a_time_without_a_zone_is_utc() -> None:
    assert examine(headers(eta="2026-05-01T12:00:07"), TASKS, now=NOW) == Postponed(7.0)


def test_an_absurd_eta_is_a_long_wait_and_no_error() -> None:
    outcome = examine(headers(eta="9999-12-31T23:59:59+00:00"), TASKS, now=NOW)
    assert isinstance(outcome, Postponed)

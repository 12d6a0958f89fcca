"""Task states, with Celery's names."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["EXCEPTION_STATES", "READY_STATES", "UNREADY_STATES", "State"]


class State(StrEnum):
    """The states a task passes through. Custom states are plain strings beside them."""

    PENDING = "PENDING"
    RECEIVED = "RECEIVED"
    STARTED = "STARTED"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    RETRY = "RETRY"
    REVOKED = "REVOKED"
    REJECTED = "REJECTED"


PENDING = State.PENDING
RECEIVED = State.RECEIVED
STARTED = State.STARTED
SUCCESS = State.SUCCESS
FAILURE = State.FAILURE
RETRY = State.RETRY
REVOKED = State.REVOKED
REJECTED = State.REJECTED

#: States that will not change any more.
READY_STATES = frozenset({SUCCESS, FAILURE, REVOKED})
#: States that may still change.
UNREADY_STATES = frozenset({PENDING, RECEIVED, STARTED, REJECTED, RETRY})
#: States whose result is an exception.
EXCEPTION_STATES = frozenset({RETRY, FAILURE, REVOKED})

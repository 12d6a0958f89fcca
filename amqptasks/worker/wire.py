"""What crosses between leader and executor: length-prefixed `marshal` frames over a socket pair, in batches.

`marshal` is the fastest codec of the standard library. Both ends are forks of one process, so that its lack of a
stable format does not matter, and nothing from outside reaches it but plain values.
"""

from __future__ import annotations

import marshal
import struct
from dataclasses import fields
from typing import Any

from amqptasks.execution.job import Job
from amqptasks.message import Envelope
from amqptasks.outcome import (
    Discarded,
    Failed,
    GivenBack,
    Lost,
    Outcome,
    Postponed,
    RateLimited,
    Reason,
    Retrying,
    Succeeded,
)

__all__ = [
    "STATE",
    "TERMINATED",
    "FrameReader",
    "Report",
    "ask_frame",
    "envelopes",
    "pack_jobs",
    "pack_reports",
    "report_of",
    "returned",
    "state_of",
    "terminated",
    "unpack_jobs",
    "unpack_order",
    "unpack_report",
    "unpack_reports",
]

_LENGTH = struct.Struct("!I")
#: Stands where a batch has its lease.
_ASK = -1.0

#: (tag, kind, run time in seconds, *fields of the outcome)
Report = tuple[Any, ...]
_FIELDS = [field.name for field in fields(Envelope)]

_SUCCEEDED, _RETRYING, _FAILED, _DISCARDED, _GIVEN_BACK, RETURNED, STATE, TERMINATED, _POSTPONED = range(9)


def report_of(tag: int, outcome: Outcome, runtime: float) -> Report:
    """An outcome as a row of plain values."""
    match outcome:
        case Succeeded(messages, None):
            return (tag, _SUCCEEDED, runtime, _rows(messages)) if messages else (tag, _SUCCEEDED, runtime)
        case Succeeded(messages, shown):
            return tag, _SUCCEEDED, runtime, _rows(messages), shown
        case Retrying(delay, exception, message, body, queue, priority, headers, trace, messages):
            row = (delay, exception, message, body, queue, priority, headers, trace)
            return tag, _RETRYING, runtime, *row, _rows(messages)
        case Failed(reason, exception, message, traceback, messages):
            return tag, _FAILED, runtime, str(reason), exception, message, traceback, _rows(messages)
        case Discarded(messages):
            return tag, _DISCARDED, runtime, _rows(messages)
        case GivenBack():
            return tag, _GIVEN_BACK, runtime
        case Postponed(delay):
            return tag, _POSTPONED, runtime, delay
        case RateLimited() | Lost():
            raise AssertionError(f"an executor does not report {outcome!r}")


def returned(tag: int) -> Report:
    """The row of a job that was not started before its lease ended."""
    return tag, RETURNED, 0.0


def terminated(tag: int) -> Report:
    """The row of a task that ended because the leader asked for it."""
    return tag, TERMINATED, 0.0


def state_of(tag: int, message: Envelope) -> Report:
    """The row of a state that is not final: a message that is sent while the task goes on."""
    return tag, STATE, 0.0, _rows((message,))


def _rows(messages: tuple[Envelope, ...]) -> list[tuple[Any, ...]]:
    return [tuple(getattr(one, name) for name in _FIELDS) for one in messages]


def envelopes(rows: list[tuple[Any, ...]]) -> tuple[Envelope, ...]:
    """The messages of a report."""
    return tuple(Envelope(*row) for row in rows)


_DONE = Succeeded()
_BACK = GivenBack()


def unpack_report(report: Report) -> Outcome | None:
    """The outcome of a row; None for a job that was returned unstarted."""
    kind = report[1]
    if kind == _SUCCEEDED:
        return _DONE if len(report) == 3 else Succeeded(envelopes(report[3]), *report[4:])
    if kind == _RETRYING:
        return Retrying(*(*report[3:-1], envelopes(report[-1])))
    if kind == _FAILED:
        return Failed(Reason(report[3]), *(*report[4:-1], envelopes(report[-1])))
    if kind == _DISCARDED:
        return Discarded(envelopes(report[3]))
    if kind == _GIVEN_BACK:
        return _BACK
    if kind == _POSTPONED:
        return Postponed(report[3])
    return None


def pack_jobs(jobs: list[Job], lease: float) -> bytes:
    """A batch of jobs that may be started until `lease` (`time.monotonic`, one clock for all processes)."""
    try:
        data = marshal.dumps((lease, [tuple(job) for job in jobs]))
    except ValueError:  # a header holds a type of AMQP's that marshal does not take (timestamp, 64-bit integer)
        data = marshal.dumps((lease, [tuple(job._replace(headers=_plain(job.headers))) for job in jobs]))
    return _LENGTH.pack(len(data)) + data


def ask_frame(tag: int) -> bytes:
    """Asks an executor of many tasks to end one of them."""
    data = marshal.dumps((_ASK, [tag]))
    return _LENGTH.pack(len(data)) + data


def unpack_jobs(frame: bytes) -> tuple[float, list[Job]]:
    """The lease and the jobs of a frame."""
    lease, rows = marshal.loads(frame)  # noqa: S302 - written by the leader, a fork of the same process
    return lease, [Job(*row) for row in rows]


def unpack_order(frame: bytes) -> tuple[float, list[Job], int | None]:
    """The same, and the tag of a task that is to end: an executor of many tasks hears of both."""
    lease, rows = marshal.loads(frame)  # noqa: S302 - as above
    if lease == _ASK:
        return 0.0, [], rows[0]
    return lease, [Job(*row) for row in rows], None


def pack_reports(reports: list[Report]) -> bytes:
    """A batch of outcomes."""
    data = marshal.dumps(reports)
    return _LENGTH.pack(len(data)) + data


def unpack_reports(frame: bytes) -> list[Report]:
    """The outcomes of a frame."""
    rows: list[Report] = marshal.loads(frame)  # noqa: S302 - written by an executor, a fork of this process
    return rows


def _plain(value: Any) -> Any:
    """The nearest value of exactly a type that marshal takes: pika's 64-bit integers are a subclass of int."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float | bytes):
        return value
    return str(value)


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add `data`; return the frames that are complete."""
        buffer = self._buffer
        buffer += data
        frames = []
        start, end = 0, len(buffer)
        while end - start >= 4:
            length = _LENGTH.unpack_from(buffer, start)[0]
            if end - start < 4 + length:
                break
            frames.append(bytes(buffer[start + 4 : start + 4 + length]))
            start += 4 + length
        if start:
            del buffer[:start]
        return frames

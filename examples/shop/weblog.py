"""The web server's access log: shipped in batches, parsed in parallel, added up.

``weblog.parse`` (queue media, CPU) counts one batch and calls ``weblog.aggregate`` (queue high_priority, lowest
priority), which adds the counts to the database.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel, NonNegativeInt

from examples.shop import app, ledger, places

__all__ = ["BatchCounts", "Hit", "aggregate", "count_lines", "parse", "parse_line"]

# Apache's and nginx's "combined" format:
# host ident user [time] "request" status bytes "referer" "user agent"
# Inside quotes a quote is written \" (Apache, mod_log_config).
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_COMBINED = re.compile(
    r"(?P<host>\S+) \S+ (?P<user>\S+) \[(?P<time>[^\]]+)\] "
    r'"(?P<method>[A-Z]+) (?P<target>\S+) HTTP/\d(?:\.\d)?" '
    rf"(?P<status>[1-5]\d\d) (?P<size>\d+|-) {_QUOTED} {_QUOTED}"
)


@dataclass(frozen=True, slots=True)
class Hit:
    """One request. `path` is the target without its query; `size` is 0 where the log has ``-``."""

    host: str
    time: datetime
    method: str
    path: str
    status: int
    size: int


class BatchCounts(BaseModel):
    """What one batch of lines adds up to. `size` is bytes sent."""

    batch: str
    lines: NonNegativeInt
    malformed: NonNegativeInt
    size: NonNegativeInt
    by_status: dict[int, NonNegativeInt]
    by_path: dict[str, NonNegativeInt]


def parse_line(line: str) -> Hit:
    """One line of the log. Raises `ValueError` for a line that is not in the combined format."""
    match = _COMBINED.fullmatch(line)
    if match is None:
        raise ValueError(f"not in the combined log format: {line[:80]!r}")
    size = match["size"]
    return Hit(
        host=match["host"],
        time=datetime.strptime(match["time"], "%d/%b/%Y:%H:%M:%S %z"),
        method=match["method"],
        path=match["target"].partition("?")[0],
        status=int(match["status"]),
        size=0 if size == "-" else int(size),
    )


def count_lines(batch: str, lines: Iterable[str]) -> BatchCounts:
    """Count one batch. A malformed line is counted as such; it does not fail the rest."""
    total = malformed = size = 0
    by_status: Counter[int] = Counter()
    by_path: Counter[str] = Counter()
    for line in lines:
        total += 1
        try:
            hit = parse_line(line)
        except ValueError:
            malformed += 1
            continue
        size += hit.size
        by_status[hit.status] += 1
        by_path[hit.path] += 1
    return BatchCounts(
        batch=batch, lines=total, malformed=malformed, size=size, by_status=dict(by_status), by_path=dict(by_path)
    )


@app.task(name="weblog.parse")
def parse(batch: str, lines: list[str]) -> None:
    """Count a batch of lines and hand the counts on: a task that calls another one."""
    aggregate.delay(count_lines(batch, lines))


@app.task(name="weblog.aggregate")
def aggregate(counts: BatchCounts) -> bool:
    """Add a batch to the totals, once, however often it is delivered."""
    return ledger.add_batch(
        places.database(),
        counts.batch,
        lines=counts.lines,
        malformed=counts.malformed,
        size=counts.size,
        by_status=counts.by_status,
        by_path=counts.by_path,
    )

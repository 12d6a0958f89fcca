"""The shop's SQLite database.

A task is executed *at least* once: after a crash between its work and its acknowledgement the broker delivers it again.
So each write carries a key that its message determines (the batch's id, the order's number), and a second write with
that key changes nothing. That, not luck, is what makes the totals right.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path

__all__ = ["add_batch", "add_charge", "connection", "count", "create", "log_totals", "revenue"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS batch (
    id TEXT PRIMARY KEY, lines INTEGER NOT NULL, malformed INTEGER NOT NULL, bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batch_status (
    batch TEXT NOT NULL REFERENCES batch (id), status INTEGER NOT NULL, hits INTEGER NOT NULL,
    PRIMARY KEY (batch, status)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batch_path (
    batch TEXT NOT NULL REFERENCES batch (id), path TEXT NOT NULL, hits INTEGER NOT NULL,
    PRIMARY KEY (batch, path)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS charge (order_id INTEGER PRIMARY KEY, cents INTEGER NOT NULL, card TEXT NOT NULL);
"""


@contextmanager
def connection(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection with one transaction: committed at the end, rolled back when the block raises."""
    # Several processes write; each waits its turn. The write-ahead log lets readers pass meanwhile.
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as opened:
        opened.execute("BEGIN IMMEDIATE")
        try:
            yield opened
        except BaseException:
            opened.execute("ROLLBACK")
            raise
        opened.execute("COMMIT")


def create(path: Path) -> None:
    """Make the tables. What is there already stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as opened:
        opened.execute("PRAGMA journal_mode = WAL")
        opened.executescript(_SCHEMA)


def add_batch(
    path: Path,
    batch: str,
    *,
    lines: int,
    malformed: int,
    size: int,
    by_status: Mapping[int, int],
    by_path: Mapping[str, int],
) -> bool:
    """Store the counts of one batch of log lines. False when it was stored before: it counts once."""
    with connection(path) as db:
        added = db.execute("INSERT OR IGNORE INTO batch VALUES (?, ?, ?, ?)", (batch, lines, malformed, size))
        if added.rowcount == 0:
            return False
        db.executemany("INSERT INTO batch_status VALUES (?, ?, ?)", [(batch, *one) for one in by_status.items()])
        db.executemany("INSERT INTO batch_path VALUES (?, ?, ?)", [(batch, *one) for one in by_path.items()])
        return True


def add_charge(path: Path, order_id: int, amount: Decimal, card: str) -> bool:
    """Store one payment. False when this order was charged before. Money is kept in cents."""
    with connection(path) as db:
        cents = int(amount.scaleb(2).to_integral_exact())
        return db.execute("INSERT OR IGNORE INTO charge VALUES (?, ?, ?)", (order_id, cents, card)).rowcount == 1


def count(path: Path, table: str) -> int:
    """The rows of `table`: ``batch`` or ``charge``."""
    if table not in ("batch", "charge"):
        raise ValueError(f"no such table: {table}")
    with closing(sqlite3.connect(path, timeout=30)) as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def log_totals(path: Path) -> dict[str, object]:
    """The log as a whole: batches, lines, malformed lines, bytes, hits by status and the ten busiest paths."""
    with closing(sqlite3.connect(path, timeout=30)) as db:
        totals = db.execute(
            "SELECT count(*), coalesce(sum(lines), 0), coalesce(sum(malformed), 0), coalesce(sum(bytes), 0) FROM batch"
        ).fetchone()
        statuses = db.execute("SELECT status, sum(hits) FROM batch_status GROUP BY status ORDER BY status").fetchall()
        paths = db.execute(
            "SELECT path, sum(hits) AS hits FROM batch_path GROUP BY path ORDER BY hits DESC, path LIMIT 10"
        ).fetchall()
    return {
        **dict(zip(("batches", "lines", "malformed", "bytes"), totals, strict=True)),
        "by_status": {str(status): hits for status, hits in statuses},
        "top_paths": dict(paths),
    }


def revenue(path: Path) -> Decimal:
    """The sum of all payments."""
    with closing(sqlite3.connect(path, timeout=30)) as db:
        return Decimal(int(db.execute("SELECT coalesce(sum(cents), 0) FROM charge").fetchone()[0])).scaleb(-2)

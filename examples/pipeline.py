"""A data pipeline: extract, transform in parallel, load.

::

    amqptasks -A examples.pipeline:app worker -Q default -c 4
    amqptasks -A examples.pipeline:app call pipeline.sales --args '["sales.csv", "sales.db"]' --wait

`sales` reads a CSV file and puts a chord in its own place: one `transform` for each block of lines, then `load` with
what all of them found. If a worker dies on the way, its task runs again; rows are written once, however often.
"""

from __future__ import annotations

import csv
import sqlite3
from collections import Counter
from contextlib import closing
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from amqptasks import AmqpTasks, chord

app = AmqpTasks("pipeline")

BLOCK = 500


class Block(BaseModel):
    """What one block of lines adds up to."""

    totals: dict[str, Decimal]
    rejected: int


@app.task(name="pipeline.sales", bind=True)
def sales(self: Any, source: Path, target: Path) -> None:
    """Extract: how many blocks there are. The result is that of `load`."""
    with source.open(newline="") as file:
        lines = sum(1 for _ in csv.reader(file)) - 1
    blocks = range(0, lines, BLOCK)
    self.replace(chord([transform.s(str(source), first) for first in blocks], load.s(str(target), self.request.id)))


@app.task(name="pipeline.transform")
def transform(source: Path, first: int) -> Block:
    """Add up the sales of one block by region. Lines whose amount is no number are counted."""
    totals: Counter[str] = Counter()
    rejected = 0
    with source.open(newline="") as file:
        for row in islice(csv.DictReader(file), first, first + BLOCK):
            try:
                totals[row["region"]] += Decimal(row["amount"])  # type: ignore[assignment]  # a Counter of Decimals
            except (InvalidOperation, KeyError, TypeError):
                rejected += 1
    return Block(totals={region: Decimal(total) for region, total in totals.items()}, rejected=rejected)


@app.task(name="pipeline.load", bind=True)
def load(self: Any, blocks: list[Block], target: Path, run: str) -> dict[str, int]:
    """Write the sums into the database, once for each run, and say how far it is."""
    sums: dict[str, Decimal] = {}
    for number, block in enumerate(blocks, 1):
        for region, total in block.totals.items():
            sums[region] = sums.get(region, Decimal(0)) + total
        if number % 10 == 0:
            self.update_state(state="PROGRESS", meta={"done": number, "of": len(blocks)})
    with closing(sqlite3.connect(target)) as database, database:
        database.execute(
            "CREATE TABLE IF NOT EXISTS sales (run TEXT, region TEXT, total TEXT, PRIMARY KEY (run, region))"
        )
        rows = [(run, region, str(total)) for region, total in sums.items()]
        database.executemany("INSERT OR REPLACE INTO sales VALUES (?, ?, ?)", rows)
    return {"regions": len(sums), "blocks": len(blocks), "rejected": sum(block.rejected for block in blocks)}

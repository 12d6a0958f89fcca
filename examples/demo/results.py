"""What a run must come to, what it came to, and whether the two agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from PIL import Image

from examples.demo.letters import DeadLetter
from examples.demo.sink import MailSink
from examples.demo.work import LogTruth, Order, Picture
from examples.shop import ledger, media

__all__ = ["Check", "Plan", "checks", "picture_sizes"]


@dataclass(frozen=True, slots=True)
class Check:
    """One number, or set of numbers, that must agree."""

    name: str
    expected: Any
    actual: Any

    @property
    def ok(self) -> bool:
        """Whether they agree."""
        return bool(self.expected == self.actual)


@dataclass(frozen=True)
class Plan:
    """The work of a run."""

    log: LogTruth
    batches: list[tuple[str, list[str]]]
    pictures: list[Picture]
    orders: list[Order]

    def addresses(self, domain: str) -> list[str]:
        """The customers' addresses at ``<domain>.example``."""
        return [order.address for order in self.orders if order.address.endswith(f"@{domain}.example")]

    @property
    def deliverable(self) -> int:
        """Receipts that must arrive, be it at the second attempt."""
        return len(self.orders) - self.undeliverable

    @property
    def undeliverable(self) -> int:
        """Receipts that must end in ``email.dlq``."""
        return len(self.addresses("gone")) + len(self.addresses("full"))

    @property
    def thumbnails(self) -> int:
        """Resized pictures."""
        return len(self.pictures) * len(media.FORMATS)

    def picture_sizes(self) -> dict[str, tuple[int, int]]:
        """File name -> size, of all pictures that must be there."""
        sizes = {}
        for picture in self.pictures:
            sizes[media.original(picture.name).name] = (picture.width, picture.height)
            for form, side in media.FORMATS.items():
                sizes[media.resized(picture.name, form).name] = media.fit(picture.width, picture.height, side)
        return sizes


def picture_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """File name -> size, of all pictures in a folder. Each is opened."""
    sizes = {}
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as picture:
            picture.load()  # all of it: a file that was cut off raises
            sizes[path.name] = picture.size
    return sizes


def checks(plan: Plan, database: Path, pictures: Path, sink: MailSink, letters: Iterable[DeadLetter]) -> list[Check]:
    """Compare what was to be done with what is there."""
    log: dict[str, Any] = ledger.log_totals(database)
    dead = Counter((one.queue, one.reason, one.attempts) for one in letters)
    retried = Counter(plan.addresses("gone") + plan.addresses("busy") + 3 * plan.addresses("full"))
    return [
        Check("log lines", plan.log.lines, log["lines"]),
        Check("malformed lines", plan.log.malformed, log["malformed"]),
        Check("bytes sent", plan.log.bytes, log["bytes"]),
        Check("hits by status", {str(k): v for k, v in sorted(plan.log.by_status.items())}, log["by_status"]),
        Check("orders charged", len(plan.orders), ledger.count(database, "charge")),
        Check("revenue", str(sum((order.amount for order in plan.orders), Decimal())), str(ledger.revenue(database))),
        Check("pictures and their sizes", plan.picture_sizes(), picture_sizes(pictures)),
        Check("receipts delivered", plan.deliverable, sink.delivered),
        Check("refusals by address", dict(retried), sink.recipients_refused()),
        Check("dead: no such mailbox", len(plan.addresses("gone")), dead.pop(("email.dlq", "failed", 1), 0)),
        Check("dead: mailbox full", len(plan.addresses("full")), dead.pop(("email.dlq", "retries_exhausted", 3), 0)),
        Check("dead: wrong arguments", 1, dead.pop(("high_priority.dlq", "invalid_arguments", 1), 0)),
        Check("dead: unknown task", 1, dead.pop(("high_priority.dlq", "unknown_task", 1), 0)),
        Check("dead: anything else", {}, {" ".join(map(str, key)): count for key, count in dead.items()}),
    ]

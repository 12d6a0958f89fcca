"""The work of one run: the same every time, with the results that it must have.

The expected numbers are taken down while the work is made up, not computed by the code that the workers run.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

__all__ = ["LogTruth", "Order", "Picture", "batches", "orders", "pictures", "write_log"]

T = TypeVar("T")

SEED = 20260914
LOG_LINES = 10_000
BATCH_LINES = 250
MALFORMED_SHARE = 0.02
ORDERS = 300
PICTURES = 24

_PATHS = [
    ("/", 30), ("/cart", 12), ("/checkout", 6), ("/static/app.js", 20), ("/static/app.css", 20), ("/search", 14),
    ("/api/v1/items", 18), ("/login", 5), ("/product/17", 8), ("/product/42", 8), ("/robots.txt", 2),
]  # fmt: skip
_STATUSES = [(200, 820), (304, 80), (302, 40), (404, 35), (403, 6), (500, 12), (502, 4), (206, 3)]
_AGENTS = [
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Version/17.5 Safari/604.1",
    "curl/8.9.1",
    r"Bot \"quoted\" [1.0] (+https://bot.example/)",
    "-",
]


@dataclass
class LogTruth:
    """What the log holds, as it was written."""

    lines: int = 0
    malformed: int = 0
    bytes: int = 0
    by_status: Counter[int] = field(default_factory=Counter)
    by_path: Counter[str] = field(default_factory=Counter)


def write_log(path: Path, lines: int = LOG_LINES, seed: int = SEED) -> LogTruth:
    """Write an access log in the combined format, some lines of it malformed. Returns what is in it."""
    chance = random.Random(seed)
    truth = LogTruth()
    now = datetime(2026, 9, 14, 6, 0, tzinfo=UTC)
    with path.open("wb") as file:
        for _ in range(lines):
            now += timedelta(milliseconds=chance.randrange(2000))
            truth.lines += 1
            if chance.random() < MALFORMED_SHARE:
                truth.malformed += 1
                file.write(_malformed(chance, now) + b"\n")
            else:
                file.write(_line(chance, now, truth).encode() + b"\n")
    return truth


def _pick(chance: random.Random, weighted: list[tuple[T, int]]) -> T:
    return chance.choices([one for one, _ in weighted], [weight for _, weight in weighted])[0]


def _host(chance: random.Random) -> str:
    if chance.random() < 0.1:
        return f"2001:db8::{chance.randrange(1, 65536):x}"
    return f"203.0.113.{chance.randrange(1, 255)}"


def _line(chance: random.Random, when: datetime, truth: LogTruth) -> str:
    path, status = _pick(chance, _PATHS), _pick(chance, _STATUSES)
    size = 0 if status in (304, 302) else chance.randrange(200, 60_000)
    truth.bytes += size
    truth.by_status[status] += 1
    truth.by_path[path] += 1
    query = f"?q={chance.randrange(1000)}" if path == "/search" else ""
    method = "POST" if path in ("/checkout", "/login") else "GET"
    user = "ann" if path == "/checkout" else "-"
    referer = chance.choice(["-", "https://shop.example/", "https://search.example/?q=shoes"])
    return (
        f"{_host(chance)} - {user} [{when:%d/%b/%Y:%H:%M:%S} +0000] "
        f'"{method} {path}{query} HTTP/1.1" {status} {size or "-"} "{referer}" "{chance.choice(_AGENTS)}"'
    )


def _malformed(chance: random.Random, when: datetime) -> bytes:
    whole = _line(chance, when, LogTruth()).encode()
    match chance.randrange(5):
        case 0:  # cut off: the disk was full
            return whole[: chance.randrange(10, 60)]
        case 1:  # a TLS hello sent to the plain port
            return b'203.0.113.9 - - [14/Sep/2026:06:00:00 +0000] "\x16\x03\x01\x02" 400 226 "-" "-"'
        case 2:  # no such date
            return whole.replace(b"/Sep/", b"/Sob/", 1)
        case 3:  # the letter O for a zero
            return b'203.0.113.7 - - [14/Sep/2026:06:00:00 +0000] "GET / HTTP/1.1" 2OO 512 "-" "curl/8.9.1"'
        case _:  # not text at all
            return b"\xff\xfe\x00" + bytes(chance.randrange(128, 256) for _ in range(30))


def batches(path: Path, size: int = BATCH_LINES) -> Iterator[tuple[str, list[str]]]:
    """The log in batches as (id, lines). The id is the file's name and the number of its first line."""
    # Bytes that are no UTF-8 stay readable as escapes, as JSON can carry them. Lines end at \n alone.
    with path.open(encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        lines = [line.removesuffix("\n") for line in file]
    for start in range(0, len(lines), size):
        yield f"{path.name}:{start + 1:06d}", lines[start : start + size]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to draw."""

    name: str
    seed: int
    width: int
    height: int


def pictures(count: int = PICTURES, seed: int = SEED) -> list[Picture]:
    """The pictures of a run: wide, tall and square ones, some of them smaller than the largest format."""
    chance = random.Random(seed)
    return [
        Picture(
            f"product-{number:02d}", chance.randrange(2**32), chance.randrange(400, 1600), chance.randrange(400, 1200)
        )
        for number in range(1, count + 1)
    ]


@dataclass(frozen=True, slots=True)
class Order:
    """An order to charge. The address decides what becomes of its receipt (`examples.demo.sink`)."""

    number: int
    amount: Decimal
    brand: str
    last4: str
    address: str


def orders(count: int = ORDERS, seed: int = SEED) -> list[Order]:
    """The orders of a run: of each 50, two addresses are gone, one mailbox is full, three servers are busy at first."""
    chance = random.Random(seed)
    domains = {7: "gone", 23: "gone", 31: "full", 11: "busy", 29: "busy", 43: "busy"}
    return [
        Order(
            number,
            Decimal(chance.randrange(100, 50_000)).scaleb(-2),
            chance.choice(["visa", "mastercard", "unionpay"]),
            f"{chance.randrange(10_000):04d}",
            f"customer-{number}@{domains.get(number % 50, 'mail')}.example",
        )
        for number in range(1, count + 1)
    ]

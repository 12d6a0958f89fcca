"""Messages that somebody made to do harm: in bounded memory and time each is dead-lettered, or runs as what it is."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import brotli
import pika
import psutil
import pytest
import zstandard

from amqptasks.broker.wire import encode_properties
from amqptasks.message import Envelope
from amqptasks.protocol.compression import _COMPRESS
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench

SOUND = {"task": "integration.apps.jobs.note", "lang": "py", "id": "hostile"}
BODY = b"[[],{},{}]"
DEEP = b"[" * 5_000_000 + b"]" * 5_000_000


def embed(**parts: Any) -> bytes:
    return json.dumps([[], {}, parts]).encode()


def follows(**options: Any) -> bytes:
    return embed(chain=[{"task": "x", "args": [], "kwargs": {}, "options": {"task_id": "x", **options}}])


def linked(depth: int) -> bytes:
    """A callback with a callback with a callback …"""
    one = b'{"task": "x", "args": [], "kwargs": {}, "options": {"link": ['
    return b'[[], {}, {"callbacks": [' + one * depth + b"]}}" * depth + b"]}]"


def nested(depth: int) -> list[Any]:
    """Lists in lists, as no library reads them."""
    return [nested(depth - 1)] if depth else []


class Brotli:
    """Brotli's compressor, with the others' names."""

    def __init__(self) -> None:
        self._compressor = brotli.Compressor(quality=3)
        self.compress, self.flush = self._compressor.process, self._compressor.finish


#: How to write a stream of each compression that is accepted.
SQUEEZERS: dict[str, Callable[[], Any]] = {
    "application/x-gzip": lambda: zlib.compressobj(9),
    "application/x-bz2": bz2.BZ2Compressor,
    "application/x-lzma": lambda: lzma.LZMACompressor(preset=0),
    "application/zstd": lambda: zstandard.ZstdCompressor().compressobj(),
    "application/x-brotli": Brotli,
}


def bomb(mime: str) -> bytes:
    """Half a GiB of zeros as an argument, compressed."""
    squeeze = SQUEEZERS[mime]()
    whole = squeeze.compress(b"[[") + b"".join(squeeze.compress(b"0" * (1 << 24)) for _ in range(1 << 5))
    return bytes(whole + squeeze.compress(b"],{},{}]") + squeeze.flush())


HOSTILE: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "10 MiB of brackets": (DEEP, {}, "undecodable"),
    "10 MiB of brackets among arguments": (b"[[" + DEEP + b"],{},{}]", {}, "undecodable"),
    "a gzip file of zeros": (gzip.compress(b"0" * (1 << 28)), {"compression": "application/x-gzip"}, "undecodable"),
    "a number of 10 million digits": (b"[[" + b"9" * 10_000_000 + b"],{},{}]", {}, "undecodable"),
    "a link within a link, 400 deep": (linked(400), {}, "undecodable"),
    "100 000 callbacks of no shape": (embed(callbacks=[1] * 100_000), {}, "failed"),
    "a chain that is text": (embed(chain="boom"), {}, "failed"),
    "a chord without a size": (embed(chord={"task": 1}), {}, "failed"),
    "100 KB of headers": (BODY, {"junk": "x" * 100_000}, ""),
    "10 000 headers": (BODY, {f"h{number}": 1 for number in range(10_000)}, ""),
    "headers in headers": (BODY, {"deep": {"a": {"b": {"c": {"d": [{"e": 1}] * 100}}}}}, ""),
    "an eta in the year 9999": (BODY, {"eta": "9999-12-31T23:59:59.999999+00:00"}, "waits"),
    "an eta in the year 1": (BODY, {"eta": "0001-01-01T00:00:00+14:00"}, ""),
    "an eta that is a number": (BODY, {"eta": 1e300}, "undecodable"),
    "expires in the year 1": (BODY, {"expires": "0001-01-01T00:00:00-14:00"}, "expired"),
    "an endless time limit": (BODY, {"timelimit": [1e308, 1e308]}, ""),
    "a time limit that is not a number": (BODY, {"timelimit": ["nan", None]}, "undecodable"),
    "retries beyond 64 bits, as text": (BODY, {"retries": "9" * 50}, "undecodable"),
    "2 ** 62 retries": (BODY, {"retries": 1 << 62}, ""),
    "as many retries as a header can say": (BODY, {"retries": 2**63 - 1}, "undecodable"),
    "the least number that a header can say": (BODY, {"least": -(2**63), "task": "no.such.task"}, "unknown_task"),
    "headers 100 deep": (BODY, {"deep": nested(100)}, "undecodable"),
    "130 KB of headers and an error": (BODY, {"junk": "x" * 130_000, "task": "t" * 60}, "unknown_task"),
    "130 KB of headers that fail": (embed(chain="boom"), {"junk": "x" * 130_000}, "failed"),
    "130 KB of what are a task's own headers": (BODY, {"argsrepr": "x" * 130_000, "task": "t"}, "unknown_task"),
    "a chain that goes on nowhere": (follows(queue="nowhere"), {}, "failed"),
    "an id that is a table": (BODY, {"id": {"a": 1}}, "undecodable"),
    "an id of 60 KB": (BODY, {"id": "i" * 60_000}, ""),
    "a task that is a number": (BODY, {"task": 7}, "undecodable"),
    "a task's name of 60 KB": (BODY, {"task": "t" * 60_000}, "unknown_task"),
    "a name that would be a path": (BODY, {"task": "../../etc/passwd\n\x00"}, "unknown_task"),
}  # fmt: skip
BOMBS = {f"512 MiB of zeros as {mime}": mime for mime in SQUEEZERS}


def test_there_is_a_bomb_of_each_compression_that_is_accepted() -> None:
    assert set(SQUEEZERS) == set(_COMPRESS)


@pytest.mark.fault
@pytest.mark.timeout(240)
def test_hostile_messages_harm_neither_worker_nor_other_tasks(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    worker = bench.worker("default", "-c", "2")
    (leader,) = worker.leaders()
    family = [leader, *worker.executors()]
    most = 0
    stop = threading.Event()

    def weigh() -> None:
        nonlocal most
        while not stop.wait(0.02):
            for one in family:
                try:
                    most = max(most, one.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

    scale = threading.Thread(target=weigh)
    scale.start()
    connection = pika.BlockingConnection(pika.URLParameters(bench.vhost.url))
    channel = connection.channel()
    channel.confirm_delivery()
    good, slowest = set(), 0.0
    try:
        bombs = {name: (bomb(mime), {"compression": mime}, "undecodable") for name, mime in BOMBS.items()}
        for name, (body, headers, _) in (HOSTILE | bombs).items():
            envelope = Envelope("", "", body, headers={**SOUND, **headers}, correlation_id=name)
            channel.basic_publish("amqptasks", "default", body, encode_properties(envelope))
            one = bench.send(app, "note", ignore_result=True)
            good.add(one)
            started = time.monotonic()
            wait_until(
                lambda one=one: one in bench.ledger.ids(),
                30,
                lambda name=name: f"a task after {name}\n{worker.log[-3000:]}",
            )
            slowest = max(slowest, time.monotonic() - started)
        expected = {name: reason for name, (_, _, reason) in (HOSTILE | bombs).items() if reason not in ("", "waits")}
        found = bench.vhost.dead_letters("default", len(expected), 40)
        bench.vhost.wait_settled("default", 30)
    finally:
        stop.set()
        scale.join()
        connection.close()
    letters = {
        letter["properties"]["correlation_id"]: letter["properties"]["headers"]["x-task-reason"] for letter in found
    }
    print(f"most memory {most / 1e6:.0f} MB, slowest neighbour {slowest:.2f} s")
    assert letters == expected
    assert worker.leaders() == [leader], "the leader lives on"
    assert most < 400e6
    assert slowest < 10


ASKED: list[tuple[dict[str, Any], str, str]] = [
    ({"countdown": 1e12}, "ConfigError", "after the year 9999"),
    ({"countdown": "inf"}, "ConfigError", "after the year 9999"),
    ({"countdown": "nan"}, "ConfigError", "is no number"),
    ({"countdown": 5, "queue": "@x"}, "ConfigError", "cannot be delayed"),
    ({"countdown": 5, "queue": "q" * 206}, "ConfigError", "takes 206 bytes"),
    ({"countdown": 0, "priority": "high"}, "ConfigError", "priority must be"),
    ({"countdown": 0, "priority": 5.0}, "ConfigError", "priority must be"),
    ({"countdown": 0, "queue": "typo"}, "Unroutable", "'typo'"),
]


@pytest.mark.fault
def test_whatever_a_task_asks_for_costs_itself_and_nobody_else(bench: Bench) -> None:
    """Options of a retry that no message can carry, and queues that nobody has declared."""
    app = bench.client()
    worker = bench.worker("default", "-c", "1", "--prefetch", "20")
    (leader,), (executor,) = worker.leaders(), worker.executors()
    expected = {
        app.send_task("integration.apps.jobs.asks_for", (), options).id: (exception, words)
        for options, exception, words in ASKED
    }
    nowhere = app.signature("integration.apps.jobs.noop", queue="typo").set(immutable=True)
    failed = app.signature("integration.apps.jobs.add", (20, 22)).set(immutable=True)
    expected[bench.send(app, "note", link=nowhere, link_error=failed)] = ("Unroutable", "'typo'")
    bench.wait_done({bench.send(app, "note")}, timeout=5)
    letters = bench.vhost.dead_letters("default", len(expected), 30)
    found = {one["properties"]["correlation_id"]: one["properties"]["headers"] for one in letters}
    for task_id, (exception, words) in expected.items():
        assert found[task_id]["x-task-exception"].endswith(exception), found[task_id]
        assert words in found[task_id]["x-task-exception-message"]
    wait_until(lambda: bench.ledger.entries("add=42"), 10, "the errback ran")
    bench.vhost.wait_settled("default")
    assert (worker.leaders(), worker.executors()) == ([leader], [executor])
    assert worker.stop() == 0

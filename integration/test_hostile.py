"""Messages that somebody made to do harm: in bounded memory and time each is dead-lettered, or runs as what it is."""

from __future__ import annotations

import gzip
import json
import threading
import time
import zlib
from typing import Any

import pika
import psutil
import pytest

from amqptasks.broker.wire import encode_properties
from amqptasks.message import Envelope
from amqptasks.testing.waiting import wait_until
from integration.conftest import Bench

SOUND = {"task": "integration.apps.jobs.note", "lang": "py", "id": "hostile"}
BODY = b"[[],{},{}]"
DEEP = b"[" * 5_000_000 + b"]" * 5_000_000


def embed(**parts: Any) -> bytes:
    return json.dumps([[], {}, parts]).encode()


def linked(depth: int) -> bytes:
    """A callback with a callback with a callback …"""
    one = b'{"task": "x", "args": [], "kwargs": {}, "options": {"link": ['
    return b'[[], {}, {"callbacks": [' + one * depth + b"]}}" * depth + b"]}]"


def bomb(size: int) -> bytes:
    """So many zeros as an argument, compressed."""
    squeeze = zlib.compressobj(9)
    whole = squeeze.compress(b"[[") + b"".join(squeeze.compress(b"0" * (1 << 24)) for _ in range(size >> 24))
    return whole + squeeze.compress(b"],{},{}]") + squeeze.flush()


HOSTILE: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "10 MiB of brackets": (DEEP, {}, "undecodable"),
    "10 MiB of brackets among arguments": (b"[[" + DEEP + b"],{},{}]", {}, "undecodable"),
    "2 GiB of zeros in 2 MiB": (bomb(1 << 31), {"compression": "application/x-gzip"}, "undecodable"),
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
    "an id that is a table": (BODY, {"id": {"a": 1}}, "undecodable"),
    "an id of 60 KB": (BODY, {"id": "i" * 60_000}, ""),
    "a task that is a number": (BODY, {"task": 7}, "undecodable"),
    "a task's name of 60 KB": (BODY, {"task": "t" * 60_000}, "unknown_task"),
    "a name that would be a path": (BODY, {"task": "../../etc/passwd\n\x00"}, "unknown_task"),
}  # fmt: skip


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
        for name, (body, headers, _) in HOSTILE.items():
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
        bench.vhost.wait_settled("default", 30)
    finally:
        stop.set()
        scale.join()
        connection.close()
    letters = {
        letter["properties"]["correlation_id"]: letter["properties"]["headers"]["x-task-reason"]
        for letter in bench.vhost.management.messages("default.dlq")
    }
    print(f"most memory {most / 1e6:.0f} MB, slowest neighbour {slowest:.2f} s")
    expected = {name: reason for name, (_, _, reason) in HOSTILE.items() if reason not in ("", "waits")}
    assert letters == expected
    assert worker.leaders() == [leader], "the leader lives on"
    assert most < 400e6
    assert slowest < 10

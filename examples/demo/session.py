"""One run of the demo: broker, mail server and worker around the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pika
from rich.console import Console

from amqptasks import AmqpTasks, AsyncResult, InvalidArguments, chord
from amqptasks.broker.counts import queue_counts
from examples.demo import work
from examples.demo.broker import Broker
from examples.demo.errors import DemoError
from examples.demo.letters import DeadLetters
from examples.demo.report import Report
from examples.demo.results import Check, Plan, checks, picture_sizes
from examples.demo.sink import MailSink
from examples.demo.watch import Goal, watch
from examples.demo.worker import CONFIG, QUEUES, Worker, read_log, summary
from examples.shop import app, ledger, media, payment, places, weblog

__all__ = ["DEAD", "Session", "borrowed_queues", "environment", "prepare"]

DEAD = tuple(f"{queue}.dlq" for queue in QUEUES)


def environment(broker: Broker, folder: Path, sink: MailSink) -> dict[str, str]:
    """What the shop's processes read from their environment."""
    return {
        # The environment wins over the file, whatever variable the file names.
        "AMQPTASKS_BROKER__URL": broker.url,
        "SHOP_HOME": str(folder / "shop"),
        "SHOP_SMTP": sink.address,
    }


def prepare(folder: Path) -> Plan:
    """Make up the work: the log file, and lists of pictures and orders."""
    log = folder / "access.log"
    truth = work.write_log(log)
    return Plan(truth, list(work.batches(log)), work.pictures(), work.orders())


@contextmanager
def borrowed_queues(broker: Broker) -> Iterator[None]:
    """Declare the shop's queues; on a broker that is not ours, take away afterwards what was not there before.

    Raises `DemoError` when one of the queues is in use: its messages are not ours to run or to count.
    """
    names = [queue.name for queue in app.topology.queues]
    before = queue_counts(app.settings.broker, names)
    for name, counts in before.items():
        if counts is not None and counts != (0, 0):
            raise DemoError(
                f"queue {name!r} is in use on this broker ({counts[0]} messages, {counts[1]} consumers): "
                "give the demo a virtual host of its own"
            )
    app.declare()
    try:
        yield
    finally:
        app.close()
        if not broker.own and all(counts is None for counts in before.values()):
            _delete_topology(broker.url)


def _delete_topology(url: str) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    for queue in app.topology.queues:
        channel.queue_delete(queue.name)
    for exchange in app.topology.exchanges:
        channel.exchange_delete(exchange.name)
    connection.close()


def _publish_from_elsewhere() -> int:
    """Two calls from a program that has not the tasks' code: what is wrong with them shows at the worker."""
    elsewhere = AmqpTasks("elsewhere", config=CONFIG)
    try:
        elsewhere.send_task("payment.charge", [0, "a lot", {"brand": "visa", "last4": "0000"}, "nobody@mail.example"])
        elsewhere.send_task("payment.refund", [1])
    finally:
        elsewhere.close()
    return 2


class Session:
    """Publishes the work, waits for its results and adds them up."""

    def __init__(
        self, plan: Plan, broker: Broker, dead: DeadLetters, sink: MailSink, worker: Worker, console: Console
    ) -> None:
        self._plan = plan
        self._broker = broker
        self._dead = dead
        self._sink = sink
        self._worker = worker
        self._console = console
        self.published = 0
        self.publish_seconds = 0.0
        self.refused = ""
        self.sheet: AsyncResult[Any] | None = None
        self._ending: list[Check] = []

    def publish(self) -> None:
        """Send all the work. Each call returns after the broker's confirm."""
        started = time.monotonic()
        plan = self._plan
        parts = [weblog.parse.s(batch, lines) for batch, lines in plan.batches]
        drawings = [media.make.s(one.name, one.seed, one.width, one.height) for one in plan.pictures]
        charges = [
            payment.charge.s(
                order.number, order.amount, payment.Card(brand=order.brand, last4=order.last4), order.address
            )
            for order in plan.orders
        ]
        for calls in (parts, charges):
            self.published += len(app.send_many(calls))
        # All pictures, and when they are drawn, a sheet of them.
        self.sheet = chord(drawings, media.sheet.s()).delay()
        self.published += len(drawings)
        self.published += _publish_from_elsewhere()
        self.publish_seconds = time.monotonic() - started
        card = payment.Card(brand=payment.Brand.VISA, last4="0000")
        try:
            payment.charge.delay(0, Decimal("-5"), card, "nobody@mail.example")
        except InvalidArguments as error:
            self.refused = str(error)

    def watch(self) -> float:
        """Wait until everything is done, by looking at the results. Returns seconds."""
        plan, database, pictures = self._plan, places.database(), places.images()
        goals = [
            Goal("orders charged", len(plan.orders), lambda: ledger.count(database, "charge")),
            Goal(
                "pictures",
                len(plan.pictures) + plan.thumbnails,
                lambda: sum(1 for _ in pictures.glob("*.jpg")) if pictures.exists() else 0,
            ),
            Goal("contact sheet", len(plan.pictures), self._on_the_sheet),
            Goal("log (low priority)", len(plan.batches), lambda: ledger.count(database, "batch")),
            Goal("mails delivered", plan.deliverable, lambda: self._sink.delivered),
            Goal("dead letters", plan.undeliverable + 2, self._dead.count),
        ]
        return watch(goals, self._console, self._worker.check)

    def _on_the_sheet(self) -> int:
        """How many pictures the task says it has put there."""
        said = None if self.sheet is None else self.sheet.info
        if isinstance(said, dict):
            said = said["done"]
        return said if isinstance(said, int) else 0

    def stop_worker(self) -> None:
        """Stop the worker; its exit code, and that it left nothing in its queues, become part of the report."""
        code = self._worker.stop()
        left = {name: counts[0] for name, counts in queue_counts(app.settings.broker, QUEUES).items() if counts}
        self._ending = [
            Check("worker's exit code", 0, code),
            Check("pictures on the sheet", len(self._plan.pictures), self._on_the_sheet()),
            Check("messages left in queues", dict.fromkeys(QUEUES, 0), left),
        ]

    def report(self, work_seconds: float) -> Report:
        """Add up what is there now."""
        dead = self._dead.read()
        database, pictures = places.database(), places.images()
        return Report(
            broker=self._broker,
            published=self.published,
            publish_seconds=self.publish_seconds,
            work_seconds=work_seconds,
            refused_at_call=self.refused,
            log=ledger.log_totals(database),
            revenue=str(ledger.revenue(database)),
            mails=self._sink.delivered,
            mails_repeated=self._sink.repeated,
            pictures=picture_sizes(pictures),
            ran=summary(read_log(self._worker.log)),
            letters=dead,
            checks=checks(self._plan, database, pictures, self._sink, dead) + self._ending,
        )

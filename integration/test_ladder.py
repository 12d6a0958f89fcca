"""The delay ladder under load, over years, and while the broker and the queues behind it come and go.

What a single message does, and what may not block a level, is in `integration/test_topology.py`; the arithmetic in
`tests/topology/test_delay_ladder.py`.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pika
import pytest
from pika.exceptions import AMQPError

from amqptasks import AmqpTasks
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from amqptasks.topology.delays import LADDER_LEVELS, LADDER_MAX_SECONDS, TICK_SECONDS, level_name, ticks
from integration.conftest import Bench
from integration.seeds import VARIABLE, run_seed
from integration.strangers import strange_channel

YEAR = 365 * 86400.0
COUNTS = "queues/{vhost}?disable_stats=true&enable_queue_totals=true"


class Arrivals:
    """Takes everything from a queue in a thread of its own, across reconnects: (task id, seconds after its eta)."""

    def __init__(self, url: str, queue: str = "default") -> None:
        self._url, self._queue = url, queue
        self.late: list[tuple[str, float]] = []
        self.came: list[tuple[str, datetime]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def ids(self) -> set[str]:
        return {task_id for task_id, _ in self.late}

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(AMQPError, OSError):
                connection = pika.BlockingConnection(pika.URLParameters(self._url))
                channel = connection.channel()
                channel.basic_consume(self._queue, self._take)
                while not self._stop.is_set():
                    connection.process_data_events(0.1)
                connection.close()
            self._stop.wait(0.1)

    def _take(self, channel: Any, method: Any, properties: pika.BasicProperties, _body: bytes) -> None:
        now = datetime.now(UTC)
        self.came.append((properties.correlation_id, now))
        if (eta := properties.headers.get("eta")) is not None:  # one that was due when it was sent was not delayed
            self.late.append((properties.correlation_id, (now - datetime.fromisoformat(eta)).total_seconds()))
        channel.basic_ack(method.delivery_tag)

    def __enter__(self) -> Arrivals:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)


def send_delayed(app: AmqpTasks, delays: list[float]) -> set[str]:
    """Publish one call for each delay; the ids."""
    return set(send_each(app, delays))


def send_each(app: AmqpTasks, delays: list[float]) -> list[str]:
    """The same, with the ids in the order of the delays."""
    calls = [app.signature("late", (), countdown=delay, ignore_result=True) for delay in delays]
    return [result.id for result in app.send_many(calls)]


SECONDS, STEP, ROUNDS = 10, 0.1, 3


def offer(app: AmqpTasks, dice: random.Random, rate: int) -> dict[str, datetime]:
    """Calls by the clock, each due from when it was to be made: a publisher that falls behind makes them late."""

    def send(planned: datetime, delays: list[float]) -> dict[str, datetime]:
        etas = [planned + timedelta(seconds=delay) for delay in delays]
        calls = [app.signature("late", (), eta=eta, ignore_result=True) for eta in etas]
        return {result.id: eta for result, eta in zip(app.send_many(calls), etas, strict=True)}

    with ThreadPoolExecutor(4) as publishers:
        start, begun = datetime.now(UTC), time.monotonic()
        sends = []
        for step in range(int(SECONDS / STEP)):
            time.sleep(max(0.0, begun + step * STEP - time.monotonic()))
            delays = [dice.uniform(0.5, 10.0) for _ in range(int(rate * STEP))]
            sends.append(publishers.submit(send, start + timedelta(seconds=step * STEP), delays))
        return {task_id: eta for one in sends for task_id, eta in one.result().items()}


def come_in_time(bench: Bench, rate: int) -> None:
    """At the rate that is offered. What holds always is asked of each round; how late they are, which other work on the
    machine decides with, of one of three."""
    seed = run_seed()
    print(f"{VARIABLE}={seed}")
    dice = random.Random(seed)
    app = bench.client()
    app.declare()
    found = []
    for _ in range(ROUNDS):
        with Arrivals(bench.vhost.url) as arrivals:
            due = offer(app, dice, rate)
            assert len(due) == rate * SECONDS
            what = lambda arrivals=arrivals: f"{len(arrivals.came)} have come"  # noqa: E731
            wait_until(lambda arrivals=arrivals: len(arrivals.came) >= rate * SECONDS, 60, what)
        late = sorted((at - due[task_id]).total_seconds() for task_id, at in arrivals.came)
        found.append(late[int(len(late) * 0.99)])
        print(f"{rate}/s; late: median {late[len(late) // 2]:.3f} s, p99 {found[-1]:.3f} s, max {late[-1]:.3f} s")
        assert len({task_id for task_id, _ in arrivals.came}) == len(due) == len(late), "one arrived twice"
        assert late[0] >= 0, "one came early"
        if found[-1] <= 1.0:
            break
    assert min(found) <= 1.0


@pytest.mark.timing
@pytest.mark.timeout(240)
def test_hundreds_of_delayed_tasks_a_second_come_never_early_and_within_a_second(bench: Bench) -> None:
    come_in_time(bench, 250)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_thousand_delayed_tasks_a_second_come_never_early_and_within_a_second(bench: Bench) -> None:
    """They pass some five queues each, which takes most of one core: with other work on two cores they are late."""
    come_in_time(bench, 1000)


def passed(properties: pika.BasicProperties) -> set[int]:
    """The levels that a message has waited on, as the broker notes them."""
    return {int(death["queue"].rpartition(".")[2]) for death in (properties.headers or {}).get("x-death", [])}


def boundaries(dice: random.Random) -> list[float]:
    """Delays of up to eight seconds, on both sides of where one tick, or one level, becomes the next."""
    powers = [TICK_SECONDS * 2**n for n in range(7)]
    edges = [edge + step for edge in powers for step in (-0.001, 0.0, 0.001)]
    sums = [edge + TICK_SECONDS for edge in powers[1:]] + [edge - TICK_SECONDS for edge in powers[2:]]
    return [0.001, *edges, *sums, *(dice.uniform(0.001, 8.0) for _ in range(50))]


@pytest.mark.timing
def test_delays_at_the_edges_of_levels_take_the_levels_of_the_model_and_come_on_time(bench: Bench) -> None:
    """Each message passes the queues of the bits of its ticks and no others, and comes after its delay."""
    seed = run_seed()
    print(f"{VARIABLE}={seed}")
    delays = boundaries(random.Random(seed))
    app = bench.client()
    app.declare()
    sent = dict(zip(send_each(app, delays), delays, strict=True))
    late: dict[int, list[float]] = {}
    connection = pika.BlockingConnection(pika.URLParameters(bench.vhost.url))
    for method, properties, _ in connection.channel().consume("default", inactivity_timeout=20):
        assert method is not None, f"{len(sent)} have not come: {sorted(sent.values())}"
        due = datetime.fromisoformat(properties.headers["eta"])
        delay = sent.pop(properties.correlation_id)
        count = ticks(delay)
        assert passed(properties) == {bit for bit in range(LADDER_LEVELS) if count >> bit & 1}, delay
        # From when it was due with its delay rounded up to the next tick.
        seconds = (datetime.now(UTC) - due).total_seconds()
        assert seconds >= 0, f"{delay} s came early"
        late.setdefault(count.bit_count(), []).append(seconds - (count * TICK_SECONDS - delay))
        if not sent:
            break
    connection.close()
    for hops, found in sorted(late.items()):
        print(f"{hops} queues: median {statistics.median(found) * 1000:.1f} ms later than the tick, of {len(found)}")
    assert min(min(found) for found in late.values()) < 1.0


def test_delays_beyond_what_a_test_can_wait_for_enter_the_level_of_the_model(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    powers = [TICK_SECONDS * 2**n for n in range(12, LADDER_LEVELS)]
    delays = [edge + step for edge in powers for step in (-TICK_SECONDS, 0.0, 0.001)]
    delays += [LADDER_MAX_SECONDS, LADDER_MAX_SECONDS + 0.001, YEAR, 8 * YEAR]
    expected = Counter(level_name("amqptasks", ticks(delay).bit_length() - 1) for delay in delays)
    assert expected[level_name("amqptasks", LADDER_LEVELS - 1)] == 2 + 4, "the longest enter the top"
    send_each(app, delays)

    def found() -> dict[str, int]:
        queues = bench.vhost.management.request("GET", COUNTS.format(vhost=bench.vhost.name))
        levels = {one["name"]: one.get("messages", 0) for one in queues if ".delay." in one["name"]}
        return {name: count for name, count in levels.items() if count}

    wait_until(lambda: found() == expected, 15, lambda: f"{found()}, not {expected}", pause=0.2)


def test_a_delay_of_minutes_to_eight_years_waits_on_its_level_for_its_eta(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    counts = bench.vhost.management.counts
    for delay in (90.0, 3600.0, 86400.0, 40 * 86400.0, LADDER_MAX_SECONDS + 1, YEAR, 8 * YEAR):
        level = level_name("amqptasks", ticks(delay).bit_length() - 1)
        before = sum(counts(level))
        due = time.time() + delay
        send_delayed(app, [delay])
        wait_until(
            lambda level=level, before=before: sum(counts(level)) == before + 1, 10, f"{delay:g} s is in {level}"
        )
        etas = [
            datetime.fromisoformat(message["properties"]["headers"]["eta"]).timestamp()
            for message in bench.vhost.management.messages(level)
        ]
        assert min(abs(eta - due) for eta in etas) < 5


def test_a_task_of_next_year_that_has_come_down_the_ladder_is_sent_up_again(bench: Bench) -> None:
    """After 48.5 days, which is the ladder's length: a worker receives it early and does not run it."""
    app = bench.client()
    app.declare()
    task_id = bench.send(app, "note", countdown=YEAR)
    top = level_name("amqptasks", 24)
    counts = bench.vhost.management.counts
    wait_until(lambda: sum(counts(top)) == 1, 10, "it is on the ladder")
    with strange_channel(bench.vhost.url) as channel:
        _, properties, body = channel.basic_get(top, auto_ack=True)
        channel.basic_publish("amqptasks", "default", body, properties)
    worker = bench.worker()
    bench.wait_done({bench.send(app, "note")})
    bench.vhost.wait_settled("default")
    wait_until(lambda: sum(counts(top)) == 1, 10, "it is on the ladder again")
    (again,) = bench.vhost.management.messages(top)
    assert again["properties"]["correlation_id"] == task_id
    assert again["properties"]["headers"]["eta"] == properties.headers["eta"]
    assert task_id not in bench.ledger.ids("begin")
    assert worker.stop() == 0


@pytest.mark.fault
def test_delayed_messages_of_a_queue_that_was_deleted_meanwhile_are_kept_as_unroutable(bench: Bench) -> None:
    bench.settings["queues"]["email"] = {}
    app = bench.client()
    app.declare()
    calls = [app.signature("late", (), countdown=6.0, queue="email") for _ in range(50)]
    sent = {result.id for result in app.send_many(calls)}
    other = send_delayed(app, [6.0])
    bench.vhost.management.delete_queue("email")
    management = bench.vhost.management
    wait_until(lambda: sum(management.counts("amqptasks.unroutable")) == 50, 30, "all are kept", pause=0.2)
    assert {one["properties"]["correlation_id"] for one in management.messages("amqptasks.unroutable")} == sent
    wait_until(lambda: management.counts("default") == (1, 0), 15, "the others arrive")
    assert management.messages("default")[0]["properties"]["correlation_id"] in other


@pytest.fixture
def alone(node: PrivateNode) -> Iterator[AmqpTasks]:
    """An app on a node of its own, with queues that are old enough for a kill (docs/guarantees.md)."""
    app = AmqpTasks("delays", config={"broker": {"url": node.url, "publish_timeout": 60}})
    app.declare()
    time.sleep(1.5)
    yield app
    app.close()


@pytest.mark.fault
@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["killed", "restarted"])
def test_delayed_messages_survive_a_broker_that_goes_while_they_wait(
    node: PrivateNode, alone: AmqpTasks, how: str
) -> None:
    dice = random.Random(7)
    sent = send_delayed(alone, [dice.uniform(0.5, 15.0) for _ in range(500)])
    with Arrivals(node.url) as arrivals:
        wait_until(lambda: len(arrivals.late) > 30, 20, "some have arrived")
        if how == "killed":
            node.kill()
            node.start()
        else:
            node.restart()
        wait_until(lambda: sent <= arrivals.ids, 40, lambda: f"{len(sent - arrivals.ids)} of {len(sent)} are lost")
    assert min(seconds for _, seconds in arrivals.late) >= 0, "one came early"
    print(f"{how}: {len(arrivals.late) - len(sent)} arrived again")


def test_a_task_that_was_delayed_may_be_delayed_the_same_way_any_number_of_times(bench: Bench) -> None:
    """RabbitMQ 3 takes a message with copied ``x-death`` for one that goes in circles, and drops it or holds it."""
    app = bench.client()
    task_id = bench.send(app, "recovers", 6, countdown=0.25)
    bench.worker()
    bench.wait_done({task_id})
    assert len([one for one in bench.ledger.entries("try") if one.task_id == task_id]) == 7
    assert sum(bench.vhost.management.counts("amqptasks.unroutable")) == 0


def test_an_expiry_does_not_let_a_delayed_message_out_early(bench: Bench) -> None:
    """The property ``expiration``, shorter than a level's time, would move the message on before its time."""
    app = bench.client()
    app.declare()
    sent = time.time()
    task_id = bench.send(app, "note", countdown=1.0, expires=30, ignore_result=True)
    never = bench.send(app, "note", countdown=1.0, expires=0.2, ignore_result=True)
    for level in ("03", "04"):
        for message in bench.vhost.management.messages(f"amqptasks.delay.{level}"):
            assert "expiration" not in message["properties"]
    bench.worker()
    bench.wait_done({task_id})
    assert bench.ledger.entries("begin")[0].at >= sent + 1.0
    letter = bench.vhost.dead_letters("default", 1)[0]
    assert letter["properties"]["correlation_id"] == never
    assert never not in bench.ledger.ids("begin")

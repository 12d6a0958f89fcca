"""Truth at publish: what returned is in the broker, what is not in the broker raised."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from amqptasks import AmqpTasks, BrokerBlocked, Nacked, PublishError, Unroutable
from amqptasks.broker.admin import declare
from amqptasks.broker.publisher import Publisher
from amqptasks.config import BrokerSettings
from amqptasks.errors import AccessRefused, BrokerUnreachable, PublishTimeout, SerializationError
from amqptasks.message import Envelope
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.rabbitmq import PrivateNode, free_port
from amqptasks.testing.waiting import wait_until
from amqptasks.topology.entities import Queue, Topology, freeze_arguments
from integration.conftest import Bench, VirtualHost


def waiting_ids(bench: Bench, count: int) -> list[str]:
    return [one["properties"]["correlation_id"] for one in bench.vhost.management.messages("default", count)]


def test_a_call_that_returned_stands_in_the_queue_as_a_persistent_message(bench: Bench) -> None:
    app = bench.client()
    result = app.send_task("shop.charge", (1, "9.99"), priority=3, headers={"tenant": "a", "ratio": 0.5})
    message = bench.vhost.management.messages("default")[0]
    properties = message["properties"]
    assert properties["correlation_id"] == result.id
    assert properties["delivery_mode"] == 2
    assert properties["priority"] == 3
    assert (properties["headers"]["tenant"], properties["headers"]["ratio"]) == ("a", 0.5)
    assert (message["exchange"], message["routing_key"]) == ("amqptasks", "default")


@pytest.mark.fault
def test_a_full_queue_refuses_and_the_caller_is_told(bench: Bench) -> None:
    bench.settings["queues"] = {"default": {"max_length": 1}}
    app = bench.client()

    def overfill() -> None:
        for _ in range(10):
            app.send_task("shop.charge", retry=False)

    with pytest.raises(Nacked, match="the queue is full"):
        overfill()
    assert bench.vhost.ready("default") < 10


@pytest.mark.fault
def test_eight_threads_publish_while_the_connection_is_cut_and_nothing_that_returned_is_lost(
    bench: Bench, proxy: TcpProxy, through_proxy: str
) -> None:
    bench.client().declare()
    app = AmqpTasks("threads", config=bench.config, broker=through_proxy)
    confirmed: list[str] = []
    unknown: list[PublishError] = []
    stop = threading.Event()

    def publish() -> None:
        while not stop.is_set():
            try:
                confirmed.append(app.send_task("shop.charge").id)
            except PublishError as error:
                unknown.append(error)

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(publish) for _ in range(8)]
        try:
            for _ in range(10):
                time.sleep(0.2)
                proxy.cut()
            wait_until(lambda: len(confirmed) > 500, 30, lambda: f"more than {len(confirmed)} are confirmed")
        finally:
            stop.set()
        for one in running:
            one.result()
    app.close()
    assert len(set(confirmed)) == len(confirmed)
    wait_until(lambda: set(confirmed) <= set(waiting_ids(bench, 100_000)), 20, "all are in the queue", pause=0.5)
    print(f"{len(confirmed)} confirmed, {len(unknown)} raised, {bench.vhost.ready('default')} in the queue")


def test_many_calls_wait_once_for_all_confirms(bench: Bench) -> None:
    app = bench.client()
    results = app.send_many([app.signature("shop.charge", (number,)) for number in range(3000)])
    assert len({result.id for result in results}) == 3000
    assert bench.vhost.ready("default") == 3000


def test_of_many_calls_those_that_failed_are_named(bench: Bench) -> None:
    app = bench.client()
    calls = [
        app.signature("shop.charge"),
        app.signature("shop.charge").set(queue="nobody"),
        app.signature("shop.charge"),
    ]
    with pytest.raises(Unroutable) as caught:
        app.send_many(calls)
    assert [index for index, _ in caught.value.failed] == [1]
    assert bench.vhost.ready("default") == 2


def test_of_many_calls_none_is_published_when_one_cannot_be_written(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    with pytest.raises(Exception, match="cannot be serialized"):
        app.send_many([app.signature("shop.charge"), app.signature("shop.charge", (object(),))])
    assert bench.vhost.ready("default") == 0


@pytest.mark.timing
@pytest.mark.fault
def test_a_stalled_broker_raises_at_the_deadline_and_a_later_call_works(
    bench: Bench, proxy: TcpProxy, through_proxy: str
) -> None:
    bench.client().declare()
    bench.settings["broker"].update(publish_timeout=1.5, heartbeat=2)
    app = AmqpTasks("stalled", config=bench.config, broker=through_proxy)
    app.send_task("shop.charge")
    proxy.stall()
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(PublishError) as caught:
            app.send_task("shop.charge")
        assert time.monotonic() - started < 2.0
        assert caught.value.sent or caught.value.__cause__ is not None
    proxy.resume()
    wait_until(lambda: _works(app), 15, "the next call works")
    app.close()


def _works(app: AmqpTasks) -> bool:
    try:
        app.send_task("shop.charge")
    except PublishError:
        return False
    return True


@pytest.mark.timing
@pytest.mark.fault
def test_an_alarm_raises_broker_blocked_and_a_later_call_works(node: PrivateNode) -> None:
    app = AmqpTasks("alarm", config={"broker": {"url": node.url, "blocked_timeout": 1, "publish_timeout": 20}})
    app.send_task("shop.charge")
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.00001")

    def publish_into_the_alarm() -> None:
        # The broker tells a connection only when it publishes: the first message may still pass.
        for _ in range(3):
            app.send_task("shop.charge")

    with pytest.raises(BrokerBlocked, match="alarm"):
        publish_into_the_alarm()
    started = time.monotonic()
    with pytest.raises(BrokerBlocked):
        app.send_task("shop.charge")
    assert time.monotonic() - started < 2
    node.rabbitmqctl("set_vm_memory_high_watermark", "0.6")
    wait_until(lambda: _works(app), 10, "the next call works")
    app.close()


@pytest.mark.fault
def test_a_message_that_is_too_large_harms_no_other(bench: Bench) -> None:
    bench.settings["broker"]["publish_timeout"] = 30
    app = bench.client()
    app.send_task("shop.charge")
    limit = 134_217_728  # RabbitMQ 3.10; 4.x takes less
    with pytest.raises(PublishError, match="limit is"):
        app.send_task("shop.charge", ("x" * (limit + 10),))
    app.send_task("shop.charge")
    assert bench.vhost.ready("default") == 2


def test_processes_forked_after_a_publish_have_connections_of_their_own(bench: Bench) -> None:
    app = bench.client()
    app.send_task("shop.charge")
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for _ in range(100):
                    app.send_task("shop.charge")
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    for _ in range(100):
        app.send_task("shop.charge")
    for pid in children:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    app.send_task("shop.charge")
    assert bench.vhost.ready("default") == 502


def test_a_program_that_published_ends_by_itself(bench: Bench) -> None:
    program = f"""
    from amqptasks import AmqpTasks
    app = AmqpTasks("short", config={str(bench.config)!r})
    print(app.send_task("shop.charge").id)
    """
    started = time.monotonic()
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert time.monotonic() - started < 6
    assert waiting_ids(bench, 10) == [done.stdout.strip()]


def test_one_connection_serves_all_threads(bench: Bench) -> None:
    app = bench.client()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: app.send_task("shop.charge"), range(200)))
    wait_until(lambda: len(bench.vhost.management.connections()) == 1, 10, "one connection")
    assert bench.vhost.ready("default") == 200


# --- the publisher by itself ----------------------------------------------------------------------------------------

WORK = Topology((), (Queue("work", arguments=freeze_arguments({"x-queue-type": "quorum"})),), ())


def message(key: str = "work", **options: Any) -> Envelope:
    return Envelope("", key, b"{}", correlation_id=str(uuid.uuid4()), **options)


class Publishers:
    """Publishers for the queue `work`, closed afterwards."""

    def __init__(self, vhost: VirtualHost) -> None:
        self._vhost = vhost
        self._made: list[Publisher] = []
        declare(WORK, self.settings())

    def settings(self, **broker: Any) -> BrokerSettings:
        return BrokerSettings.model_validate({"url": self._vhost.url, **broker})

    def __call__(self, *, options: dict[str, Any] | None = None, **broker: Any) -> Publisher:
        made = Publisher(self.settings(**broker), **(options or {}))
        self._made.append(made)
        return made

    def close(self) -> None:
        for made in self._made:
            made.close()


@pytest.fixture
def publishers(vhost: VirtualHost) -> Iterator[Publishers]:
    made = Publishers(vhost)
    yield made
    made.close()


@pytest.fixture
def blackhole() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def with_port(url: str, port: int) -> str:
    return f"{url.rpartition('@')[0]}@127.0.0.1:{port}/{url.rpartition('/')[2]}"


@pytest.mark.timing
@pytest.mark.fault
@pytest.mark.parametrize("trouble", ["closed", "blackholed", "password", "vhost"])
def test_each_trouble_has_its_own_error_in_time_at_the_first_and_second_call(
    trouble: str, publishers: Publishers, vhost: VirtualHost, blackhole: int
) -> None:
    url, kind, cause, words = {
        "closed": (with_port(vhost.url, free_port()), PublishError, BrokerUnreachable, "connection refused"),
        "blackholed": (with_port(vhost.url, blackhole), PublishTimeout, BrokerUnreachable, "no answer in time"),
        "password": (vhost.url.replace(":guest@", ":wrong@"), PublishError, AccessRefused, "user name or password"),
        "vhost": (vhost.url.replace(vhost.name, "nowhere"), PublishError, AccessRefused, "'nowhere' does not exist"),
    }[trouble]
    publisher = publishers(url=url, publish_timeout=3, publish_retry={"interval_max": 0.3})
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(kind, match=words) as caught:
            publisher.publish(message())
        assert time.monotonic() - started < 3.5
        assert isinstance(caught.value.__cause__, cause)
        assert not caught.value.sent


@pytest.mark.timing
def test_retries_keep_their_pace_however_many_threads_ask(publishers: Publishers, vhost: VirtualHost) -> None:
    publisher = publishers(url=with_port(vhost.url, free_port()))
    policy = {"max_retries": 3, "interval_start": 0.3, "interval_step": 0}
    waited: list[float] = []

    def publish(start: float) -> None:
        time.sleep(start)
        started = time.monotonic()
        with pytest.raises(PublishError, match="connection refused"):
            publisher.publish(message(), retry_policy=policy)
        waited.append(time.monotonic() - started)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(publish, [number * 0.02 for number in range(20)]))
    assert min(waited) > 0.8
    assert max(waited) < 2.5


@pytest.mark.fault
def test_a_live_node_is_found_behind_a_dead_and_a_silent_one(
    publishers: Publishers, vhost: VirtualHost, blackhole: int
) -> None:
    nodes = [with_port(vhost.url, free_port()), with_port(vhost.url, blackhole), vhost.url]
    publisher = publishers(url=nodes, connection_timeout=1, publish_timeout=5)
    publisher.publish(message(), retry=False)
    assert vhost.ready("work") == 1


@pytest.mark.fault
def test_a_node_that_falls_silent_is_left_long_before_its_heartbeat_is_due(
    publishers: Publishers, vhost: VirtualHost, proxy: TcpProxy, through_proxy: str
) -> None:
    broker = {"url": [through_proxy, vhost.url], "heartbeat": 600}
    while True:
        publisher = publishers(**broker)
        publisher.publish(message())
        if proxy.connections:
            break
    proxy.stall()
    started = time.monotonic()
    while publisher.publish_many([message()], timeout=1.5) != [None]:
        assert time.monotonic() - started < 15
    assert 4 < time.monotonic() - started < 10
    publisher.publish(message())


@pytest.mark.fault
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expiration": "soon"}, "invalid expiration"),
        ({"headers": {"trace": "x" * 140_000}}, "do not fit a frame"),
        ({"exchange": "nowhere"}, "exchange 'nowhere' does not exist"),
        ({"routing_key": "nowhere"}, "routing key 'nowhere'"),
    ],
)
def test_of_many_messages_the_one_that_the_broker_refuses_fails_alone(
    options: dict[str, Any], words: str, publishers: Publishers, vhost: VirtualHost
) -> None:
    publisher = publishers()
    many = [message() for _ in range(500)]
    for name, value in options.items():
        setattr(many[250], name, value)
    outcomes = publisher.publish_many(many)
    failed = [index for index, error in enumerate(outcomes) if error is not None]
    assert failed == [250]
    assert words in str(outcomes[250])
    ids = Counter(one["properties"]["correlation_id"] for one in vhost.management.messages("work", 5000))
    assert {one.correlation_id for one in many} - set(ids) == {many[250].correlation_id}
    publisher.publish(message())


def test_an_address_that_cannot_be_written_is_told_at_once_and_harms_nobody(publishers: Publishers) -> None:
    publisher = publishers()
    for key in ("k" * 256, "\ud800"):
        with pytest.raises((SerializationError, PublishError), match=r"AMQP allows 255|cannot be written"):
            publisher.publish(message(key))
        publisher.publish(message(), timeout=2)


def test_a_channel_is_replaced_when_messages_are_refused_but_not_once_a_message(
    publishers: Publishers, vhost: VirtualHost
) -> None:
    arguments = freeze_arguments({"x-queue-type": "quorum", "x-max-length": 1, "x-overflow": "reject-publish"})
    declare(Topology((), (Queue("full", arguments=arguments),), ()), publishers.settings())
    publisher = publishers(publish_retry={"max_retries": 1})
    outcomes = publisher.publish_many([message("full") for _ in range(2000)])
    assert sum(isinstance(error, Nacked) for error in outcomes) > 500
    publisher.publish(message())
    path = f"vhosts/{vhost.name}/channels"
    wait_until(lambda: vhost.management.request("GET", path), 10, "the management API knows the channel", pause=0.2)
    numbers = {one["number"] for one in vhost.management.request("GET", path)}
    assert numbers <= {1, 2, 3}
    assert numbers != {1}


def test_a_declaration_that_takes_its_time_holds_up_nobody_else(publishers: Publishers) -> None:
    started, release = threading.Event(), threading.Event()
    late = Queue("late", arguments=freeze_arguments({"x-queue-type": "quorum"}))

    def slow() -> None:
        started.set()
        release.wait(10)
        declare(Topology((), (late,), ()), publishers.settings())

    publisher = publishers(options={"declare": slow, "knows_route": lambda _exchange, key: key == "late"})
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(publisher.publish, message("late")) for _ in range(2)]
        assert started.wait(5)
        for _ in range(20):
            publisher.publish(message(), timeout=1)
        assert not any(one.done() for one in waiting)
        release.set()
        for one in waiting:
            one.result(5)


@pytest.mark.timing
def test_closing_lets_nobody_wait_for_ever_and_the_next_call_connects_again(
    publishers: Publishers, proxy: TcpProxy, through_proxy: str
) -> None:
    publisher = publishers(url=through_proxy, publish_timeout=30)
    publisher.publish(message())
    proxy.stall()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(publisher.publish, message()) for _ in range(4)]
        time.sleep(0.3)
        started = time.monotonic()
        publisher.close()
        for one in waiting:
            error = one.exception(3)
            assert isinstance(error, PublishError)
            assert "was closed" in str(error)
            assert error.sent
        assert time.monotonic() - started < 2
    proxy.resume()
    publisher.publish(message())


def test_a_child_holds_nothing_of_its_parents_connection(vhost: VirtualHost, publishers: Publishers) -> None:
    program = f"""
    import os, sys, time
    from amqptasks.broker.publisher import Publisher
    from amqptasks.config import BrokerSettings
    from amqptasks.message import Envelope
    publisher = Publisher(BrokerSettings(url={vhost.url!r}))
    publisher.publish(Envelope("", "work", b"{{}}"))
    if os.fork() == 0:
        time.sleep(15)
        os._exit(0)
    os._exit(0)  # as if killed: whoever still holds the socket keeps the connection up
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], start_new_session=True) as parent:
        try:
            assert parent.wait(10) == 0
            wait_until(lambda: vhost.ready("work") == 1, 5, "published")
            wait_until(lambda: not vhost.management.connections(), 8, "the connection ended with the parent")
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.timing
@pytest.mark.fault
def test_an_exit_while_the_broker_is_silent_takes_no_longer_than_a_second(
    publishers: Publishers, proxy: TcpProxy, through_proxy: str
) -> None:
    program = f"""
    import sys, threading, time
    from amqptasks.broker.publisher import Publisher
    from amqptasks.config import BrokerSettings
    from amqptasks.message import Envelope
    publisher = Publisher(BrokerSettings(url={through_proxy!r}))
    publisher.publish(Envelope("", "work", b"{{}}"))
    print("ready", flush=True)
    sys.stdin.readline()
    threading.Thread(target=publisher.publish, args=(Envelope("", "work", b"{{}}"),), daemon=True).start()
    time.sleep(0.2)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        proxy.stall()
        started = time.monotonic()
        child.stdin.close()
        assert child.wait(10) == 0
        assert time.monotonic() - started < 2.5


# --- asyncio ---------------------------------------------------------------------------------------------------------


async def test_awaiting_publishes_and_the_loop_goes_on(bench: Bench) -> None:
    app = bench.client()
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    results = await asyncio.gather(*(app.asend_task("shop.charge", (number,)) for number in range(200)))
    ticking.cancel()
    await app.aclose()
    assert len({result.id for result in results}) == 200
    assert turns > 10
    assert bench.vhost.ready("default") == 200


async def test_awaiting_raises_what_calling_raises(bench: Bench) -> None:
    bench.settings["queues"] = {"default": {"max_length": 1}}
    app = bench.client()
    with pytest.raises(Unroutable, match="'nobody'"):
        await app.asend_task("shop.charge", queue="nobody")

    async def overfill() -> None:
        for _ in range(10):
            await app.asend_task("shop.charge", retry=False)

    with pytest.raises(Nacked):
        await overfill()
    await app.aclose()


@pytest.mark.timing
@pytest.mark.fault
async def test_awaiting_a_broker_that_is_down_ends_in_time_and_does_not_block_the_loop() -> None:
    app = AmqpTasks(
        "down", config={"broker": {"url": f"amqp://guest:x@127.0.0.1:{free_port()}/", "publish_timeout": 1}}
    )
    started = time.monotonic()
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    ticking = asyncio.create_task(tick())
    with pytest.raises(PublishError, match="connection refused"):
        await app.asend_task("shop.charge")
    ticking.cancel()
    assert time.monotonic() - started < 1.5
    assert longest < 0.3
    await app.aclose()

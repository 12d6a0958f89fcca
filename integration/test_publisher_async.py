"""The asyncio publisher keeps the promises of the other: same errors, same deadlines, and the loop goes on."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from amqptasks.broker.admin import declare
from amqptasks.broker.aio import AioPublisher
from amqptasks.config import BrokerSettings
from amqptasks.errors import (
    AccessRefused,
    BrokerBlocked,
    BrokerUnreachable,
    Nacked,
    PublishError,
    PublishTimeout,
    SerializationError,
    Unroutable,
)
from amqptasks.message import Envelope
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.rabbitmq import PrivateNode, free_port
from amqptasks.testing.waiting import wait_until
from amqptasks.topology.entities import Binding, Exchange, Queue, Topology, freeze_arguments
from integration.conftest import VirtualHost

FULL = freeze_arguments({"x-queue-type": "quorum", "x-max-length": 1, "x-overflow": "reject-publish"})
SHOP = Topology(
    (Exchange("shop"),),
    (Queue("work", arguments=freeze_arguments({"x-queue-type": "quorum"})), Queue("full", arguments=FULL)),
    (Binding("shop", "work", routing_key="work"), Binding("shop", "full", routing_key="full")),
)


def message(key: str = "work", exchange: str = "shop", **options: Any) -> Envelope:
    return Envelope(exchange, key, b"{}", correlation_id=str(uuid.uuid4()), **options)


class Publishers:
    """Publishers of one virtual host, closed afterwards."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.made: list[AioPublisher] = []

    def settings(self, **broker: Any) -> BrokerSettings:
        return BrokerSettings.model_validate({"url": self.url, **broker})

    def __call__(self, *, options: dict[str, Any] | None = None, **broker: Any) -> AioPublisher:
        made = AioPublisher(self.settings(**broker), **(options or {}))
        self.made.append(made)
        return made


@pytest.fixture
async def bare(vhost: VirtualHost) -> AsyncIterator[Publishers]:
    """Publishers before anything is declared."""
    publishers = Publishers(vhost.url)
    yield publishers
    for made in publishers.made:
        await made.close()


@pytest.fixture
async def publishers(bare: Publishers) -> Publishers:
    await asyncio.to_thread(declare, SHOP, bare.settings())
    return bare


@pytest.fixture
async def blackhole() -> AsyncIterator[int]:
    """A port that takes connections and never answers."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _reader, writer: writers.append(writer), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in writers:
        writer.close()


@contextlib.contextmanager
def ticking() -> Iterator[list[float]]:
    """The pauses between the turns of a task that only wants to run each 10 ms."""
    pauses: list[float] = []

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            pauses.append(time.monotonic() - before)

    task = asyncio.create_task(tick())
    try:
        yield pauses
    finally:
        task.cancel()


def with_port(url: str, port: int) -> str:
    return f"{url.rpartition('@')[0]}@127.0.0.1:{port}/{url.rpartition('/')[2]}"


async def test_what_returned_stands_in_the_queue(publishers: Publishers, vhost: VirtualHost) -> None:
    publisher = publishers()
    sent = message(priority=3, headers={"tenant": "a", "limits": [1.5, None]}, message_id="m", expiration="60000")
    await publisher.publish(sent)
    found = vhost.management.messages("work")[0]["properties"]
    assert (found["correlation_id"], found["message_id"]) == (sent.correlation_id, "m")
    assert (found["priority"], found["delivery_mode"], found["expiration"]) == (3, 2, "60000")
    assert found["headers"]["tenant"] == "a"


async def test_the_default_exchange_works_too(publishers: Publishers, vhost: VirtualHost) -> None:
    await publishers().publish(message(exchange=""))
    assert vhost.ready("work") == 1


async def test_what_the_broker_says_is_raised(publishers: Publishers) -> None:
    publisher = publishers()
    with pytest.raises(Unroutable, match="exchange 'shop' with routing key 'nobody'"):
        await publisher.publish(message("nobody"))
    with pytest.raises(Unroutable, match="the exchange 'nowhere' does not exist"):
        await publisher.publish(message(exchange="nowhere"))
    with pytest.raises(SerializationError, match="AMQP allows 255"):
        await publisher.publish(message("k" * 256))

    async def overfill() -> None:
        while True:  # a quorum queue refuses a little after it is full
            await publisher.publish(message("full"), retry=False)

    with pytest.raises(Nacked, match="routing key 'full'"):
        await overfill()
    await publisher.publish(message())


@pytest.mark.timing
@pytest.mark.fault
@pytest.mark.parametrize("trouble", ["closed", "blackholed", "password", "vhost"])
async def test_each_trouble_has_its_own_error_in_time_at_the_first_and_second_call(
    trouble: str, publishers: Publishers, vhost: VirtualHost, blackhole: int
) -> None:
    url, kind, cause, words = {
        "closed": (with_port(vhost.url, free_port()), PublishError, BrokerUnreachable, "connection refused"),
        "blackholed": (with_port(vhost.url, blackhole), PublishTimeout, BrokerUnreachable, "no answer in time"),
        "password": (vhost.url.replace(":guest@", ":wrong@"), PublishError, AccessRefused, "user name or password"),
        "vhost": (vhost.url.replace(vhost.name, "nowhere"), PublishError, AccessRefused, "virtual host 'nowhere'"),
    }[trouble]
    publisher = publishers(url=url, publish_timeout=2, publish_retry={"interval_max": 0.2})
    for _ in range(2):
        with ticking() as pauses:
            started = time.monotonic()
            with pytest.raises(kind, match=words) as caught:
                await publisher.publish(message())
            assert time.monotonic() - started < 2.5
        assert isinstance(caught.value.__cause__, cause)
        assert not caught.value.sent
        assert max(pauses, default=0) < 0.3


@pytest.mark.fault
async def test_a_live_node_is_found_behind_a_dead_and_a_silent_one(
    publishers: Publishers, vhost: VirtualHost, blackhole: int
) -> None:
    nodes = [with_port(vhost.url, free_port()), with_port(vhost.url, blackhole), vhost.url]
    await publishers(url=nodes, connection_timeout=2, publish_timeout=20).publish(message(), retry=False)


async def test_who_gives_up_early_does_not_end_the_attempt_that_others_wait_for(
    publishers: Publishers, proxy: TcpProxy, through_proxy: str
) -> None:
    publisher = publishers(url=through_proxy)
    proxy.stall()
    hasty = asyncio.create_task(publisher.publish(message(), timeout=0.5))
    patient = asyncio.create_task(publisher.publish(message(), timeout=8))
    with pytest.raises(PublishTimeout):
        await hasty
    proxy.resume()
    await patient


@pytest.mark.fault
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expiration": "99999999999999"}, "invalid expiration"),
        ({"headers": {"trace": "x" * 140_000}}, "do not fit a frame"),
        ({"exchange": "nowhere"}, "exchange 'nowhere' does not exist"),
        ({"routing_key": "nowhere"}, "routing key 'nowhere'"),
    ],
)
async def test_of_many_messages_the_one_that_the_broker_refuses_fails_alone(
    options: dict[str, Any], words: str, publishers: Publishers, vhost: VirtualHost
) -> None:
    publisher = publishers()
    await publisher.publish(message())
    many = [message() for _ in range(200)]
    for name, value in options.items():
        setattr(many[100], name, value)
    outcomes = await asyncio.gather(*map(publisher.publish, many), return_exceptions=True)
    assert [index for index, error in enumerate(outcomes) if error is not None] == [100]
    assert words in str(outcomes[100])
    ids = {one["properties"]["correlation_id"] for one in vhost.management.messages("work", 5000)}
    assert {one.correlation_id for one in many} - ids == {many[100].correlation_id}
    await publisher.publish(message())


@pytest.mark.fault
async def test_an_exchange_that_vanishes_is_told_and_works_when_it_is_back(
    publishers: Publishers, vhost: VirtualHost
) -> None:
    publisher = publishers()
    await publisher.publish(message())
    vhost.management.request("DELETE", f"exchanges/{vhost.name}/shop")
    outcomes = await asyncio.gather(*(publisher.publish(message()) for _ in range(50)), return_exceptions=True)
    assert {type(one) for one in outcomes} == {Unroutable}
    await asyncio.to_thread(declare, SHOP, publishers.settings())
    await publisher.publish(message())


async def test_many_callers_share_one_declaration_of_what_is_missing(bare: Publishers, vhost: VirtualHost) -> None:
    declared = []

    def make() -> None:
        declared.append(time.monotonic())
        declare(SHOP, bare.settings())

    publisher = bare(options={"declare": make, "knows_route": lambda exchange, _key: exchange == "shop"})
    await asyncio.gather(*(publisher.publish(message()) for _ in range(50)))
    assert len(declared) == 1
    assert vhost.ready("work") == 50


@pytest.mark.fault
async def test_publishing_goes_on_while_the_connection_is_cut_and_nothing_that_returned_is_lost(
    publishers: Publishers, vhost: VirtualHost, proxy: TcpProxy, through_proxy: str
) -> None:
    publisher = publishers(url=through_proxy)
    confirmed: list[str] = []
    cuts = 0
    end = time.monotonic() + 60

    def goes_on() -> bool:
        return (cuts < 10 or len(confirmed) <= 300) and time.monotonic() < end

    async def publish() -> None:
        while goes_on():
            one = message()
            with contextlib.suppress(PublishError):
                await publisher.publish(one)
                confirmed.append(str(one.correlation_id))

    async def cut() -> None:
        nonlocal cuts
        while goes_on():
            before = len(confirmed)
            await asyncio.sleep(0.25)
            if len(confirmed) < before + 10:  # a busy machine
                continue
            proxy.cut()
            cuts += 1

    await asyncio.gather(cut(), *(publish() for _ in range(20)))
    await publisher.publish(message())
    assert cuts >= 10
    assert len(confirmed) > 300
    ids = {one["properties"]["correlation_id"] for one in vhost.management.messages("work", 100_000)}
    assert set(confirmed) <= ids


@pytest.mark.timing
@pytest.mark.fault
async def test_a_stalled_broker_raises_in_time_while_the_loop_turns_and_a_later_call_works(
    publishers: Publishers, proxy: TcpProxy, through_proxy: str
) -> None:
    publisher = publishers(url=through_proxy, publish_timeout=1, heartbeat=1)
    await publisher.publish(message())
    proxy.stall()
    with ticking() as pauses:
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(PublishTimeout):
                await publisher.publish(message())
            assert time.monotonic() - started < 1.5
    assert max(pauses) < 0.3
    proxy.resume()
    await publisher.publish(message(), timeout=15)


@pytest.mark.timing
@pytest.mark.fault
async def test_an_alarm_raises_broker_blocked_and_a_later_call_works(node: PrivateNode) -> None:
    publisher = Publishers(node.url)(blocked_timeout=1, publish_timeout=20)
    await asyncio.to_thread(declare, SHOP, BrokerSettings.model_validate({"url": node.url}))
    await publisher.publish(message())
    await asyncio.to_thread(node.rabbitmqctl, "set_vm_memory_high_watermark", "0.0001")

    async def publish_into_the_alarm() -> None:
        # The broker tells a connection only when it publishes: the first message may still pass.
        for _ in range(3):
            await publisher.publish(message())

    with pytest.raises(BrokerBlocked, match="alarm"), ticking() as pauses:
        await publish_into_the_alarm()
    started = time.monotonic()
    with pytest.raises(BrokerBlocked):
        await publisher.publish(message())
    assert time.monotonic() - started < 2
    assert max(pauses) < 0.3
    await asyncio.to_thread(node.rabbitmqctl, "set_vm_memory_high_watermark", "0.6")
    await publisher.publish(message(), timeout=10)
    await publisher.close()


async def test_one_connection_serves_all_callers(publishers: Publishers, vhost: VirtualHost) -> None:
    publisher = publishers()
    await asyncio.gather(*(publisher.publish(message()) for _ in range(200)))
    await asyncio.to_thread(wait_until, vhost.management.connections, 10, "the management API knows the connection")
    assert len(vhost.management.connections()) == 1

"""Confirms and deliveries that do not come, though connections live."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from amqptasks.broker.aio import AioPublisher
from amqptasks.broker.publisher import Publisher
from amqptasks.config.models import BrokerSettings
from amqptasks.errors import PublishTimeout, Unroutable
from amqptasks.message import Envelope
from amqptasks.testing.proxy import TcpProxy
from integration.conftest import Bench, Broker, VirtualHost

pytestmark = pytest.mark.fault


@pytest.fixture
def proxy(broker: Broker) -> Iterator[TcpProxy]:
    parts = urlsplit(broker.url)
    with TcpProxy(parts.hostname or "", parts.port or 5672, frames=True) as running:
        yield running


def message(number: int, queue: str) -> Envelope:
    return Envelope("amqptasks", queue, b"x", message_id=f"{queue}-{number}")


def ids(vhost: VirtualHost, queue: str) -> list[str]:
    """What waits in a queue."""
    return [one["properties"]["message_id"] for one in vhost.management.messages(queue)]


def test_messages_of_a_channel_that_went_deaf_are_confirmed_on_another(
    bench: Bench, proxy: TcpProxy, through_proxy: str
) -> None:
    bench.settings["queues"] = {"default": {}, "email": {}}
    bench.client().declare()
    settings = BrokerSettings.model_validate({"url": through_proxy, "publish_timeout": 20})
    queues = ("default", "email")
    with closing(Publisher(settings)) as publisher, ThreadPoolExecutor(40) as pool:
        publisher.publish(message(0, "default"))
        proxy.swallow_confirms()
        sent = [pool.submit(publisher.publish, message(number, queue)) for number in range(1, 21) for queue in queues]
        for one in sent:
            one.result(15)
        publisher.publish(message(21, "default"), timeout=2)
    for queue in queues:
        found = ids(bench.vhost, queue)
        assert {f"{queue}-{number}" for number in range(1, 21)} <= set(found)
        assert len(found) <= 2 * 22


def test_a_connection_on_which_no_channel_opens_is_left(bench: Bench, proxy: TcpProxy, through_proxy: str) -> None:
    bench.client().declare()
    settings = BrokerSettings.model_validate({"url": through_proxy, "publish_timeout": 30})
    with closing(Publisher(settings)) as publisher:
        publisher.publish(message(0, "default"))
        proxy.swallow_opened()
        with pytest.raises(Unroutable):  # for which the broker closes the channel
            publisher.publish(Envelope("nowhere", "", b"x", message_id="lost"))
        publisher.publish(message(1, "default"))
    assert ids(bench.vhost, "default") == ["default-0", "default-1"]


async def test_asyncio_callers_leave_a_connection_on_which_no_channel_opens(
    bench: Bench, proxy: TcpProxy, through_proxy: str
) -> None:
    await asyncio.to_thread(bench.client().declare)
    settings = BrokerSettings.model_validate({"url": through_proxy, "connection_timeout": 5, "publish_timeout": 20})
    publisher = AioPublisher(settings)
    await publisher.publish(message(0, "default"))
    proxy.swallow_opened()
    with pytest.raises(PublishTimeout):
        await publisher.publish(Envelope("nowhere", "", b"x", message_id="lost"), timeout=1)
    await asyncio.sleep(4.5)
    with pytest.raises(Unroutable):  # a caller with less time than that has waited for the answer already
        await publisher.publish(Envelope("nowhere", "", b"x", message_id="lost"), timeout=4.5)
    proxy.swallow_opened()
    with pytest.raises(Unroutable):
        await publisher.publish(Envelope("elsewhere", "", b"x", message_id="lost"))
    await publisher.publish(message(1, "default"))
    await publisher.close()
    assert ids(bench.vhost, "default") == ["default-0", "default-1"]


def test_a_consumer_that_gets_nothing_though_messages_wait_connects_anew(
    bench: Bench, proxy: TcpProxy, through_proxy: str
) -> None:
    bench.settings["queues"] = {"default": {"prefetch": 5}}
    app = bench.client()
    bench.settings["broker"] = {"url": through_proxy}
    worker = bench.worker("default", "-c", "1")
    bench.wait_done({bench.send(app, "note", 0)})
    proxy.swallow_deliveries()
    sent = {bench.send(app, "note", 0) for _ in range(20)}
    bench.wait_done(sent, timeout=40)
    assert "The broker has forgotten this consumer" in worker.log
    bench.vhost.wait_settled("default")

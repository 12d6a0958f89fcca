"""The publisher for asyncio callers, on aio-pika: same errors, same deadlines, and the loop is never blocked."""

from __future__ import annotations

import asyncio
import importlib
import random
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from amqptasks.broker.failures import translate
from amqptasks.broker.parameters import connection_parameters
from amqptasks.broker.pending import RetryPolicy
from amqptasks.broker.pending import retry_policy as policy_of
from amqptasks.config import BrokerSettings
from amqptasks.errors import (
    AccessRefused,
    AmqpTasksError,
    BrokerError,
    BrokerUnreachable,
    Nacked,
    PublishError,
    PublishTimeout,
    Unroutable,
)
from amqptasks.message import Envelope

__all__ = ["AioPublisher"]


class AioPublisher:
    """Publishes with confirms from asyncio. One connection per event loop, opened at the first publish.

    Args: as for `Publisher`.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        declare: Callable[[], None] | None = None,
        knows_route: Callable[[str, str | None], bool] | None = None,
        name: str = "amqptasks",
    ) -> None:
        self._settings = settings
        self._declare = declare
        self._knows_route = knows_route
        self._name = f"{name}/asyncio publisher"
        self._channels: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopChannel] = weakref.WeakKeyDictionary()

    async def publish(
        self,
        envelope: Envelope,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - one deadline for connecting, publishing and retrying
        retry: bool = True,
        retry_policy: Mapping[str, Any] | None = None,
    ) -> None:
        """Publish one message and return after the broker's confirm. Raises what `Publisher.publish` raises."""
        policy = policy_of(self._settings.publish_retry, retry_policy, retry=retry)
        limit = self._settings.publish_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        state = _Attempt()
        try:
            async with asyncio.timeout(limit):
                await self._publish(envelope, policy, deadline, state)
        except TimeoutError:
            if state.error is not None:
                raise state.error from state.error.__cause__
            raise PublishTimeout(
                "the broker did not confirm the message in time", sent=state.sent
            ) from BrokerUnreachable("no answer in time")

    async def _publish(self, envelope: Envelope, policy: RetryPolicy, deadline: float, state: _Attempt) -> None:
        retries = 0
        while True:
            try:
                await self._once(envelope, state)
            except Unroutable as error:
                key = None if isinstance(error.__cause__, MissingExchange) else envelope.routing_key
                if state.declared or not self._may_declare(envelope.exchange, key):
                    raise
                state.declared = True
                await self._declare_in_thread(error)
            except PublishError as error:
                state.error = error
                used_up = policy.max_retries is not None and retries >= policy.max_retries
                if used_up or isinstance(error.__cause__, AccessRefused):
                    raise
                pause = policy.pause(retries) * random.uniform(0.5, 1.0)
                retries += 1
                await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            else:
                return

    async def _once(self, envelope: Envelope, state: _Attempt) -> None:
        loop = asyncio.get_running_loop()
        holder = self._channels.get(loop)
        if holder is None:
            holder = self._channels[loop] = _LoopChannel(self._settings, self._name)
        await holder.publish(envelope, state)

    def _may_declare(self, exchange: str, key: str | None) -> bool:
        return self._declare is not None and self._knows_route is not None and self._knows_route(exchange, key)

    async def _declare_in_thread(self, error: Unroutable) -> None:
        assert self._declare is not None
        try:
            await asyncio.to_thread(self._declare)
        except AmqpTasksError as problem:
            raise error from problem

    async def close(self) -> None:
        """Close this event loop's connection."""
        holder = self._channels.pop(asyncio.get_running_loop(), None)
        if holder is not None:
            await holder.close()


class MissingExchange(Exception):
    """The exchange is not there: any key would fail."""


class _Attempt:
    """What is known when the deadline cuts a publish short."""

    def __init__(self) -> None:
        self.sent = False
        self.declared = False
        self.error: PublishError | None = None


class _LoopChannel:
    """One event loop's connection and channel. The library's own reconnecting knows one node and one pace only."""

    def __init__(self, settings: BrokerSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._aio: Any = importlib.import_module("aio_pika")  # heavy: only who awaits pays for it
        self._errors: Any = importlib.import_module("aiormq.exceptions")
        self._connection: Any = None
        self._channel: Any = None
        self._exchanges: dict[str, Any] = {}
        self._opening = asyncio.Lock()

    async def publish(self, envelope: Envelope, state: _Attempt) -> None:
        """One attempt. Raises PublishError and its kin."""
        errors = self._errors
        try:
            channel, exchange = await self._open(envelope.exchange)
        except errors.ChannelNotFoundEntity as error:
            raise Unroutable(f"the exchange {envelope.exchange!r} does not exist ({error})") from MissingExchange()
        except (errors.AMQPError, ConnectionError, OSError, RuntimeError) as error:
            raise PublishError(f"the message was not published: {error}") from BrokerUnreachable(str(error))
        state.sent = True
        try:
            await exchange.publish(self._message(envelope), envelope.routing_key, mandatory=envelope.mandatory)
        except errors.PublishError as error:
            text = getattr(getattr(error, "message", None), "reply_text", "") or "NO_ROUTE"
            raise Unroutable(
                f"no queue takes exchange {envelope.exchange!r} with routing key {envelope.routing_key!r} ({text})"
            ) from None
        except errors.DeliveryError:
            raise Nacked(
                f"the broker refused the message for exchange {envelope.exchange!r}, routing key "
                f"{envelope.routing_key!r} (basic.nack): the queue is full, or has no quorum"
            ) from None
        except errors.ChannelNotFoundEntity as error:
            self._forget(channel)
            raise Unroutable(f"the exchange {envelope.exchange!r} does not exist ({error})") from MissingExchange()
        except errors.ChannelAccessRefused as error:
            self._forget(channel)
            raise PublishError(f"the broker refused to publish to {envelope.exchange!r}") from AccessRefused(str(error))
        except (errors.AMQPError, ConnectionError, OSError, RuntimeError) as error:
            self._forget(channel)
            raise PublishError(f"the connection was lost while publishing: {error}", sent=True) from BrokerUnreachable(
                str(error)
            )

    def _message(self, envelope: Envelope) -> Any:
        return self._aio.Message(
            envelope.body,
            headers=envelope.headers,
            content_type=envelope.content_type,
            content_encoding=envelope.content_encoding,
            delivery_mode=envelope.delivery_mode,
            priority=envelope.priority,
            correlation_id=envelope.correlation_id,
            reply_to=envelope.reply_to,
            # aio-pika counts in seconds and writes AMQP's milliseconds.
            expiration=None if envelope.expiration is None else int(envelope.expiration) / 1000,
            message_id=envelope.message_id,
        )

    async def _open(self, exchange: str) -> tuple[Any, Any]:
        """Channel and exchange, opened and looked up once.

        A publish to an exchange that is not there closes the channel under everybody who uses it, so it is looked for
        first (exchange.declare, passive).
        """
        channel, found = self._channel, self._exchanges.get(exchange)
        if found is not None and channel is not None and not channel.is_closed:
            return channel, found
        async with self._opening:
            if self._channel is None or self._channel.is_closed:
                self._exchanges.clear()
                if self._connection is None or self._connection.is_closed:
                    self._connection = await self._connect()
                self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
            channel = self._channel
            if exchange not in self._exchanges:
                self._exchanges[exchange] = await channel.get_exchange(exchange, ensure=True)
            return channel, self._exchanges[exchange]

    async def _connect(self) -> Any:
        failures: list[BrokerError] = []
        nodes = connection_parameters(self._settings, self._name)
        for url, parameters in random.sample(list(zip(self._settings.url, nodes, strict=True)), len(nodes)):
            try:
                return await self._aio.connect(
                    url,
                    timeout=self._settings.connection_timeout,
                    ssl_context=parameters.ssl_options.context if parameters.ssl_options is not None else None,
                    client_properties={"connection_name": self._name},
                    heartbeat=self._settings.heartbeat,
                )
            except (self._errors.AMQPError, OSError, TimeoutError) as error:
                failures.append(translate(error, parameters))
        refused = next((failure for failure in failures if isinstance(failure, AccessRefused)), failures[0])
        raise PublishError(f"the message was not published: {refused}") from refused

    def _forget(self, channel: Any) -> None:
        if channel is self._channel:
            self._channel = None
            self._exchanges.clear()

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()

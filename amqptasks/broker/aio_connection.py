"""One event loop's connection and confirm channel on aio-pika, and one message's way over it.

The library's own reconnecting knows one node and one pace, so its plain connection is used. What it does not tell
apart is told apart here: which of the messages on a channel made the broker close it, and whether the broker is
blocked.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import random
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from amqptasks.broker import verdicts
from amqptasks.broker.failures import translate
from amqptasks.broker.flight import fitting_properties
from amqptasks.broker.parameters import aio_url, connection_parameters, node_name
from amqptasks.broker.versions import two_priority_levels
from amqptasks.broker.wire import EncodedProperties
from amqptasks.config import BrokerSettings
from amqptasks.errors import AccessRefused, BrokerError, BrokerUnreachable, PublishError, Unroutable
from amqptasks.message import Envelope

__all__ = ["AioConnection", "Attempt", "SendAgain"]

_RENEW_SECONDS = 0.5
_WATCH_SECONDS = 0.1
_CLOSE_SECONDS = 1.0


class SendAgain(Exception):
    """The message met somebody else's misfortune: it goes again at once, which is no retry."""


@dataclass(eq=False, slots=True)
class Attempt:
    """One message on its way, and what is known of it when its deadline cuts it short."""

    envelope: Envelope
    properties: EncodedProperties
    clock: asyncio.Timeout
    since: float = field(default_factory=time.monotonic)
    sent: bool = False
    #: It waited under an alarm for too long.
    blocked: bool = False
    #: It may have made the broker close a channel: it gets one of its own.
    suspect: bool = False
    #: The broker says no to this message, and would again.
    final: bool = False
    missing_exchange: bool = False
    declared: tuple[str, str | None] | None = None
    error: PublishError | None = None


class _Flight:
    """A channel, and how many messages are unconfirmed on it."""

    def __init__(self, channel: Any, *, two_levels: bool) -> None:
        self.channel = channel
        #: See `amqptasks.broker.versions`.
        self.two_levels = two_levels
        self.count = 0
        #: How many there were when the broker closed it.
        self.casualties: int | None = None
        self.opened_at = time.monotonic()


class AioConnection:
    """Publishes for one event loop. Opens what it needs, and again after a loss."""

    def __init__(self, settings: BrokerSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._parameters = connection_parameters(settings, name)
        random.shuffle(self._parameters)
        self._aio: Any = None
        self._connection: Any = None
        self._flight: _Flight | None = None
        #: When a channel was asked for, while the broker has answered to none since.
        self._asked_at: float | None = None
        #: Exchanges that were seen to exist, on this connection.
        self._exchanges: set[str] = set()
        self._opening = asyncio.Lock()
        self._alone = asyncio.Lock()
        self._attempts: set[Attempt] = set()
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._leaving: set[asyncio.Task[Any]] = set()
        self._blocked_since: float | None = None
        self.last_error: BrokerError | None = None

    @property
    def blocked(self) -> bool:
        """Whether the broker was seen to take no messages (connection.blocked)."""
        return self._blocked_since is not None

    async def publish(self, attempt: Attempt) -> None:
        """One attempt. Raises `PublishError` and its kin, or `SendAgain`."""
        self._attempts.add(attempt)
        if "watch" not in self._tasks:
            self._share("watch", self._watch())
        try:
            if self._aio is None:
                # Heavy: only who awaits pays for it, and the loop turns meanwhile.
                self._aio = await asyncio.to_thread(importlib.import_module, "amqptasks.broker.aio_wire")
            if attempt.suspect:
                async with self._alone:
                    await self._send(await self._open_flight(), attempt)
            else:
                await self._send(await self._shared_flight(attempt), attempt)
        finally:
            self._attempts.discard(attempt)

    async def close(self) -> None:
        """Close the connection, within a second."""
        self._forget_connection()
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=_CLOSE_SECONDS)

    # -- one message ----------------------------------------------------------------------------------------------

    async def _send(self, flight: _Flight, attempt: Attempt) -> None:
        envelope, aio, errors = attempt.envelope, self._aio, self._aio.errors
        properties = fitting_properties(envelope, attempt.properties, two_levels=flight.two_levels)
        flight.count += 1
        attempt.sent = True
        try:
            channel = await flight.channel.get_underlay_channel()
            await channel.basic_publish(
                envelope.body,
                exchange=envelope.exchange,
                routing_key=envelope.routing_key,
                properties=aio.Written(properties, envelope.message_id),
                mandatory=envelope.mandatory,
            )
        except errors.PublishError as error:
            text = getattr(getattr(error.message, "delivery", None), "reply_text", "") or "NO_ROUTE"
            raise verdicts.unroutable(envelope, text) from None
        except errors.DeliveryError:
            if time.monotonic() - flight.opened_at > _RENEW_SECONDS:
                self._forget_flight(flight)  # such a channel can be nacked for ever (RabbitMQ 3.10)
            raise verdicts.nacked(envelope) from None
        except errors.ChannelClosed as error:
            self._forget_flight(flight)
            raise self._judge(flight, attempt, error) from None
        except (errors.AMQPError, OSError, RuntimeError) as error:
            raise self._lost(flight, attempt, error) from None
        finally:
            flight.count -= 1
            if flight is not self._flight and not flight.count:
                self._let_go(flight.channel.close())

    def _judge(self, flight: _Flight, attempt: Attempt, error: Exception) -> Exception:
        """The broker closed the channel: because of this message?"""
        if flight.casualties is None:
            flight.casualties = flight.count
        code, text = self._reason(error)
        verdict = verdicts.blame(attempt.envelope, code, text)
        if verdict is None and flight.casualties > 1:
            attempt.suspect = True
            return SendAgain()
        attempt.missing_exchange = isinstance(verdict, Unroutable)
        attempt.final = verdicts.is_about_a_message(code)
        return verdict or verdicts.refused(attempt.envelope, text)

    def _reason(self, error: Exception) -> tuple[int, str]:
        names = self._aio.errors
        codes = {
            names.ChannelAccessRefused: 403,
            names.ChannelNotFoundEntity: 404,
            names.ChannelLockedResource: 405,
            names.ChannelPreconditionFailed: 406,
        }
        numbers = [one for one in error.args if isinstance(one, int)]
        words = [one for one in error.args if isinstance(one, str)]
        code = codes.get(type(error)) or (numbers[0] if numbers else 0)
        return code, words[-1] if words else str(error)

    def _lost(self, flight: _Flight, attempt: Attempt, error: Exception) -> Exception:
        """The connection is gone, or was not there any more."""
        self._forget_flight(flight)
        if flight.casualties is None:
            flight.casualties = flight.count
        if not self._connected:
            self._forget_connection()
        if isinstance(error, self._aio.errors.ChannelInvalidStateError):
            return SendAgain()
        if flight.casualties > 1:
            # aiormq goes on writing to a channel that the broker has closed, and loses the connection over it (504).
            attempt.suspect = True
        self.last_error = translate(error, self._parameters[0])
        return verdicts.lost(self.last_error, sent=attempt.sent)

    # -- channel, connection --------------------------------------------------------------------------------------

    @property
    def _connected(self) -> bool:
        connection = self._connection
        return connection is not None and connection.connected.is_set() and not connection.is_closed

    async def _shared_flight(self, attempt: Attempt) -> _Flight:
        exchange, flight = attempt.envelope.exchange, self._flight
        if flight is None or flight.channel.is_closed or not self._connected:
            async with self._opening:
                flight = self._flight
                if flight is None or flight.channel.is_closed or not self._connected:
                    flight = self._flight = await self._open_flight()
        if exchange and exchange not in self._exchanges:
            await self._look_for(exchange, attempt)
        return flight

    async def _open_flight(self) -> _Flight:
        patience, now = self._settings.connection_timeout, time.monotonic()
        # Who has less time than that cannot wait for the answer, but the next caller need not wait for it again.
        silent = self._asked_at is not None and now - self._asked_at > patience and not self.blocked
        if silent or not self._connected:
            self._forget_connection()
            await asyncio.shield(self._tasks.get("connect") or self._share("connect", self._connect()))
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        try:
            async with asyncio.timeout(None if self.blocked else patience):
                channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
            self._asked_at = None
            server = self._connection.transport.connection.server_properties
            return _Flight(channel, two_levels=two_priority_levels(server))
        except (self._aio.errors.AMQPError, OSError, RuntimeError, AttributeError) as error:
            self._forget_connection()
            self.last_error = translate(error, self._parameters[0])
            raise verdicts.lost(self.last_error, sent=False) from self.last_error

    async def _look_for(self, exchange: str, attempt: Attempt) -> None:
        """See that the exchange exists, on a channel of its own: a publish without it closes the channel for all."""
        errors = self._aio.errors
        try:
            channel = (await self._open_flight()).channel
            await channel.get_exchange(exchange, ensure=True)
            self._let_go(channel.close())
        except errors.ChannelNotFoundEntity as error:
            attempt.missing_exchange = True
            raise verdicts.blame(attempt.envelope, 404, str(error)) or Unroutable(str(error)) from None
        except errors.ChannelAccessRefused:
            pass  # RabbitMQ 4.3.0 lets nobody look without configure permission
        except (errors.AMQPError, OSError, RuntimeError) as error:
            self._forget_connection()
            self.last_error = translate(error, self._parameters[0])
            raise verdicts.lost(self.last_error, sent=False) from self.last_error
        self._exchanges.add(exchange)

    async def _connect(self) -> None:
        failures: list[BrokerError] = []
        for _ in range(len(self._parameters)):
            parameters = self._parameters[0]
            try:
                self._connection = await self._open(parameters)
            except (self._aio.errors.AMQPError, OSError, RuntimeError) as error:
                self.last_error = translate(error, parameters)
                failures.append(self.last_error)
                self._parameters.append(self._parameters.pop(0))
            else:
                return
        known = [one for one in failures if isinstance(one, AccessRefused)] or failures
        raise verdicts.lost(known[0], sent=False)

    async def _open(self, parameters: Any) -> Any:
        connection = self._aio.Connection(
            self._aio.make_url(aio_url(parameters)),
            ssl_context=parameters.ssl_options.context if parameters.ssl_options is not None else None,
            client_properties={"connection_name": self._name},
        )
        try:
            await connection.connect(timeout=self._settings.connection_timeout)
        except BaseException:
            # Else its finalizer wants to, and complains when no loop runs by then.
            await connection.close()
            raise
        return connection

    def _forget_flight(self, flight: _Flight) -> None:
        if flight is self._flight:
            self._flight = None
        if flight.channel.is_closed:
            self._exchanges.clear()

    def _forget_connection(self) -> None:
        connection, self._connection, self._flight = self._connection, None, None
        self._asked_at = None
        self._exchanges.clear()
        self._blocked_since = None
        if connection is not None:
            self._let_go(connection.close())

    def _share(self, name: str, work: Any) -> asyncio.Task[Any]:
        """A task that all wait for, and that does not end with the first who gives up."""
        task = asyncio.create_task(work)
        self._tasks[name] = task

        def ended(_task: asyncio.Task[Any]) -> None:
            self._tasks.pop(name, None)
            if not task.cancelled():
                task.exception()  # seen

        task.add_done_callback(ended)
        return task

    def _let_go(self, closing: Awaitable[Any]) -> None:
        async def close() -> None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await closing

        task = asyncio.create_task(close())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    # -- alarms ---------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """While messages wait: is the broker blocked, and for whom for too long?"""
        loop = asyncio.get_running_loop()
        while self._attempts:
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            if not await self._is_blocked():
                self._blocked_since = None
                continue
            since = self._blocked_since = now if self._blocked_since is None else self._blocked_since
            for attempt in self._attempts:
                if now - max(since, attempt.since) >= self._settings.blocked_timeout:
                    attempt.blocked = True
                    with contextlib.suppress(RuntimeError):  # its deadline passed in this very turn
                        attempt.clock.reschedule(loop.time())

    async def _is_blocked(self) -> bool:
        if not self._connected:
            return False
        try:
            async with asyncio.timeout(0):  # returns at once, unless it is blocked
                await self._connection.transport.connection.ready()
        except TimeoutError:
            return True
        return False

    def why_late(self, attempt: Attempt) -> PublishError:
        """What a message is told whose deadline passed."""
        if attempt.blocked or self.blocked:
            return verdicts.blocked(sent=attempt.sent)
        if attempt.error is not None and not isinstance(attempt.error.__cause__, BrokerUnreachable):
            return attempt.error
        return verdicts.late(node_name(self._parameters[0]), self.last_error, sent=attempt.sent)

"""The publisher for asyncio callers, on aio-pika: same errors, same deadlines, and the loop is never blocked."""

from __future__ import annotations

import asyncio
import random
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from amqptasks.broker import verdicts
from amqptasks.broker.aio_connection import AioConnection, Attempt, SendAgain
from amqptasks.broker.declarer import DELETED_PAUSE
from amqptasks.broker.pending import RetryPolicy
from amqptasks.broker.pending import retry_policy as policy_of
from amqptasks.broker.wire import EncodedProperties, encode_properties
from amqptasks.config import BrokerSettings
from amqptasks.errors import AccessRefused, AmqpTasksError, PublishError, SerializationError, Unroutable, Unwritable
from amqptasks.ids import new_id
from amqptasks.message import Envelope
from amqptasks.protocol.signing import Keyring

__all__ = ["AioPublisher"]

_DECLARE_PAUSE = 5.0
#: What a frame of AMQP's usual size (131072) leaves for properties and headers.
_HEADER_ROOM = 131_052


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
        keys: Keyring | None = None,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._declare = declare
        self._knows_route = knows_route
        self._name = f"{name}/asyncio publisher"
        self._policy = policy_of(settings.publish_retry, None, retry=True)
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _OfLoop] = weakref.WeakKeyDictionary()

    async def publish(
        self,
        envelope: Envelope,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - one deadline for connecting, publishing and retrying
        retry: bool = True,
        retry_policy: Mapping[str, Any] | None = None,
    ) -> None:
        """Publish one message and return after the broker's confirm. Raises what `Publisher.publish` raises."""
        policy = self._policy
        if retry_policy or not retry:
            policy = policy_of(self._settings.publish_retry, retry_policy, retry=retry)
        if self._keys is not None:
            self._keys.sign(envelope)
        properties = _encoded(envelope)
        loop = asyncio.get_running_loop()
        here = self._loops.get(loop)
        if here is None:
            here = self._loops[loop] = _OfLoop(AioConnection(self._settings, self._name))
        limit = self._settings.publish_timeout if timeout is None else timeout
        clock = asyncio.timeout(limit)
        attempt = Attempt(envelope, properties, clock)
        try:
            async with clock:
                await self._publish(here, attempt, policy)
        except TimeoutError:
            error = here.connection.why_late(attempt)
            raise error from error.__cause__

    async def _publish(self, here: _OfLoop, attempt: Attempt, policy: RetryPolicy) -> None:
        retries = 0
        while True:
            try:
                await here.connection.publish(attempt)
            except SendAgain:
                await asyncio.sleep(0)
            except Unroutable as error:
                await self._declare_for(here, attempt, error)
            except PublishError as error:
                attempt.error = error
                used_up = policy.max_retries is not None and retries >= policy.max_retries
                if used_up or attempt.final or isinstance(error.__cause__, AccessRefused):
                    raise
                pause = policy.pause(retries) * random.uniform(0.5, 1.0)
                retries += 1
                await asyncio.sleep(pause)
            else:
                return

    async def _declare_for(self, here: _OfLoop, attempt: Attempt, error: Unroutable) -> None:
        """Declare the topology when the route belongs to it, once per message and cause; else raise the error."""
        envelope = attempt.envelope
        cause = (envelope.exchange, None if attempt.missing_exchange else envelope.routing_key)
        attempt.missing_exchange = attempt.final = False
        if self._declare is None or self._knows_route is None or attempt.declared == cause:
            raise error
        if not self._knows_route(*cause):
            raise error
        attempt.declared = cause
        attempt.error = error
        try:
            await here.declare(self._declare, pause=0.0 if cause[1] is None else DELETED_PAUSE)
        except AmqpTasksError as problem:
            raise error from problem

    async def close(self) -> None:
        """Close this event loop's connection."""
        here = self._loops.pop(asyncio.get_running_loop(), None)
        if here is not None:
            await here.connection.close()


class _OfLoop:
    """What belongs to one event loop."""

    def __init__(self, connection: AioConnection) -> None:
        self.connection = connection
        self._declaring: asyncio.Task[None] | None = None
        self._declared_at: float | None = None

    async def declare(self, declare: Callable[[], None], *, pause: float) -> None:
        """Declare in a thread after `pause` seconds, at most every 5 s; all who need it wait for one declaration."""
        if self._declared_at is not None and time.monotonic() - self._declared_at < _DECLARE_PAUSE:
            return
        if self._declaring is None:
            self._declaring = asyncio.create_task(self._run(declare, pause))
            self._declaring.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._declaring)

    async def _run(self, declare: Callable[[], None], pause: float) -> None:
        try:
            await asyncio.sleep(pause)
            await asyncio.to_thread(declare)
            self._declared_at = time.monotonic()
        finally:
            self._declaring = None


def _encoded(envelope: Envelope) -> EncodedProperties:
    """Its properties. What cannot be written is told in the words of `Publisher`, before anything is sent."""
    problem = verdicts.too_long(envelope)
    if problem is not None:
        raise SerializationError(problem)
    if envelope.message_id is None:
        envelope.message_id = new_id()  # a message that comes back is known by it
    properties = encode_properties(envelope)
    if len(properties.data) > _HEADER_ROOM:
        raise Unwritable(f"the message's headers do not fit a frame of {_HEADER_ROOM} bytes")
    return properties

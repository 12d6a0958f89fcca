"""Calls are published here, and their handles made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amqptasks.announce import announce_published
from amqptasks.broker.aio import AioPublisher
from amqptasks.broker.publisher import Publisher
from amqptasks.broker.sent_events import SentEvents
from amqptasks.calls import Callee, Calls, Prepared
from amqptasks.canvas import Signature, group
from amqptasks.canvas.plan import bodies, expand, freeze, normal
from amqptasks.errors import PublishError
from amqptasks.ids import new_id
from amqptasks.message import Envelope
from amqptasks.request import current_request
from amqptasks.results import AsyncResult, Expected, GroupResult, from_handle
from amqptasks.results.access import Results
from amqptasks.results.inbox import ReplyInbox
from amqptasks.signals import after_task_publish

__all__ = ["Client"]


class Client:
    """Publishes calls of one app. Thread-safe; opens its connection at the first call.

    Args:
        calls: makes the messages.
        results: where handles look.
        inbox: gets the replies, where results come over AMQP.
        eager: runs messages here and now, instead of publishing them.
        sent_events: tells monitors of calls; None where they are not told.
    """

    def __init__(
        self,
        calls: Calls,
        publisher: Publisher,
        async_publisher: AioPublisher,
        *,
        results: Results,
        inbox: ReplyInbox | None,
        eager: Callable[[Sequence[Envelope]], None] | None = None,
        sent_events: SentEvents | None = None,
    ) -> None:
        self._sent_events = None if eager is not None else sent_events
        self._eager = eager
        self._calls = calls
        self._publisher = publisher
        self._async_publisher = async_publisher
        self._results = results
        self._inbox = inbox

    # -- one call -------------------------------------------------------------------------------------------------

    def send(self, callee: Callee, args: Sequence[Any], kwargs: Mapping[str, Any], **options: Any) -> AsyncResult[Any]:
        """Publish one call and return after the broker's confirm. Raises what `Task.delay` raises."""
        prepared = self._calls.prepare(callee, args, kwargs, **options)
        handle = self._handle(callee, prepared)
        self._publish(prepared)
        self._sent(prepared)
        return handle

    async def asend(
        self, callee: Callee, args: Sequence[Any], kwargs: Mapping[str, Any], **options: Any
    ) -> AsyncResult[Any]:
        """`send` for asyncio."""
        prepared = self._calls.prepare(callee, args, kwargs, **options)
        handle = self._handle(callee, prepared)
        wants_reply = self._inbox is not None and not prepared.ignored
        if self._eager is not None or (wants_reply and not self._publisher.replies_ready):
            # The reply queue must exist before the message does, and the publisher's own thread makes it.
            await asyncio.to_thread(self._publish, prepared)
        else:
            claims = self._calls.claims
            if claims is not None and claims.takes(prepared.envelope):
                await asyncio.to_thread(claims.check_in, prepared.envelope)
            await self._async_publisher.publish(prepared.envelope, retry=prepared.retry, retry_policy=prepared.policy)
        self._sent(prepared)
        return handle

    def send_many(
        self, calls: Sequence[tuple[Callee, Sequence[Any], Mapping[str, Any], Mapping[str, Any]]]
    ) -> list[AsyncResult[Any]]:
        """Publish many calls with one pipelined wait for all confirms.

        Nothing is published when one call cannot be prepared. Raises the first `PublishError`, with all of them in
        its ``failed`` attribute as ``(index, error)``; calls that are not named there are confirmed.
        """
        prepared = [self._calls.prepare(callee, args, kwargs, **options) for callee, args, kwargs, options in calls]
        handles = [self._handle(call[0], one) for call, one in zip(calls, prepared, strict=True)]
        self._publish_many(prepared)
        return handles

    # -- compositions ---------------------------------------------------------------------------------------------

    def apply(self, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Publish a signature of any kind. Returns the handle of its end."""
        if signature.subtask_type is None:
            made = signature.clone(args, kwargs)
            return self.send(self._calls.callee(made.task), made.args, made.kwargs, **made.options)
        prepared, handle = self._compose(signature, args, kwargs)
        self._publish_many(prepared)
        return handle

    async def aapply(self, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """`apply` for asyncio."""
        if signature.subtask_type is None:
            made = signature.clone(args, kwargs)
            return await self.asend(self._calls.callee(made.task), made.args, made.kwargs, **made.options)
        prepared, handle = self._compose(signature, args, kwargs)
        await asyncio.to_thread(self._publish_many, prepared)
        return handle

    def _compose(
        self, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Prepared], AsyncResult[Any] | GroupResult]:
        made = normal(signature.clone(args, kwargs) if args or kwargs else signature)
        common: dict[str, Any] = {}
        if self._inbox is not None:
            common["reply_to"] = self._publisher.reply_queue
        parent = current_request()
        if parent is not None and parent.root_id:
            common["root_id"] = parent.root_id
        handle = freeze(made, new_id, common=common)
        for one in bodies(made):
            self._calls.pin(one)
        prepared = self._calls.prepare_all(expand(made))
        expected: dict[str, Expected] = {}
        slots = []  # held until the handles hold them
        for one in made.walk():
            if "task_id" in one.options and not isinstance(one, group):
                task_id, callee = one.options["task_id"], self._calls.callee(one.task)
                ignored = one.options.get("ignore_result")
                ignored = callee.options.ignore_result if ignored is None else bool(ignored)
                expected[task_id] = Expected(callee.convert, ignored)
                if self._inbox is not None and not ignored:
                    slots.append(self._inbox.expect(task_id))
        found = from_handle(handle, self._results, expected)
        if parent is not None:
            parent.children.append(found.as_tuple())
        return prepared, found

    def publish_many(self, envelopes: Sequence[Envelope]) -> list[PublishError | None]:
        """Publish messages as they are, with one wait for all confirms. Returns None or the error for each."""
        return self._publisher.publish_many(envelopes, sign=False)

    def publish(self, envelopes: Sequence[Envelope]) -> None:
        """Publish messages that are no calls, and return after their confirms. Eager mode has nobody to read them.

        Raises the first `PublishError`.
        """
        if self._eager is None:
            _raise_first(self._publisher.publish_many(envelopes))

    async def apublish(self, envelopes: Sequence[Envelope]) -> None:
        """`publish` for asyncio."""
        if self._eager is None:
            await asyncio.gather(*(self._async_publisher.publish(one) for one in envelopes))

    # -- publishing -----------------------------------------------------------------------------------------------

    def _handle(self, callee: Callee, prepared: Prepared) -> AsyncResult[Any]:
        """The handle; where results are replies, have this one come to this process."""
        if self._sent_events is not None:
            self._sent_events.prepare()
        envelope = prepared.envelope
        task_id = envelope.correlation_id or ""
        expected = None  # held until the handle holds it
        if self._inbox is not None and not prepared.ignored and envelope.reply_to is None:
            envelope.reply_to = self._publisher.reply_queue
            expected = self._inbox.expect(task_id)
        handle: AsyncResult[Any] = AsyncResult(task_id, self._results, convert=callee.convert, ignored=prepared.ignored)
        del expected
        parent = current_request()
        if parent is not None:
            parent.children.append(handle.as_tuple())
        return handle

    def _publish(self, prepared: Prepared) -> None:
        if self._eager is not None:
            self._eager([prepared.envelope])
            return
        self._calls.check_in(prepared.envelope)
        self._publisher.publish(prepared.envelope, retry=prepared.retry, retry_policy=prepared.policy)

    def _publish_many(self, prepared: Sequence[Prepared]) -> None:
        if self._eager is not None:
            self._eager([one.envelope for one in prepared])
            return
        for one in prepared:
            self._calls.check_in(one.envelope)
        outcomes = self._publisher.publish_many([one.envelope for one in prepared])
        if after_task_publish.receivers or self._sent_events is not None:
            for one, outcome in zip(prepared, outcomes, strict=True):
                if outcome is None:
                    self._sent(one)
        _raise_first(outcomes)

    def _sent(self, prepared: Prepared) -> None:
        if self._sent_events is not None:
            self._sent_events.add(prepared.envelope, prepared.called)
        if after_task_publish.receivers and self._eager is None:
            announce_published(prepared.envelope, prepared.body)

    def close(self) -> None:
        """Close the publisher's connection."""
        self._publisher.close()

    async def aclose(self) -> None:
        """Close this event loop's connection."""
        await self._async_publisher.close()


def _raise_first(outcomes: Sequence[PublishError | None]) -> None:
    failed = [(index, error) for index, error in enumerate(outcomes) if error is not None]
    if failed:
        first = failed[0][1]
        first.add_note(f"{len(failed)} of {len(outcomes)} messages were not confirmed")
        first.failed = failed
        raise first

"""Eager mode: calls run at once in the calling process, without a broker; for tests of applications.

The real path with another wire: arguments are validated and serialized, the message is decoded, run and classified by
the executor's own code, and what it would publish (retries, results, follow-ups, parts of chords) is taken from a list.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from amqptasks.calls import Calls
from amqptasks.canvas import from_dict
from amqptasks.canvas.plan import expand
from amqptasks.config import Settings
from amqptasks.errors import ChordError
from amqptasks.events import Bus
from amqptasks.execution.bodies import Bodies
from amqptasks.execution.followups import FollowUps
from amqptasks.execution.job import Job
from amqptasks.execution.reports import Reporter
from amqptasks.execution.runner import Runner
from amqptasks.message import Envelope
from amqptasks.outcome import Failed, GivenBack, Reason, Retrying
from amqptasks.protocol import jsontypes
from amqptasks.protocol.results import decode_result, error_from_wire
from amqptasks.results.inbox import ReplyInbox
from amqptasks.results.store import ResultStore
from amqptasks.states import SUCCESS
from amqptasks.task import Task
from amqptasks.topology.build import joins_queue

__all__ = ["Eager"]


class Eager:
    """Runs messages in this process.

    Args:
        inbox: gets the results.
        store: gets them too, where ``testing.store_eager_result`` says so.
    """

    def __init__(
        self,
        settings: Settings,
        calls: Calls,
        tasks: Mapping[str, Task[..., Any]],
        inbox: ReplyInbox,
        store: ResultStore | None,
    ) -> None:
        self._settings = settings
        self._calls = calls
        self._tasks = tasks
        self._inbox = inbox
        self._store = store
        self._joins = joins_queue(settings.topology.prefix)
        self._parts: dict[str, dict[int, Any]] = {}
        self._failed: set[str] = set()
        self._number = 0
        reporter = Reporter(replies=True, store=None)
        self._runner = Runner(
            tasks,
            settings,
            queue="eager",
            hostname="eager",
            bus=Bus(),
            bodies=Bodies(settings, None, None),
            soft_limit=lambda _seconds: nullcontext(),
            reporter=reporter,
            follow=FollowUps(calls, tasks.get, reporter, settings.topology.prefix),
            send_state=lambda _tag, message: self._receive(message),
            ran=lambda: None,
        )

    def run(self, envelopes: Sequence[Envelope]) -> None:
        """Run these messages and everything that follows. With ``eager_propagates`` a failure is raised here."""
        waiting = deque(envelopes)
        while waiting:
            envelope = waiting.popleft()
            if envelope.exchange == "":
                self._receive(envelope)
            elif envelope.routing_key == self._joins:
                waiting.extend(self._join(jsontypes.loads(envelope.body)))
            else:
                waiting.extend(self._execute(envelope))

    def _execute(self, envelope: Envelope, verdict: tuple[str, str, str] | None = None) -> Sequence[Envelope]:
        self._number += 1
        job = Job(
            self._number,
            envelope.headers,
            envelope.content_type,
            envelope.correlation_id,
            envelope.reply_to,
            envelope.priority,
            envelope.exchange,
            envelope.routing_key,
            False,
            envelope.body,
            verdict,
        )
        if verdict is None and envelope.headers["task"] not in self._tasks:
            text = f"no task is named {envelope.headers['task']!r}"
            job = job._replace(verdict=(Reason.UNKNOWN_TASK, "UnknownTask", text))
        outcome, _ = self._runner.run(job)
        if isinstance(outcome, Retrying | GivenBack):
            headers = dict(envelope.headers)
            body = envelope.body
            if isinstance(outcome, Retrying):
                headers["retries"] = (headers.get("retries") or 0) + 1
                body = outcome.body or body
            return [replace(envelope, headers=headers, body=body)]
        messages = getattr(outcome, "messages", ())
        if isinstance(outcome, Failed) and self._settings.testing.eager_propagates:
            for message in messages:
                if message.exchange == "" and message.correlation_id == envelope.correlation_id:
                    error = decode_result(message.body).result
                    if isinstance(error, BaseException):
                        raise error
        return tuple(messages)

    def _receive(self, envelope: Envelope) -> None:
        meta = decode_result(envelope.body)
        self._inbox.receive(meta, len(envelope.body))
        if self._store is not None and self._settings.testing.store_eager_result:
            self._store.put(meta.task_id, envelope.body, ready=meta.ready)

    def _join(self, table: dict[str, Any]) -> Sequence[Envelope]:
        group_id, body = table["group"], table["chord"]
        if group_id in self._failed:
            return ()
        parts = self._parts.setdefault(group_id, {})
        parts[table["index"]] = table["result"]
        failed = table["state"] != SUCCESS
        if not failed and len(parts) < body["chord_size"]:
            return ()
        del self._parts[group_id]
        results = [] if failed else [parts[index] for index in sorted(parts)]
        messages = [one.envelope for one in self._calls.prepare_all(expand(from_dict(body), (results,)), check=False)]
        if not failed:
            return messages
        self._failed.add(group_id)
        error = error_from_wire(table["result"])
        text = f"part {table['index']} of the chord, task {table['task_id']}, failed: {error!r}"
        verdict = (Reason.FAILED, ChordError.__name__, text)
        return [after for message in messages for after in self._execute(message, verdict)]

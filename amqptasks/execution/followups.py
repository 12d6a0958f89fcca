"""What follows a task: callbacks, the rest of its chain, its part of a chord, errbacks; as messages to publish.

Ids are the same each time that the same task ends in the same way, so that a second execution publishes nothing new.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

import structlog

from amqptasks.calls import Calls, NamedCallee
from amqptasks.canvas import Signature, from_dict
from amqptasks.canvas.plan import JOIN, Part, bodies, casualties, expand, freeze, normal, part_of, replaced
from amqptasks.canvas.types import as_list
from amqptasks.claims import FORGET, Claim
from amqptasks.errors import ChordError
from amqptasks.execution.reports import Reporter, persist
from amqptasks.message import Envelope
from amqptasks.protocol import jsontypes
from amqptasks.protocol.results import ResultMeta, error_from_wire, error_to_wire
from amqptasks.request import Request
from amqptasks.states import EXCEPTION_STATES, FAILURE, SUCCESS
from amqptasks.task import Task
from amqptasks.topology.build import joins_queue

__all__ = ["FollowUps"]

_NAMESPACE = uuid.UUID("6a0ba1f5-3c39-4b8e-9a0e-5f2f5b8f3a11")
_log = structlog.get_logger("amqptasks.worker")

Embed = Mapping[str, Any]


class FollowUps:
    """Builds what follows tasks of one app."""

    def __init__(self, calls: Calls, find: Callable[[str], Task[..., Any] | None], reporter: Reporter, prefix: str):
        self._calls = calls
        self._find = find
        self._reporter = reporter
        self._prefix = prefix
        #: Calls an errback, and runs what an async one gave to its end. The runner sets both: the pool knows how.
        self.call_errback: Callable[[Callable[[], None]], None] = lambda call: call()
        self.run_coroutine: Callable[[Coroutine[Any, Any, Any]], object] = asyncio.run

    # -- success --------------------------------------------------------------------------------------------------

    def succeeded(self, request: Request, embed: Embed, value: Any) -> list[Envelope]:
        """Callbacks, the next of the chain, the part of the chord. Adds their handles to `request.children`."""
        messages: list[Envelope] = []
        for number, table in enumerate(embed.get("callbacks") or ()):
            messages += self._send(request, from_dict(table), (value,), f"callback/{number}")
        rest = list(embed.get("chain") or ())
        if rest:
            following = from_dict(rest.pop())
            if rest:
                following.options["chain"] = [*rest, *(following.options.get("chain") or [])]
            messages += self._send(request, following, (value,), "next")
        part = _own_part(request, embed)
        if part is not None:
            messages += self._part(request.id or "", part, SUCCESS, value)
        return messages

    def replaced(self, request: Request, embed: Embed, signature: Signature) -> list[Envelope]:
        """What runs in a task's place: it takes over the task's id, and everything that follows it."""
        made = replaced(
            signature,
            {
                "task_id": request.id,
                "link": embed.get("callbacks"),
                "link_error": embed.get("errbacks"),
                "chain": embed.get("chain"),
                "chord": embed.get("chord"),
                "group_id": request.group,
                "group_index": request.group_index,
            },
        )
        return self._send(request, made, (), f"replaced/{request.retries}")

    def _send(self, request: Request, signature: Signature, args: Sequence[Any], step: str) -> list[Envelope]:
        numbers = iter(range(10**9))

        def new_id() -> str:
            return str(uuid.uuid5(_NAMESPACE, f"{request.id}/{step}/{next(numbers)}"))

        made = normal(signature)
        common = {"root_id": request.root_id or request.id}
        if request.reply_to and step.startswith("replaced"):
            common["reply_to"] = request.reply_to
        handle = freeze(made, new_id, common=common)
        if len(request.children) < 1000:
            request.children.append(handle)
        for body in bodies(made):
            self._calls.pin(body)
        sent = expand(made, args)
        for one in sent:
            one.options["parent_id"] = request.id
        messages = [one.envelope for one in self._calls.prepare_all(sent, check=False)]
        for message in messages:
            persist("A large body", partial(self._calls.check_in, message), message.correlation_id)
        return [self._calls.signed(message) for message in messages]

    # -- large bodies ---------------------------------------------------------------------------------------------

    def forget(self, claim: Claim, queue: str) -> Envelope:
        """The call that deletes a body whose task needs it no more. Not at once: the broker may deliver the task again
        until it has heard of the ack."""
        assert self._calls.claims is not None
        prepared = self._calls.prepare(
            NamedCallee(FORGET),
            (claim.key,),
            {},
            queue=queue,
            countdown=self._calls.claims.keep,
            task_id=str(uuid.uuid5(_NAMESPACE, f"{claim.key}/forget")),
            ignore_result=True,
        )
        envelope = self._calls.signed(prepared.envelope)
        envelope.last = True
        return envelope

    # -- chords ---------------------------------------------------------------------------------------------------

    def _part(self, task_id: str, part: Part, state: str, value: Any) -> list[Envelope]:
        """A part's outcome on its way to the others."""
        if isinstance(value, BaseException):
            value = error_to_wire(value)
        if not part.body.get(JOIN):
            return self._celery_part(task_id, part, state, value)
        table = {
            "group": part.body[JOIN],
            "index": part.number,
            "task_id": task_id,
            "state": str(state),
            "result": value,
            "chord": part.body,
            "time": time.time(),
        }
        key = joins_queue(self._prefix)
        body = jsontypes.dumps(table)
        envelope = Envelope(self._prefix, key, body, message_id=task_id, correlation_id=str(part.body[JOIN]))
        return [self._calls.signed(envelope)]

    def _celery_part(self, task_id: str, part: Part, state: str, value: Any) -> list[Envelope]:
        member = jsontypes.dumps([1, task_id, str(state), value])
        found = self._reporter.chord_part(part.group_id, part.number, member)
        if found is None:
            return []
        body = from_dict(part.body)
        results = []
        for one in found:
            _, part_id, part_state, result = jsontypes.loads(one)
            if part_state in EXCEPTION_STATES:
                return self.never(body, ChordError(f"Dependency {part_id} raised {error_from_wire(result)!r}"))
            results.append(result)
        return self._send(Request(id=task_id, root_id=task_id), body, (results,), "chord")

    # -- failure --------------------------------------------------------------------------------------------------

    def failed(self, request: Request, embed: Embed, error: BaseException, trace: str, state: str) -> list[Envelope]:
        """Errbacks; a failure for each task that will not run any more; the chord that loses a part."""
        messages: list[Envelope] = []
        for number, table in enumerate(embed.get("errbacks") or ()):
            messages += self._errback(request, from_dict(table), error, trace, number)
        never, lost = casualties(list(embed.get("chain") or ()), _own_part(request, embed))
        messages += self._results_of(never, error, trace, state)
        if lost is not None:
            messages += self._part(request.id or "", lost, FAILURE, error)
        return messages

    def ignored(self, request: Request, embed: Embed) -> list[Envelope]:
        """A task that raised `Ignore` says nothing; but a chord cannot wait for it for ever."""
        part = _own_part(request, embed)
        if part is None:
            return []
        return self._part(request.id or "", part, FAILURE, ChordError(f"task {request.id} raised Ignore"))

    def never(self, body: Signature, error: BaseException) -> list[Envelope]:
        """A signature that does not run at all: its tasks fail, with their errbacks."""
        tasks, lost = casualties([body.to_dict()], None)
        messages = self._results_of(tasks, error, "", FAILURE)
        for one in tasks:
            request = Request(id=one.options.get("task_id"), task=one.task)
            for number, errback in enumerate(as_list(one.options.get("link_error"))):
                messages += self._errback(request, errback, error, "", number)
        if lost is not None:
            messages += self._part("", lost, FAILURE, error)
        return messages

    def _results_of(self, tasks: Sequence[Signature], error: BaseException, trace: str, state: str) -> list[Envelope]:
        messages: list[Envelope] = []
        for one in tasks:
            task_id, reply_to = one.options.get("task_id"), one.options.get("reply_to")
            if task_id and self._reporter.wanted(one.options, reply_to):
                messages += self._reporter.final(ResultMeta(str(task_id), state, error, trace or None), reply_to)
        return messages

    def _errback(
        self, request: Request, errback: Signature, error: BaseException, trace: str, number: int
    ) -> list[Envelope]:
        """As Celery: a task of several arguments is called here with the error; another is sent the failed id."""
        task = self._find(errback.task)
        wants = None if task is None or errback.subtask_type else _first_of_several(task)
        if task is None or wants is None:
            return self._send(request, errback, (request.id,), f"errback/{number}")
        first = request.id if wants in ("task_id", "uuid", "id", "failed_task_id") else request
        args = (first, error, trace) if not errback.immutable else ()

        def call() -> None:
            try:
                made = task(*args, *errback.args, **errback.kwargs)
                if inspect.iscoroutine(made):
                    self.run_coroutine(made)
            except Exception:
                _log.exception("An errback raised", task=errback.task, task_id=request.id)

        self.call_errback(call)
        return []


def _own_part(request: Request, embed: Embed) -> Part | None:
    return part_of({"chord": embed.get("chord"), "group_id": request.group, "group_index": request.group_index})


def _first_of_several(task: Task[..., Any]) -> str | None:
    """The name of the first argument of a task that takes several; None for one that does not."""
    parameters = list(inspect.signature(task.function).parameters.values())[1 if task.bind else 0 :]
    positional = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    several = len(positional) > 1 or any(one.kind is one.VAR_POSITIONAL for one in parameters)
    return (positional[0] if positional else "request") if several else None

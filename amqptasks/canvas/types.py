"""Signatures: a call that is not sent yet, and those that are put together of others.

They serialize to Celery's form (``task, args, kwargs, options, subtask_type, immutable``), so that they can travel in a
message. As Celery's, `set`, `link` and `link_error` change a signature in place; `clone` makes another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import islice
from typing import Any, ClassVar, Self

from amqptasks.canvas.sender import Sender
from amqptasks.canvas.stamps import Stampable

__all__ = ["Signature", "chain", "chord", "chunks", "from_dict", "group", "signature", "starmap", "xmap"]


class Signature(Stampable):
    """A task's name, its arguments and its options: a value that can be stored, changed, put together and sent."""

    #: Celery's name of the kind; None for a plain task.
    subtask_type: ClassVar[str | None] = None

    def __init__(
        self,
        task: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        immutable: bool = False,
        sender: Sender | None = None,
    ) -> None:
        self.task = task
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        self.options = dict(options or {})
        self.immutable = immutable
        self.sender = sender

    def __repr__(self) -> str:
        inside = [repr(one) for one in self.args] + [f"{name}={value!r}" for name, value in self.kwargs.items()]
        return f"{self.task}({', '.join(inside)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signature) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it can change

    # -- changing -------------------------------------------------------------------------------------------------

    def set(self, immutable: bool | None = None, **options: Any) -> Self:
        """Add options of `apply_async`. Changes and returns this signature."""
        if immutable is not None:
            self.immutable = immutable
        self.options.update(options)
        return self

    def clone(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> Self:
        """A copy with `args` put in front and `kwargs` added, unless the signature is immutable."""
        made = self._copy()
        if not self.immutable:
            made.args = (*args, *self.args)
            made.kwargs = {**self.kwargs, **(kwargs or {})}
        made.options.update(options)
        return made

    def _copy(self) -> Self:
        made = copy(self)
        made.kwargs, made.options = dict(self.kwargs), dict(self.options)
        for name in ("link", "link_error"):
            if name in made.options:
                made.options[name] = as_list(made.options[name])
        return made

    def link(self, callback: Signature) -> Signature:
        """Have `callback` called with the result once this has succeeded. Returns the callback."""
        return self._append("link", callback)

    def link_error(self, errback: Signature) -> Signature:
        """Have `errback` called once this has failed for good. Returns the errback.

        A task of more than one argument is called as ``errback(request, exc, traceback)`` in the process of the failed
        task; or as ``errback(task_id, exc, traceback)`` where its first argument is called so. Another one is sent as
        a task, with the failed task's id.
        """
        return self._append("link_error", errback)

    def on_error(self, errback: Signature) -> Self:
        """`link_error` that returns this signature."""
        self.link_error(errback)
        return self

    def _append(self, name: str, callback: Signature) -> Signature:
        linked = as_list(self.options.get(name))
        if callback not in linked:
            linked.append(callback)
        self.options[name] = linked
        return callback

    # -- putting together -----------------------------------------------------------------------------------------

    def __or__(self, other: object) -> Signature:
        if not isinstance(other, Signature):
            return NotImplemented
        return chain(self, other)

    # -- sending --------------------------------------------------------------------------------------------------

    def delay(self, *args: Any, **kwargs: Any) -> Any:
        """Send it now, with partial arguments in front. Returns its handle."""
        return self.apply_async(args, kwargs)

    def apply_async(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """Send it now, with options. Returns its handle; raises what `Task.apply_async` raises."""
        return self._sender().apply_signature(self.clone(**options), args, kwargs or {})

    async def adelay(self, *args: Any, **kwargs: Any) -> Any:
        """`delay` for asyncio."""
        return await self.aapply_async(args, kwargs)

    async def aapply_async(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        """`apply_async` for asyncio."""
        return await self._sender().aapply_signature(self.clone(**options), args, kwargs or {})

    def _sender(self) -> Sender:
        found = next((one.sender for one in self.walk() if one.sender is not None), None)
        if found is None:
            raise ValueError(f"the signature of {self.task} belongs to no app: build it with app.signature(…)")
        return found

    def walk(self) -> Iterator[Signature]:
        """This signature and those inside it."""
        yield self

    def linked(self, name: str) -> list[Signature]:
        """The signatures under ``link`` or ``link_error``."""
        return as_list(self.options.get(name))

    # -- as data --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Celery's form of a signature."""
        return {
            "task": self.task,
            "args": list(self.args),
            "kwargs": self._kwargs_to_dict(),
            "options": {name: _option_to_dict(value) for name, value in self.options.items()},
            "subtask_type": self.subtask_type,
            "immutable": self.immutable,
        }

    def _kwargs_to_dict(self) -> dict[str, Any]:
        return dict(self.kwargs)


class _Composed(Signature):
    """A signature of several others."""

    tasks: tuple[Signature, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Send it now, as `delay`: ``chain(…)()``, ``workflow()``."""
        return self.apply_async(args, kwargs)

    def _copy(self) -> Self:
        made = super()._copy()
        made.tasks = tuple(one.clone() for one in self.tasks)
        return made

    def walk(self) -> Iterator[Signature]:
        """This signature and those inside it."""
        yield self
        for one in self.tasks:
            yield from one.walk()

    def _kwargs_to_dict(self) -> dict[str, Any]:
        return {**self.kwargs, "tasks": [one.to_dict() for one in self.tasks]}


class chain(_Composed):
    """One after the other: each gets the result of the one before it in front of its arguments.

    A group that is followed by something becomes a chord.
    """

    subtask_type = "chain"

    def __init__(self, *tasks: Signature | Iterable[Signature], **options: Any) -> None:
        super().__init__("celery.chain", options=options)
        self.tasks = tuple(one for task in _flat(tasks) for one in _members(task, chain))

    def __repr__(self) -> str:
        return " | ".join(repr(one) for one in self.tasks)


class group(_Composed):
    """At the same time. Its result is a `GroupResult`."""

    subtask_type = "group"

    def __init__(self, *tasks: Signature | Iterable[Signature], **options: Any) -> None:
        super().__init__("celery.group", options=options)
        self.tasks = tuple(one for task in _flat(tasks) for one in _members(task, group))

    def __repr__(self) -> str:
        return f"group({', '.join(repr(one) for one in self.tasks)})"

    def __len__(self) -> int:
        return len(self.tasks)


class chord(Signature):
    """A group, and a body that runs once all of it has succeeded, with the list of results in the group's order."""

    subtask_type = "chord"

    def __init__(self, header: Signature | Iterable[Signature], body: Signature | None = None, **options: Any) -> None:
        super().__init__("celery.chord", options=options)
        self.header = header if isinstance(header, group) else group(header)
        self.body = body

    def __call__(self, body: Signature | None = None, **options: Any) -> Any:
        """Send it now: ``chord(header)(body)``."""
        made = self.clone()
        made.body = body or made.body
        return made.apply_async(**options)

    def __repr__(self) -> str:
        return f"chord({self.header!r}, {self.body!r})"

    def _copy(self) -> Self:
        made = super()._copy()
        made.header = self.header.clone()
        made.body = None if self.body is None else self.body.clone()
        return made

    def walk(self) -> Iterator[Signature]:
        """This signature and those inside it."""
        yield self
        yield from self.header.walk()
        if self.body is not None:
            yield from self.body.walk()

    def _kwargs_to_dict(self) -> dict[str, Any]:
        body = None if self.body is None else self.body.to_dict()
        header = self.header
        # As Celery, a list; but a group that has its id already must not lose it.
        members = header.to_dict() if header.options else [one.to_dict() for one in header.tasks]
        return {**self.kwargs, "header": members, "body": body}


class xmap(Signature):
    """One task that calls another for each item: ``[task(item) for item in it]``."""

    subtask_type = "xmap"
    _name = "celery.map"

    def __init__(self, task: Signature, it: Iterable[Any], **options: Any) -> None:
        super().__init__(self._name, kwargs={"task": task, "it": list(it)}, options=options, sender=task.sender)
        self.immutable = True

    def _kwargs_to_dict(self) -> dict[str, Any]:
        task = self.kwargs["task"]
        return {**self.kwargs, "task": task.to_dict() if isinstance(task, Signature) else task}


class starmap(xmap):
    """One task that calls another for each tuple of arguments: ``[task(*args) for args in it]``."""

    subtask_type = "xstarmap"
    _name = "celery.starmap"


class chunks(Signature):
    """A `starmap` for each `n` items, as a group."""

    subtask_type = "chunks"

    def __init__(self, task: Signature, it: Iterable[Any], n: int, **options: Any) -> None:
        if n < 1:
            raise ValueError(f"chunks of {n} items: n must be at least 1")
        super().__init__(
            "celery.chunks", kwargs={"task": task, "it": list(it), "n": n}, options=options, sender=task.sender
        )
        self.immutable = True

    def __call__(self) -> Any:
        """Send it now."""
        return self.apply_async()

    def group(self) -> group:
        """The group of `starmap`s that this stands for."""
        task, items = self.kwargs["task"], iter(self.kwargs["it"])
        made = []
        while part := list(islice(items, self.kwargs["n"])):
            made.append(starmap(task, part))
        return group(made, **self.options)

    def _kwargs_to_dict(self) -> dict[str, Any]:
        task = self.kwargs["task"]
        return {**self.kwargs, "task": task.to_dict() if isinstance(task, Signature) else task}


def signature(
    task: str | Mapping[str, Any] | Signature,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    immutable: bool = False,
    sender: Sender | None = None,
    **options: Any,
) -> Signature:
    """A signature of the task of this name; or of what `to_dict` gave."""
    if isinstance(task, Signature):
        return task
    if isinstance(task, Mapping):
        return from_dict(task, sender=sender)
    return Signature(task, args, kwargs, options, immutable, sender)


_CALLING: Mapping[str, type[Signature]] = {
    "xmap": xmap,
    "map": xmap,
    "xstarmap": starmap,
    "starmap": starmap,
    "chunks": chunks,
}


def from_dict(table: Mapping[str, Any], *, sender: Sender | None = None) -> Signature:
    """A signature from Celery's form. Raises `ValueError` for what is none."""
    task = table.get("task") if isinstance(table, Mapping) else None
    if not isinstance(task, str):
        raise ValueError(f"not a signature: {table!r:.200}")
    # Our own kinds are known by their task too: Celery loses the type of a signature that is sent as a plain dict.
    kind = table.get("subtask_type") or (task.removeprefix("celery.") if task.startswith("celery.") else None)
    kwargs = dict(table.get("kwargs") or {})
    options = dict(table.get("options") or {})
    made: Signature
    if kind in ("chain", "group"):
        tasks = kwargs.pop("tasks", None) or ()
        members = [from_dict(one, sender=sender) for one in tasks]
        made = chain() if kind == "chain" else group()
        made.tasks = tuple(members)
    elif kind == "chord":
        header, body = kwargs.pop("header", None) or (), kwargs.pop("body", None)
        tables: list[Mapping[str, Any]] = [header] if isinstance(header, Mapping) else list(header)
        parts = [from_dict(one, sender=sender) for one in tables]
        whole = parts[0] if len(parts) == 1 and isinstance(parts[0], group) else group(parts)
        made = chord(whole, None if body is None else from_dict(body, sender=sender))
        kwargs = {}
    else:
        cls = _CALLING.get(kind or "", Signature)
        made = Signature.__new__(cls)
        Signature.__init__(made, task, sender=sender)
        if cls is not Signature and isinstance(kwargs.get("task"), Mapping):
            kwargs["task"] = from_dict(kwargs["task"], sender=sender)
    made.args, made.kwargs, made.options = tuple(table.get("args") or ()), kwargs, options
    made.immutable, made.sender = bool(table.get("immutable")), sender
    return made


def as_list(value: Any) -> list[Signature]:
    """The signatures of an option: none, one, or several."""
    if value is None:
        return []
    items = [value] if isinstance(value, Signature | Mapping) else list(value)
    return [one if isinstance(one, Signature) else from_dict(one) for one in items]


def _option_to_dict(value: Any) -> Any:
    if isinstance(value, Signature):
        return value.to_dict()
    if isinstance(value, list | tuple) and any(isinstance(one, Signature) for one in value):
        return [one.to_dict() if isinstance(one, Signature) else one for one in value]
    return value


def _flat(tasks: Iterable[Signature | Iterable[Signature]]) -> Iterator[Signature]:
    """`chain(a, b)` and `chain([a, b])` mean the same."""
    for one in tasks:
        if isinstance(one, Signature):
            yield one
        elif isinstance(one, Iterable) and not isinstance(one, str | bytes | Mapping):
            yield from _flat(one)
        else:
            raise TypeError(f"{one!r} is no signature: write task.s(…)")


def _members(task: Signature, kind: type[_Composed]) -> tuple[Signature, ...]:
    """A chain in a chain, and a group in a group, are taken apart when they have nothing of their own."""
    if isinstance(task, kind) and not (task.options or task.args or task.kwargs):
        return task.tasks
    return (task,)

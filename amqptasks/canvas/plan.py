"""From a signature to the calls that are sent first, and what is written into them of the rest. Pure.

1. `normal`: one form for all that means the same. Chains are flat and only their last member is composed; groups are
   flat; what follows a group is the body of a chord; a member of a chord's header ends in one task.
2. `freeze`: every task and group gets its id, so that handles exist before anything runs and a second execution sends
   the same ids.
3. `expand`: the tasks that are sent now. What follows a task travels in its message: the rest of its chain, reversed,
   the chord that it is a part of, callbacks, errbacks (Celery's message protocol 2, the body's third element).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from amqptasks.canvas.stamps import united
from amqptasks.canvas.types import Signature, as_list, chain, chord, chunks, from_dict, group, xmap

__all__ = [
    "COLLECT",
    "JOIN",
    "Handle",
    "Part",
    "bodies",
    "casualties",
    "expand",
    "freeze",
    "normal",
    "part_of",
    "replaced",
]

#: A task that returns the list it is given: the body of a group whose results are one result.
COLLECT = "celery.accumulate"
#: In a part's chord: the chord is joined over AMQP. Celery's own have no such key.
JOIN = "join"

#: Celery's tuple form: ``((id, parent), None)`` for a task, ``((id, parent), [children])`` for a group.
Handle = tuple[tuple[str, Any], list[Any] | None]

#: Options of a composed signature that belong to its beginning, and to its end.
_FIRST = ("countdown", "eta")
_LAST = ("task_id", "link", "chain", "chord", "group_id", "group_index")


# -- normal form --------------------------------------------------------------------------------------------------


def normal(signature: Signature) -> Signature:
    """The same in normal form. The signature itself is not changed. Raises `ValueError` for a chord without a body."""
    made = signature.clone()
    if isinstance(made, chunks):
        made = made.group()
    if isinstance(made, chain):
        return _normal_chain(made)
    if isinstance(made, group):
        return _normal_group(made)
    if isinstance(made, chord):
        return _normal_chord(made)
    return made


def _normal_chain(one: chain) -> Signature:
    if not one.tasks:
        raise ValueError("an empty chain cannot be sent")
    _spread(one, one.tasks)
    begin, *others = one.tasks
    members: list[Signature] = []
    for task in (begin.clone(one.args, one.kwargs), *others):
        inner = normal(task)
        members.extend(inner.tasks if isinstance(inner, chain) else [inner])
    tail: list[Signature] = []
    for member in reversed(members):
        if tail and isinstance(member, group | chord):
            tail = [_with_body(member, tail)]
        else:
            tail.insert(0, member)
    first, last = tail[0], tail[-1]
    _delay(one, first)
    _take(last, {name: one.options[name] for name in _LAST if name in one.options})
    if len(tail) == 1:
        return first
    made = chain(tail)
    made.immutable, made.sender = one.immutable, one.sender
    return made


def _with_body(member: group | chord, tail: list[Signature]) -> Signature:
    if isinstance(member, group):
        return _normal_chord(chord(member, _chain_of(tail)))
    assert member.body is not None
    member.body = normal(_chain_of([member.body, *tail]))
    return member


def _normal_group(one: group) -> group:
    _spread(one, one.tasks)
    members: list[Signature] = []
    for task in one.tasks:
        task.args = task.args if task.immutable else (*one.args, *task.args)
        if not task.immutable:
            task.kwargs = {**task.kwargs, **one.kwargs}
        inner = normal(task)
        members.extend(inner.tasks if isinstance(inner, group) else [inner])
    for callback in as_list(one.options.pop("link", None)):
        if members:
            _end(members[0]).link(callback)
    _delay(one, *members)
    one.tasks, one.args, one.kwargs = tuple(members), (), {}
    return one


def _normal_chord(one: chord) -> Signature:
    if one.body is None:
        raise ValueError(f"{one!r} has no body: chord(header, body)")
    errbacks = one.options.pop("link_error", None)
    _spread(one, [*one.header.tasks, one.body])
    header = one.header
    if not one.immutable:
        header.args, header.kwargs = (*one.args, *header.args), {**header.kwargs, **one.kwargs}
    body = normal(one.body)
    for errback in as_list(errbacks):
        body.link_error(errback)
    _take(body, {name: one.options.pop(name) for name in _LAST if name in one.options})
    header = _normal_group(header)
    if not header.tasks:
        _delay(one, body)
        return normal(body.clone(([],)))
    _delay(one, *header.tasks)
    header.tasks = tuple(_closed(task) for task in header.tasks)
    one.header, one.body, one.args, one.kwargs = header, body, (), {}
    return one


def _closed(member: Signature) -> Signature:
    """A part of a chord has one result: a group at its end is collected into a list."""
    if isinstance(member, group):
        return _normal_chord(chord(member, _collect(member)))
    if isinstance(member, chain):
        member.tasks = (*member.tasks[:-1], _closed(member.tasks[-1]))
    if isinstance(member, chord):
        assert member.body is not None
        member.body = _closed(member.body)
    return member


def _collect(like: Signature) -> Signature:
    """The body that returns what it gets. It goes where the first task goes, by option or by route."""
    first = next(one for one in like.walk() if one.subtask_type is None or isinstance(one, xmap))
    names = ("queue", "exchange", "routing_key")
    kept = {name: first.options[name] for name in names if name in first.options}
    return Signature(COLLECT, kwargs={"index": 0}, options={**kept, "shadow": first.task}, sender=like.sender)


def _spread(whole: Signature, parts: Sequence[Signature]) -> None:
    """Options of the whole are those of its parts, where they have none of their own."""
    common = {k: v for k, v in whole.options.items() if k not in (*_FIRST, *_LAST, "link_error")}
    stamped = common.pop("stamped_headers", None)
    for part in parts:
        for name, value in common.items():
            part.options.setdefault(name, value)
        if stamped:
            part.options["stamped_headers"] = united(part.options.get("stamped_headers"), stamped)
        for errback in as_list(whole.options.get("link_error")):
            part.link_error(errback)


def _take(end: Signature, options: Mapping[str, Any]) -> None:
    """Give the end of something what follows the whole."""
    for name, value in options.items():
        if name == "link":
            for callback in as_list(value):
                _end(end).link(callback)
        elif name == "chain":
            end.options["chain"] = [*value, *(end.options.get("chain") or [])]
        elif name != "task_id" or end.subtask_type is None:
            end.options[name] = value
        else:
            _end(end).options[name] = value


def bodies(signature: Signature) -> Iterator[Signature]:
    """The tasks that chords' bodies begin with, of all chords in a signature in normal form."""
    for one in signature.walk():
        if isinstance(one, chord) and one.body is not None:
            yield from _begins(one.body)


def _delay(whole: Signature, *parts: Signature) -> None:
    """The time of the whole is that of all tasks that are sent first, where they say none of their own."""
    when = {name: whole.options.pop(name) for name in _FIRST if name in whole.options}
    if when:
        for one in (begin for part in parts for begin in _begins(part)):
            if not any(one.options.get(name) is not None for name in _FIRST):
                one.options.update(when)


def _begins(signature: Signature) -> Iterator[Signature]:
    """The tasks that are sent first."""
    if isinstance(signature, chain):
        yield from _begins(signature.tasks[0])
    elif isinstance(signature, group):
        for one in signature.tasks:
            yield from _begins(one)
    elif isinstance(signature, chord):
        yield from _begins(signature.header)
    else:
        yield signature


def _end(signature: Signature) -> Signature:
    if isinstance(signature, chain):
        return _end(signature.tasks[-1])
    if isinstance(signature, chord) and signature.body is not None:
        return _end(signature.body)
    return signature


def _chain_of(tasks: Sequence[Signature]) -> Signature:
    return tasks[0] if len(tasks) == 1 else chain(*[chain(one) if isinstance(one, chain) else one for one in tasks])


# -- ids ----------------------------------------------------------------------------------------------------------


def freeze(
    signature: Signature,
    new_id: Callable[[], str],
    *,
    common: Mapping[str, Any] | None = None,
    parent: Any = None,
) -> Handle:
    """Give every task and group of a signature in normal form its id, in place. Returns the handle of its end.

    Args:
        common: options for every task (``reply_to``, ``root_id``).
    """
    if isinstance(signature, chain):
        handle: Handle | None = None
        for one in signature.tasks:
            handle = freeze(one, new_id, common=common, parent=parent if handle is None else handle)
        assert handle is not None
        return handle
    if isinstance(signature, group):
        group_id = _own_id(signature, new_id)
        children = [freeze(one, new_id, common=common) for one in signature.tasks]
        return (group_id, parent), list(children)
    if isinstance(signature, chord):
        header = freeze(signature.header, new_id, common=common, parent=parent)
        assert signature.body is not None
        return freeze(signature.body, new_id, common=common, parent=header)
    for name, value in (common or {}).items():
        signature.options.setdefault(name, value)
    return (_own_id(signature, new_id), parent), None


def _own_id(signature: Signature, new_id: Callable[[], str]) -> str:
    found = signature.options.get("task_id")
    if found is None:
        found = signature.options["task_id"] = new_id()
    return str(found)


# -- what is sent -------------------------------------------------------------------------------------------------


def expand(signature: Signature, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> list[Signature]:
    """The plain tasks that are sent now, with `args` in front, and everything that follows in their options.

    Takes a signature in normal form whose ids are set.
    """
    if isinstance(signature, chain):
        first, *rest = signature.tasks
        if rest:
            _take(rest[-1], {name: signature.options[name] for name in _LAST if name in signature.options})
            _take(first, {"chain": [one.to_dict() for one in reversed(rest)]})
        return expand(first, args, kwargs)
    if isinstance(signature, group):
        return list(_expand_group(signature, args, kwargs))
    if isinstance(signature, chord):
        return list(_expand_chord(signature, args, kwargs))
    made = signature.clone(args, kwargs)
    if isinstance(made, xmap):
        made.kwargs = made.to_dict()["kwargs"]
    return [made]


def _expand_group(one: group, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Iterator[Signature]:
    following = one.options.pop("chain", None)
    if following:
        # Of a chain that another program put together: what follows a group is the body of a chord.
        made = normal(chord(one, _chain_of([from_dict(task) for task in reversed(following)])))
        yield from expand(made, args, kwargs)
        return
    for index, task in enumerate(one.tasks):
        _take(task, {"group_id": one.options.get("task_id"), "group_index": index})
        yield from expand(task, args, kwargs)


def _expand_chord(one: chord, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Iterator[Signature]:
    assert one.body is not None
    body = one.body
    # What follows the chord as a whole follows its body.
    _take(body, {name: one.options[name] for name in _LAST if name in one.options})
    group_id = one.header.options["task_id"]
    table = {**body.to_dict(), "chord_size": len(one.header.tasks), JOIN: group_id}
    for index, task in enumerate(one.header.tasks):
        _take(task, {"chord": table, "group_id": group_id, "group_index": index})
        yield from expand(task, args, kwargs)


# -- what does not run any more -----------------------------------------------------------------------------------


class Part(NamedTuple):
    """One task's place in a chord's header. `body` is the body's signature as data."""

    body: Mapping[str, Any]
    group_id: str
    number: int


def part_of(options: Mapping[str, Any]) -> Part | None:
    """The chord that a task with these options is a part of."""
    body = options.get("chord")
    if not isinstance(body, Mapping):
        return None
    return Part(body, str(options.get("group_id") or ""), int(options.get("group_index") or 0))


def casualties(following: Sequence[Mapping[str, Any]], part: Part | None) -> tuple[list[Signature], Part | None]:
    """What never runs when a task fails for good: the tasks after it, and the chord that loses a part by it.

    Args:
        following: the rest of its chain, reversed.
        part: which part of which chord it is itself.
    """
    tasks: list[Signature] = []
    lost = part
    for table in reversed(following):
        whole = from_dict(table)
        for one in whole.walk():
            if one.subtask_type is None or isinstance(one, xmap):
                tasks.append(one)
            if lost is None:
                lost = part_of(one.options)
    return tasks, lost


def replaced(signature: Signature, follow: Mapping[str, Any]) -> Signature:
    """The signature in normal form, with what followed a task that it takes the place of."""
    made = _closed(normal(signature))
    options = {name: value for name, value in follow.items() if value is not None}
    errbacks = as_list(options.pop("link_error", None))
    for one in made.walk():
        if one.subtask_type is None:
            for errback in errbacks:
                one.link_error(errback)
    _take(made, options)
    return made

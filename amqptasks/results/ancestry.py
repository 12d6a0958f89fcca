"""What came before a task in its chain. Without recursion: chains are long."""

from __future__ import annotations

from typing import Any

__all__ = ["lineage", "members", "written"]

#: JSON cannot nest without end: so many of a chain's members before its last are written into a handle.
_MOST = 100


def lineage(last: Any) -> list[Any]:
    """A handle and all before it, the last first."""
    line: list[Any] = []
    while last is not None:
        line.append(last)
        last = last.parent
    return line


def members(handle: Any) -> list[tuple[str, list[Any] | None]]:
    """Id and children of each member, the last first, of a handle in Celery's form ``((id, parent), children)``."""
    line = []
    while handle is not None:
        (id, before), children = handle
        line.append((id, children))
        handle = before
    return line


def written(nearest: Any) -> Any:
    """The nearest handles before one in Celery's form, each within the next."""
    made: Any = None
    for one in reversed(lineage(nearest)[:_MOST]):
        parts = getattr(one, "results", None)
        made = (one.id, made), None if parts is None else [part.as_tuple() for part in parts]
    return made

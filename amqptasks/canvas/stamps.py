"""Stamps: notes in the headers of a call, in Celery's form: options that `stamped_headers` names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Self

__all__ = ["Stampable", "united"]

#: Kinds that are taken apart before anything is sent.
_COMPOSED = ("chain", "group", "chord", "chunks")
_LINKS = ("link", "link_error")


def united(*names: Iterable[str] | None) -> list[str]:
    """Each name once, in order."""
    return list(dict.fromkeys(name for some in names for name in some or ()))


class Stampable:
    """The part of a signature that stamps."""

    subtask_type: ClassVar[str | None]
    options: dict[str, Any]

    def stamp(self, **stamps: Any) -> Self:
        """Note something in the messages of this call, of all inside it, and of their callbacks and errbacks, such as
        ``customer="acme"``. Changes and returns this signature; a stamp that is there already is replaced.

        The task reads them in ``self.request.stamps``, other programs in the header ``stamps``. They stay over retries
        and in dead letters.
        """
        for one in self.walk() if stamps else ():
            if one.subtask_type not in _COMPOSED:
                one.options.update(stamps, stamped_headers=united(one.options.get("stamped_headers"), stamps))
            for name in _LINKS:
                if name in one.options:
                    one.options[name] = [linked.stamp(**stamps) for linked in one.linked(name)]
        return self

    def walk(self) -> Iterator[Any]:
        """This signature and those inside it."""
        raise NotImplementedError  # this is a part of `Signature`, which has it

    def linked(self, name: str) -> list[Any]:
        """The signatures under ``link`` or ``link_error``."""
        raise NotImplementedError  # this is a part of `Signature`, which has it

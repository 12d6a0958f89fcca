"""A call that is not sent yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

__all__ = ["Sender", "Signature", "signature"]


class Sender(Protocol):
    """What can send a signature: the app."""

    def apply_signature(self, signature: Signature, options: Mapping[str, Any]) -> Any:
        """Publish the call and return its handle."""


@dataclass(frozen=True)
class Signature:
    """A task's name, its arguments and its options: a value that can be stored, changed and sent.

    `set` and `clone` return changed copies. `to_dict` gives Celery's form (``task, args, kwargs, options,
    subtask_type, immutable``).
    """

    task: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    immutable: bool = False
    sender: Sender | None = field(default=None, repr=False, compare=False)

    def set(self, **options: Any) -> Signature:
        """A copy with these options of `apply_async` added."""
        return replace(self, options={**self.options, **options})

    def clone(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Signature:
        """A copy with `args` put in front and `kwargs` added, unless the signature is immutable."""
        if self.immutable:
            return replace(self)
        return replace(self, args=(*args, *self.args), kwargs={**self.kwargs, **(kwargs or {})})

    def delay(self, *args: Any, **kwargs: Any) -> Any:
        """Send it now, with partial arguments in front. Returns the `AsyncResult`."""
        return self.apply_async(args, kwargs)

    def apply_async(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """Send it now, with options. Returns the `AsyncResult`; raises what `Task.apply_async` raises."""
        if self.sender is None:
            raise ValueError(f"the signature of {self.task} belongs to no app: build it with app.signature(…)")
        return self.sender.apply_signature(self.clone(args, kwargs), options)

    def to_dict(self) -> dict[str, Any]:
        """Celery's form of a signature."""
        return {
            "task": self.task,
            "args": list(self.args),
            "kwargs": dict(self.kwargs),
            "options": dict(self.options),
            "subtask_type": None,
            "immutable": self.immutable,
        }


def signature(
    task: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    immutable: bool = False,
    sender: Sender | None = None,
    **options: Any,
) -> Signature:
    """A signature of the task named `task`."""
    return Signature(task, tuple(args), kwargs or {}, options, immutable, sender)

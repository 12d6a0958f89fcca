"""What signatures are sent by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from amqptasks.canvas.types import Signature

__all__ = ["Sender"]


class Sender(Protocol):
    """What can send a signature: the app."""

    def apply_signature(self, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Publish the call, with these arguments in front, and return its handle."""

    async def aapply_signature(self, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """`apply_signature` for asyncio."""

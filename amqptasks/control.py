"""Words to the workers, from any process that can publish."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from amqptasks.client import Client
from amqptasks.message import Envelope
from amqptasks.protocol.revokes import (
    IDS_IN_A_MESSAGE,
    Revocable,
    Revocation,
    checked_ids,
    checked_stamps,
    signal_number,
)
from amqptasks.topology.build import revoked_queue

__all__ = ["Control"]


class Control:
    """`app.control`.

    Args:
        prefix: the topology's.
        expires: seconds for which a revoke is remembered.
    """

    def __init__(self, client: Client, prefix: str, *, expires: float) -> None:
        self._client = client
        self._prefix = prefix
        self._expires = expires

    def revoke(self, task_id: str | Iterable[str], terminate: bool = False, signal: str | int = "SIGTERM") -> None:
        """Have tasks not run any more, wherever their messages wait. Returns after the broker's confirm.

        It needs no worker: the broker keeps it, and a worker that starts later reads it first.

        Args:
            task_id: one id, or several.
            terminate: end those that run now, too.
            signal: which signal does that; a name or a number.

        Raises:
            ValueError: an id or the signal is none.
            PublishError: the broker did not take it.
        """
        self._client.publish(self._envelopes(_ids(task_id), terminate, signal))

    async def arevoke(
        self, task_id: str | Iterable[str], terminate: bool = False, signal: str | int = "SIGTERM"
    ) -> None:
        """`revoke` for asyncio: never blocks the loop."""
        await self._client.apublish(self._envelopes(_ids(task_id), terminate, signal))

    def revoke_by_stamped_headers(
        self,
        headers: Mapping[str, Any] | list[str],
        terminate: bool = False,
        signal: str | int = "SIGTERM",
        *,
        expires: float | None = None,
    ) -> None:
        """Have all tasks with one of these stamps not run any more (`Signature.stamp`), as `revoke` does for ids.

        That holds for calls that are made later, too, until it is forgotten.

        Args:
            headers: stamps: name -> a value, or a list of them; or texts ``name=value``. Values are compared as text.
            terminate: end those that run now, too.
            signal: which signal does that; a name or a number.
            expires: seconds for which it is remembered; `revoke.expires` of the settings by default, and at most.

        Raises:
            ValueError: that is no stamp, no signal or no time.
            PublishError: the broker did not take it.
        """
        self._client.publish(self._envelopes(checked_stamps(headers), terminate, signal, expires))

    async def arevoke_by_stamped_headers(
        self,
        headers: Mapping[str, Any] | list[str],
        terminate: bool = False,
        signal: str | int = "SIGTERM",
        *,
        expires: float | None = None,
    ) -> None:
        """`revoke_by_stamped_headers` for asyncio: never blocks the loop."""
        await self._client.apublish(self._envelopes(checked_stamps(headers), terminate, signal, expires))

    def _envelopes(
        self, keys: Sequence[Revocable], terminate: bool, signal: str | int, expires: float | None = None
    ) -> Sequence[Envelope]:
        signum = signal_number(signal)
        if expires is not None and not 0 < expires <= self._expires:
            raise ValueError(
                f"expires is {expires:g} s; it is more than 0 and at most revoke.expires, {self._expires:g} s"
            )
        forgotten = time.time() + (self._expires if expires is None else expires)
        key = revoked_queue(self._prefix)
        return [
            Envelope(
                self._prefix,
                key,
                Revocation(
                    tuple(keys[start : start + IDS_IN_A_MESSAGE]), forgotten, signum if terminate else None
                ).encode(),
            )
            for start in range(0, len(keys), IDS_IN_A_MESSAGE)
        ]


def _ids(task_id: str | Iterable[str]) -> list[Revocable]:
    ids = [task_id] if isinstance(task_id, str) else list(task_id)
    return [
        one
        for start in range(0, len(ids), IDS_IN_A_MESSAGE)
        for one in checked_ids(ids[start : start + IDS_IN_A_MESSAGE])
    ]

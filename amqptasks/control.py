"""Words to the workers, from any process that can publish."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from amqptasks.client import Client
from amqptasks.message import Envelope
from amqptasks.protocol.revokes import IDS_IN_A_MESSAGE, Revocation, checked_ids, signal_number
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
        self._client.publish(self._envelopes(task_id, terminate, signal))

    async def arevoke(
        self, task_id: str | Iterable[str], terminate: bool = False, signal: str | int = "SIGTERM"
    ) -> None:
        """`revoke` for asyncio: never blocks the loop."""
        await self._client.apublish(self._envelopes(task_id, terminate, signal))

    def _envelopes(self, task_id: str | Iterable[str], terminate: bool, signal: str | int) -> Sequence[Envelope]:
        signum = signal_number(signal)
        ids = [task_id] if isinstance(task_id, str) else list(task_id)
        expires = time.time() + self._expires
        key = revoked_queue(self._prefix)
        return [
            Envelope(
                self._prefix,
                key,
                Revocation(
                    checked_ids(ids[start : start + IDS_IN_A_MESSAGE]), expires, signum if terminate else None
                ).encode(),
            )
            for start in range(0, len(ids), IDS_IN_A_MESSAGE)
        ]

"""Reads dead letters as they stand in the broker, and leaves them there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pika

__all__ = ["DeadLetter", "DeadLetters"]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What the headers of one dead letter say. `headers` are those that begin with ``x-task-``."""

    queue: str
    task: str
    task_id: str
    arguments: str
    headers: dict[str, Any]

    @property
    def exception(self) -> str:
        """The class of the exception, without its module."""
        return str(self.headers.get("x-task-exception", "")).rpartition(".")[2]

    @property
    def reason(self) -> str:
        """Why it stands here."""
        return str(self.headers.get("x-task-reason", ""))

    @property
    def attempts(self) -> int:
        """How often it ran."""
        return int(self.headers.get("x-task-attempts", 0))


class DeadLetters:
    """The dead-letter queues of a broker, over one connection."""

    def __init__(self, url: str, queues: Iterable[str]) -> None:
        self._queues = tuple(queues)
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self._channel = self._connection.channel()

    def __enter__(self) -> DeadLetters:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._connection.is_open:
            self._connection.close()

    def count(self) -> int:
        """How many there are."""
        return sum(self._channel.queue_declare(queue, passive=True).method.message_count for queue in self._queues)

    def read(self) -> list[DeadLetter]:
        """All of them, by queue, oldest first. They go back to their queues at once."""
        found = []
        channel = self._connection.channel()
        for queue in self._queues:
            while True:
                method, properties, _body = channel.basic_get(queue, auto_ack=False)
                if method is None:
                    break
                found.append(_letter(queue, properties.headers or {}))
        # What was not acknowledged returns to its place (AMQP 0-9-1, channel.close).
        channel.close()
        return found


def _letter(queue: str, headers: Mapping[str, Any]) -> DeadLetter:
    return DeadLetter(
        queue=queue,
        task=str(headers.get("task", "")),
        task_id=str(headers.get("id", "")),
        arguments=str(headers.get("argsrepr", "")),
        headers={name: value for name, value in headers.items() if name.startswith("x-task-")},
    )

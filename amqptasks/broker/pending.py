"""A message on its way to its confirm."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from amqptasks.broker.wire import EncodedProperties, encode_properties
from amqptasks.config.models import PublishRetrySettings
from amqptasks.errors import AmqpTasksError, ConfigError, PublishError
from amqptasks.message import Envelope
from amqptasks.protocol.signing import Keyring

__all__ = ["Pending", "RetryPolicy", "retry_policy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a publish is tried again, and how long it pauses. Seconds; Celery's names."""

    max_retries: int | None = 5
    interval_start: float = 0.1
    interval_step: float = 0.3
    interval_max: float = 1.5

    def pause(self, retry: int) -> float:
        """Seconds before retry number `retry`, counted from 0."""
        return min(self.interval_max, self.interval_start + retry * self.interval_step)


NO_RETRY = RetryPolicy(max_retries=0)
#: A queue of replies belongs to one caller and lives on one node: what it refuses is not held for ever.
REPLY = RetryPolicy(max_retries=3)


def retry_policy(settings: PublishRetrySettings, given: Mapping[str, Any] | None, *, retry: bool) -> RetryPolicy:
    """The policy of one publish. Raises `ConfigError` for a key that does not exist."""
    if not retry:
        return NO_RETRY
    values = settings.model_dump()
    for name, value in (given or {}).items():
        if name not in values:
            raise ConfigError(f"retry_policy: {name!r} is not known; keys: {', '.join(values)}")
        values[name] = value
    return RetryPolicy(**values)


class Pending:
    """One message, until it is confirmed or failed. Without a deadline it is tried for ever."""

    __slots__ = (
        "deadline",
        "declared",
        "done",
        "envelope",
        "policy",
        "problem",
        "properties",
        "retries",
        "returned",
        "sent",
        "since",
    )

    def __init__(
        self,
        envelope: Envelope,
        properties: EncodedProperties,
        done: Callable[[PublishError | None], None],
        *,
        deadline: float | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        self.envelope = envelope
        self.properties = properties
        #: Called once; None afterwards.
        self.done: Callable[[PublishError | None], None] | None = done
        self.deadline = deadline
        self.policy = policy
        self.retries = 0
        self.returned: str | None = None
        self.sent = False
        #: For which (exchange, routing key) the topology was declared already.
        self.declared: tuple[str, str | None] | None = None
        #: Why the topology could not be declared for it.
        self.problem: AmqpTasksError | None = None
        self.since = time.monotonic()

    def try_again(self) -> bool:
        """Count a retry. False when there is none left."""
        if self.policy is None:
            return True
        if self.policy.max_retries is not None and self.retries >= self.policy.max_retries:
            return False
        self.retries += 1
        return True

    def redirect(self, old: str, new: str, keys: Keyring | None) -> bool:
        """Have its replies come to another queue. Whether they came to the old one. It is signed anew with `keys`."""
        if self.done is None or self.envelope.reply_to != old:
            return False
        self.envelope.reply_to = new
        if keys is not None:
            keys.sign(self.envelope)
        self.properties = encode_properties(self.envelope)
        return True

    def pause(self) -> float:
        """Seconds before the retry that was counted last."""
        return 0.5 if self.policy is None else self.policy.pause(self.retries - 1)

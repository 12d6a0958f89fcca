"""How often a letter may be looked at, before the broker deletes it.

A message that goes back counts as a failed delivery on RabbitMQ 3.x, when its quorum queue has a limit, and on 4.0 to
4.2, where a queue without a limit has one of 20. At the limit it is dropped, since dead-letter queues have no
dead-letter exchange of their own. Policy and argument count together: the smaller one, but a negative one for none.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from typing import Any

from amqptasks.broker.management import ManagementApi
from amqptasks.broker.policies import Policy
from amqptasks.broker.versions import counts_looks
from amqptasks.config import BrokerSettings
from amqptasks.errors import AccessRefused, BrokerUnreachable, ConfigError

__all__ = ["DeliveryLimits", "effective_limit"]

logger = logging.getLogger(__name__)
#: Nobody looks so often by accident.
_ENOUGH = 1000
_MENDED = 1_000_000
_DEFAULT = 20


def effective_limit(queue: Mapping[str, Any], major: int) -> int | None:
    """A queue's delivery limit, from what the management API says of it; None for none."""
    if queue.get("type", "classic") != "quorum":
        return None
    policy = (queue.get("effective_policy_definition") or {}).get("delivery-limit")
    argument = (queue.get("arguments") or {}).get("x-delivery-limit")
    given = [one for one in (policy, argument) if isinstance(one, int)]
    if not given:
        return _DEFAULT if major >= 4 else None
    limit = max(given) if min(given) < 0 else min(given)
    return None if limit < 0 else limit


def _told(policy: Policy) -> dict[str, Any]:
    return {"effective_policy_definition": policy.definition, "operator_policy": policy.operator}


class DeliveryLimits:
    """Asks the management API once, where one is set, and refuses visits that could delete letters."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._queues: dict[str, Mapping[str, Any]] | None = None
        self._server: dict[str, str] = {}
        self._vhost = ""

    def check(self, name: str) -> None:
        """Raises `ConfigError`, with the command that mends it, for a queue whose letters bear few looks."""
        if self._settings.management_url is None:
            return
        if self._queues is None:
            self._queues = self._asked()
        queue = self._queues.get(name)
        if queue is None or not counts_looks(self._server):
            return
        limit = effective_limit(queue, int(self._server["version"].partition(".")[0]))
        if limit is not None and limit <= _ENOUGH:
            raise ConfigError(
                f"looking at {name!r} can delete letters: each look counts as a failed delivery, and its delivery "
                f"limit is {limit}. {self._way_out(name, queue)}"
            )

    def _asked(self) -> dict[str, Mapping[str, Any]]:
        try:
            with ManagementApi(self._settings, purpose="how often a letter may be looked at") as api:
                self._server, self._vhost = api.server(), api.vhost
                policies = api.policies()
                queues = {one["name"]: one for one in api.get("queues/{vhost}?disable_stats=true")}
                return {name: {**_told(policies.get(name, Policy())), **one} for name, one in queues.items()}
        except (BrokerUnreachable, AccessRefused, ConfigError) as error:
            logger.warning("Note: whether letters bear being looked at is not known: %s", error)
            return {}

    def _way_out(self, name: str, queue: Mapping[str, Any]) -> str:
        argument = (queue.get("arguments") or {}).get("x-delivery-limit")
        if isinstance(argument, int) and 0 <= argument <= _ENOUGH:
            return (
                f"It was declared with x-delivery-limit: {argument}, which no policy raises. Move its messages to "
                "another queue with a shovel, delete it, and run `amqptasks topology apply`"
            )
        if queue.get("operator_policy"):
            return (
                f"An operator policy may say so ({queue['operator_policy']!r}): have its delivery-limit raised, or a "
                f"policy with {_MENDED} for this queue"
            )
        command = (
            f"rabbitmqctl set_policy -p {shlex.quote(self._vhost)} dead-letters '\\.dlq$|\\.unroutable$' "
            f"'{{\"delivery-limit\": {_MENDED}}}' --priority 100 --apply-to queues"
        )
        why = f"Policy {queue['policy']!r} says so" if queue.get("policy") else "That is the default of this RabbitMQ"
        return f"{why}. Raise it first: {command}"

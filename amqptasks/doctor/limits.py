"""Time limits of tasks, against the time after which the broker takes a message back."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from amqptasks.app import AmqpTasks
from amqptasks.builtin import is_builtin
from amqptasks.config import Settings
from amqptasks.doctor.findings import Finding, Level

__all__ = ["check_consumer_timeouts", "longest_limits"]

#: A node's own, unless its configuration says otherwise.
_NODES_SECONDS = 1800.0


def longest_limits(settings: Settings, app: AmqpTasks | None) -> dict[str, float]:
    """Queue -> the longest time limit of the tasks that go there. Tasks without a limit are not counted."""
    default = settings.worker.time_limit or 0.0
    if app is None:
        named = [task.time_limit or 0.0 for task in settings.tasks.values()]
        return dict.fromkeys(settings.queues, max([default, *named]))
    found = dict.fromkeys(settings.queues, 0.0)
    for name, task in app.tasks.items():
        queue = app.router.explain(name, task_queue=task.options.queue).route.queue
        if queue in found and not is_builtin(name):
            found[queue] = max(found[queue], task.options.time_limit or default)
    return found


def check_consumer_timeouts(
    queues: Mapping[str, Mapping[str, Any]],
    version: tuple[int, int],
    limits: Mapping[str, float],
    vhost: str = "/",
) -> Iterator[Finding]:
    """Queues from which the broker takes a task back before its time limit. `queues`: as the management API tells."""
    for name, limit in limits.items():
        queue = queues.get(name)
        # Classic queues have none from RabbitMQ 4.3 on; before 3.12 it is the node's for all of them.
        if queue is None or version < (3, 12) or (queue.get("type") == "classic" and version >= (4, 3)):
            continue
        policy = queue.get("effective_policy_definition") or {}
        own = (queue.get("arguments") or {}).get("x-consumer-timeout")
        told = [value / 1000 for value in (own, policy.get("consumer-timeout")) if isinstance(value, int)]
        timeout = min(told, default=_NODES_SECONDS)
        if limit <= timeout:
            continue
        seconds = math.ceil(limit) + 60
        by_policy = isinstance(policy.get("consumer-timeout"), int) or own is None
        definition = json.dumps({**policy, "consumer-timeout": seconds * 1000})
        options = ["-p", vhost, "--priority", "100", "--apply-to", "queues"]
        command = ["rabbitmqctl", "set_policy", *options, f"timeout-of-{name}", f"^{re.escape(name)}$", definition]
        yield Finding(
            Level.WARNING,
            "consumer timeout",
            f"queue {name}: a task may run {limit:g} s, and the broker takes it back after {timeout:g} s"
            + ("" if told else ", unless its node was told otherwise"),
            "it is given to another worker while the first one still runs it",
            shlex.join(command) if by_policy else f"queues: {{{name}: {{consumer_timeout: {seconds}}}}}",
        )

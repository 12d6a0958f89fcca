"""What the broker tells, through the management API."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from amqptasks.app import AmqpTasks
from amqptasks.broker.management import ManagementApi, MissingTag
from amqptasks.broker.versions import accepted_arguments
from amqptasks.config import Settings
from amqptasks.doctor.findings import Finding, Level, counted
from amqptasks.doctor.limits import check_consumer_timeouts, longest_limits
from amqptasks.doctor.permissions import check_permissions
from amqptasks.doctor.policies import check_delivery_limits, check_policies
from amqptasks.doctor.queues import check_queues
from amqptasks.errors import AmqpTasksError, ConfigError
from amqptasks.topology import build_topology
from amqptasks.topology.entities import Topology
from amqptasks.topology.plan import compare

__all__ = ["FEATURES", "check_broker"]

#: From which version on, and what it means here.
FEATURES = [
    ((3, 10), "quorum queues with at-least-once dead letters and message TTL: the delay ladder"),
    ((3, 12), "a consumer timeout of its own for each queue"),
    ((4, 0), "quorum queues with two priorities; a default delivery limit of 20; 16 MiB messages by default"),
    ((4, 3), "quorum queues with 32 priorities; no transient queues that are not exclusive"),
]
_SKEW_SECONDS = 1.0
#: HTTP's Date has whole seconds, and the broker's server makes it once a second.
_DATE_AGE = timedelta(seconds=2)


def check_broker(
    api: ManagementApi, settings: Settings, topology: Topology | None = None, app: AmqpTasks | None = None
) -> Iterator[Finding]:
    """Version, permissions, alarms, clock, drift, policies, depths, consumers, timeouts, deprecated features.

    What the user may not ask for, or what gets no answer, is a finding of its own: the other checks are made.
    """
    topology = topology or build_topology(settings)
    server = api.server()
    limits = longest_limits(settings, app)
    version = _release(server["version"])
    yield from _version(server["version"], version, max(limits.values(), default=0.0))
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "permissions": lambda: check_permissions(api, settings, topology),
        "alarms": lambda: _alarms(api),
        "clock": lambda: _clock(api),
        "deprecated": lambda: _deprecated(api),
        "topology": lambda: _drift(api, topology, server),
        "policies": lambda: check_policies(api, topology),
        "delivery limit": lambda: check_delivery_limits(api, topology, version),
        "consumer timeout": lambda: check_consumer_timeouts(api.queues(), version, limits, api.vhost),
        "queues": lambda: check_queues(api, settings, topology),
    }
    for name, check in checks.items():
        yield from _attempt(api, name, check)


def _attempt(api: ManagementApi, name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except MissingTag as error:
        yield Finding(
            Level.UNKNOWN,
            name,
            f"not checked: user {api.user!r} of broker.management_url lacks the tag {error.tag}",
            "RabbitMQ tells this to users with that tag only",
            shlex.join(["rabbitmqctl", "set_user_tags", api.user, error.tag]),
        )
    except AmqpTasksError as error:
        yield Finding(Level.UNKNOWN, name, f"not checked: {error}", "the broker did not tell", "amqptasks doctor")


def _release(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _version(text: str, version: tuple[int, int], longest: float) -> Iterator[Finding]:
    if version < (3, 10):
        yield Finding(
            Level.ERROR,
            "version",
            f"RabbitMQ {text}",
            "delays need quorum queues with message TTL",
            "apt-get install --only-upgrade rabbitmq-server",
        )
        return
    missing = [f"{'.'.join(map(str, since))}: {what}" for since, what in FEATURES if version < since]
    yield Finding(Level.OK, "version", f"RabbitMQ {text}", "newer ones have: " + "; ".join(missing) if missing else "")
    if version < (3, 12):
        yield Finding(
            Level.WARNING if longest > 1800 else Level.INFO,
            "consumer timeout",
            "this version has one consumer timeout for the whole node, 30 minutes unless it was changed",
            "RabbitMQ takes a task that runs longer from its worker and gives it to another one, too",
            "rabbitmq.conf: consumer_timeout = 2592000000",
        )


#: Name in the API -> what it is, and how the limit is raised.
_ALARMS = {
    "mem_alarm": ("memory", ["set_vm_memory_high_watermark", "0.6"]),
    "disk_free_alarm": ("disk", ["set_disk_free_limit", "50MB"]),
}


def _alarms(api: ManagementApi) -> Iterator[Finding]:
    nodes = api.get("nodes")
    raised = [(node["name"], *kind) for node in nodes for name, kind in _ALARMS.items() if node.get(name)]
    for node, kind, command in raised:
        yield Finding(
            Level.ERROR,
            "alarms",
            f"{kind} alarm on {node}",
            f"the broker takes no messages until its {kind} is free again: calls raise BrokerBlocked",
            shlex.join(["rabbitmqctl", "-n", node, *command]),
        )
    if not raised:
        yield Finding(Level.OK, "alarms", f"none on {counted(len(nodes), 'node')}")
    for node in nodes:
        if not node.get("running", True):
            name = node["name"]
            yield Finding(
                Level.ERROR,
                "nodes",
                f"{name} is not running",
                "one more, and quorum queues have no majority",
                f"ssh {name.rpartition('@')[2]} systemctl start rabbitmq-server",
            )


def _clock(api: ManagementApi) -> Iterator[Finding]:
    asked = datetime.now(UTC)
    said = api.date()
    heard = datetime.now(UTC)
    if said is None:
        return
    earliest = parsedate_to_datetime(said)
    skew = max((asked - earliest - _DATE_AGE).total_seconds(), (earliest - heard).total_seconds())
    if skew > _SKEW_SECONDS:
        yield Finding(
            Level.WARNING,
            "clock",
            f"this machine and the broker differ by {skew:.0f} s",
            "eta, expires and the age of messages are told by clocks",
            "timedatectl set-ntp true",
        )
    else:
        yield Finding(Level.OK, "clock", "this machine and the broker agree")


def _deprecated(api: ManagementApi) -> Iterator[Finding]:
    try:
        used = api.get("deprecated-features/used")
    except ConfigError:
        return  # before RabbitMQ 3.13
    for feature in used if isinstance(used, list) else []:
        more = f": {feature['doc_url']}" if feature.get("doc_url") else ""
        yield Finding(
            Level.WARNING,
            "deprecated",
            f"in use: {feature.get('name')}",
            f"a later RabbitMQ refuses it{more}",
            "rabbitmqctl list_deprecated_features used",
        )


def _drift(api: ManagementApi, topology: Topology, server: dict[str, str]) -> Iterator[Finding]:
    sent = {queue.name: accepted_arguments(queue, server) for queue in topology.queues}
    changes = [one for one in compare(topology, api.topology(), sent) if one.differs]
    if changes:
        what = ", ".join(sorted({f"{one.action} {one.kind}" for one in changes}))
        yield Finding(
            Level.ERROR,
            "topology",
            f"the broker is not as declared: {counted(len(changes), 'difference')} ({what})",
            "messages may take another way than the settings say",
            "amqptasks topology plan",
        )
    else:
        yield Finding(Level.OK, "topology", "the broker is as declared")

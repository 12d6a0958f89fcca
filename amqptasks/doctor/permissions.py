"""Whether the user of ``broker.url`` may do what its work needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from amqptasks.broker.management import ManagementApi
from amqptasks.config import Settings
from amqptasks.doctor.findings import Finding, Level
from amqptasks.errors import AccessRefused, ConfigError
from amqptasks.topology.entities import Topology
from amqptasks.topology.permissions import Needs, needs

__all__ = ["check_permissions", "lacking"]

_SHOWN = 3


def check_permissions(api: ManagementApi, settings: Settings, topology: Topology) -> Iterator[Finding]:
    """What a producer and a worker need, against what the user has. RabbitMQ tells it to administrators only."""
    user = unquote(urlsplit(settings.broker.url[0]).username or "guest")
    try:
        given = api.get(f"permissions/{{vhost}}/{quote(user, safe='')}")
    except AccessRefused:
        yield Finding(
            Level.UNKNOWN,
            "permissions",
            f"those of user {user!r} were not checked",
            "RabbitMQ tells them to users with the tag administrator only, and broker.management_url names another",
            shlex.join(["rabbitmqctl", "list_user_permissions", user]),
        )
        return
    except ConfigError:
        given = {}  # 404: there are none
    required = needs(topology, settings.topology.prefix)
    missing = {role: lacking(given, required[role]) for role in ("producer", "worker")}
    short = [role for role, lacks in missing.items() if lacks]
    if not short:
        yield Finding(Level.OK, "permissions", f"user {user!r} may call tasks and run them")
        return
    for role in short:
        yield Finding(
            Level.ERROR if len(short) == len(missing) else Level.INFO,
            "permissions",
            f"user {user!r} cannot be a {role}: no {'; no '.join(missing[role])}",
            "calls are refused" if role == "producer" else "a worker of this user does not start, or loses its channel",
            f"{shlex.join(['amqptasks', 'topology', 'permissions', '--role', role, '--user', user])} | sh",
        )


def lacking(given: Mapping[str, Any], required: Needs) -> list[str]:
    """What is not allowed: "write on a, b". `given`: regular expressions as the management API tells them.

    RabbitMQ searches them in the name; an empty one matches nothing (RabbitMQ, "Access Control").
    """
    found = []
    for right, names in (("configure", required.configure), ("write", required.write), ("read", required.read)):
        pattern = str(given.get(right) or "^$")
        try:
            refused = [name for name in names if not re.search(pattern, name)]
        except re.error:
            continue  # Erlang's expressions know more than Python's
        if refused:
            more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
            found.append(f"{right} on {', '.join(refused[:_SHOWN])}{more}")
    return found

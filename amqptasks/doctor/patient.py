"""All checks, in their order."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit, urlunsplit

from amqptasks.app import AmqpTasks
from amqptasks.broker.management import ManagementApi, MissingTag
from amqptasks.broker.visits import on_some_node
from amqptasks.config import Settings, mask_url
from amqptasks.doctor.broker import check_broker
from amqptasks.doctor.findings import Finding, Level
from amqptasks.doctor.settings import check_application, check_claims, check_results, check_routes, check_settings
from amqptasks.errors import AccessRefused, AmqpTasksError
from amqptasks.topology.entities import Topology

__all__ = ["Patient", "examine"]


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined. `problem`: why the app could not be imported."""

    settings: Settings
    topology: Topology
    app: AmqpTasks | None = None
    problem: str | None = None


def examine(patient: Patient) -> Iterator[Finding]:
    """Every finding, also of what is well. Never raises for what is ill."""
    settings = patient.settings
    yield from check_settings(settings)
    yield from check_routes(settings, patient.topology)
    yield from check_application(patient.app, patient.problem, settings.app)
    yield from check_results(settings)
    yield from check_claims(settings)
    try:
        on_some_node(settings.broker, "amqptasks/doctor", lambda _connection, _vhost: None)
    except AmqpTasksError as error:
        yield Finding(
            Level.ERROR, "connection", str(error), "nothing is published or run", _connecting(error, settings)
        )
        return
    yield Finding(Level.OK, "connection", "the broker lets us in")
    if settings.broker.management_url is None:
        yield Finding(
            Level.UNKNOWN,
            "management",
            "broker.management_url is not set",
            "versions, alarms, depths and the topology were not checked",
            f"broker: {{management_url: '{_management_url(settings)}'}}",
        )
        return
    try:
        with ManagementApi(settings.broker, purpose="`doctor`") as api:
            yield from check_broker(api, settings, patient.topology, patient.app)
    except AmqpTasksError as error:
        mend = _managing(error, settings)
        yield Finding(Level.ERROR, "management", str(error), "the broker was not checked", mend)


# --- commands --------------------------------------------------------------------------------------------------------


def _connecting(error: AmqpTasksError, settings: Settings) -> str:
    parts = urlsplit(settings.broker.url[0])
    user, vhost = unquote(parts.username or "guest"), unquote(parts.path.removeprefix("/")) or "/"
    if not isinstance(error, AccessRefused):
        return f"rabbitmq-diagnostics check_port_listener {parts.port or 5672}"
    if "virtual host" not in str(error):
        return shlex.join(["rabbitmqctl", "authenticate_user", user])
    permit = f"amqptasks topology permissions --role worker --user {shlex.quote(user)} | sh"
    return f"rabbitmqctl add_vhost {shlex.quote(vhost)} && {permit}" if "does not exist (" in str(error) else permit


def _management_url(settings: Settings) -> str:
    parts = urlsplit(settings.broker.url[0])
    scheme, port = ("https", 15671) if parts.scheme == "amqps" else ("http", 15672)
    # The password is not shown.
    return mask_url(urlunsplit((scheme, f"{parts.netloc.rpartition('@')[0]}@{parts.hostname}:{port}", "", "", "")))


def _managing(error: AmqpTasksError, settings: Settings) -> str:
    parts = urlsplit(settings.broker.management_url or "")
    user = unquote(parts.username or "guest")
    if isinstance(error, MissingTag):
        return shlex.join(["rabbitmqctl", "set_user_tags", user, error.tag])
    if isinstance(error, AccessRefused):
        return shlex.join(["rabbitmqctl", "authenticate_user", user])
    return "rabbitmq-plugins enable rabbitmq_management"

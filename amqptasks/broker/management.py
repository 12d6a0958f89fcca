"""RabbitMQ's management API, for operators' tools: what stands in a virtual host (HTTP API of 3.10 to 4.3)."""

from __future__ import annotations

import ssl
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from amqptasks.broker.policies import Policy, effective
from amqptasks.config import BrokerSettings, mask_url
from amqptasks.errors import AccessRefused, BrokerUnreachable, ConfigError
from amqptasks.topology.entities import Binding, Exchange, Queue, Topology, freeze_arguments

__all__ = ["ManagementApi", "MissingTag"]

_SECONDS = 10.0
#: Where a URL names none: https is a proxy's or a cloud's. RabbitMQ itself says 15672, or 15671 with TLS.
_PORTS = {"https": 443}
#: What the broker says of a user without a tag, in small letters (3.10 to 4.3), and the tag.
_TAGS = {
    "not management user": "management",
    "not monitor user": "monitoring",
    "not policymaker": "policymaker",
    "not administrator user": "administrator",
}
_POLICY_COLUMNS = "name,policy,operator_policy,effective_policy_definition"


def _tls(settings: BrokerSettings) -> ssl.SSLContext:
    """As to the broker, without a client's certificate."""
    tls = settings.tls
    context = ssl.create_default_context(cafile=tls.ca_file if tls is not None else None)
    if tls is not None and not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class MissingTag(AccessRefused):
    """The API tells this only to users with the tag `tag`."""

    def __init__(self, message: str, tag: str) -> None:
        super().__init__(message)
        self.tag = tag


class ManagementApi:
    """The API at ``broker.management_url``, for the virtual host of ``broker.url``.

    Methods raise `BrokerUnreachable` when nobody answers, `AccessRefused` for a wrong password or a missing permission
    (`MissingTag` for a tag), `ConfigError` when no URL is set, nothing that speaks this API is there, or the virtual
    host does not exist.
    """

    def __init__(self, settings: BrokerSettings, *, purpose: str) -> None:
        if settings.management_url is None:
            raise ConfigError(
                f"{purpose} needs the management API: set broker.management_url, such as http://user:password@host:15672"
            )
        parts = urlsplit(settings.management_url)
        self._shown = mask_url(settings.management_url)
        self.vhost = unquote(urlsplit(settings.url[0]).path.removeprefix("/")) or "/"
        self.user = unquote(parts.username or "guest")
        login = (self.user, unquote(parts.password or "guest"))
        address = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        base = (
            f"{parts.scheme}://{address}:{parts.port or _PORTS.get(parts.scheme, 15672)}{parts.path.rstrip('/')}/api/"
        )
        import httpx  # noqa: PLC0415 - slow, and workers without a URL need none

        self._failure = httpx.HTTPError
        trust = _tls(settings) if parts.scheme == "https" else True
        self._client = httpx.Client(base_url=base, auth=login, timeout=_SECONDS, verify=trust)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str) -> Any:
        """The decoded answer to a GET. `{vhost}` in the path is the virtual host."""
        where = path.replace("{vhost}", quote(self.vhost, safe=""))
        try:
            answer = self._client.get(where)
        except self._failure as error:
            raise BrokerUnreachable(f"{self._shown}: the management API does not answer: {error}") from error
        if answer.status_code in (401, 403):
            raise self._refusal(answer.status_code, answer.text)
        if answer.status_code == 404:
            raise ConfigError(
                f"{self._shown}: there is no virtual host {self.vhost!r}, or this is not the management API"
            )
        try:
            answer.raise_for_status()
            return answer.json()
        except (self._failure, ValueError):
            text = f"{answer.status_code} {answer.text[:200]}"
            raise ConfigError(f"{self._shown}: this is not RabbitMQ's management API: {text}") from None

    def _refusal(self, status: int, text: str) -> AccessRefused:
        """The broker answers 401 to a wrong password, and to a user whose tags are too few."""
        for reason, tag in _TAGS.items():
            if reason in text.lower():
                return MissingTag(f"{self._shown}: the user {self.user!r} needs the tag {tag} for this", tag)
        if status == 401 and "vhost" not in text and "virtual host" not in text:
            return AccessRefused(f"{self._shown}: wrong user or password")
        return AccessRefused(
            f"{self._shown}: the user {self.user!r} has no permission in the virtual host {self.vhost!r}: {text[:200]}"
        )

    def server(self) -> dict[str, str]:
        """Product and version, in the form of AMQP's connection.start."""
        return {"product": "RabbitMQ", "version": str(self.get("overview")["rabbitmq_version"])}

    def date(self) -> str | None:
        """The clock of the machine that answers: HTTP's Date header."""
        try:
            found: str | None = self._client.get("overview").headers.get("date")
        except self._failure:
            return None
        return found

    def policies(self) -> dict[str, Policy]:
        """What policies are in effect on each queue that has any.

        A queue's statistics tell; of one that is seconds old, and where the broker keeps none, it is worked out.
        """
        own = {one["name"]: one["definition"] for one in self.get("policies/{vhost}")}
        operators = self.get("operator-policies/{vhost}")
        told = {one["name"]: one for one in self.get(f"queues/{{vhost}}?columns={_POLICY_COLUMNS}")}
        found = {}
        for queue in self.get("queues/{vhost}?disable_stats=true"):
            name, known = queue["name"], told.get(queue["name"], {})
            policy = str(queue.get("policy") or "")
            if known.get("effective_policy_definition") is not None and (known.get("policy") or "") == policy:
                operator = str(known.get("operator_policy") or "")
                found[name] = Policy(policy, operator, known["effective_policy_definition"])
            else:
                given = (policy, own.get(policy, {})) if policy else None
                found[name] = effective(name, queue.get("type", "classic"), given, operators)
        return {name: one for name, one in found.items() if one.name or one.operator}

    def queues(self) -> dict[str, dict[str, Any]]:
        """All that is known of each queue: counts as they are now, the rest as old as the statistics.

        Where the broker keeps none, there are counts and what was declared, but no consumers.
        """
        fresh = {one["name"]: one for one in self.get("queues/{vhost}?disable_stats=true&enable_queue_totals=true")}
        told = {one["name"]: one for one in self.get("queues/{vhost}")}
        return {name: {**told.get(name, {}), **one} for name, one in fresh.items()}

    def depths(self) -> dict[str, tuple[int, str]]:
        """(messages, node that counts them) of each queue: with those that consumers hold, and those on their way to a
        dead-letter queue.

        A classic queue is asked. A quorum queue's number is as old as its leader's last tick, 5 s at most by default,
        and 0 until the first tick of a new leader.
        """
        found = self.get("queues/{vhost}?disable_stats=true&enable_queue_totals=true")
        return {one["name"]: (int(one.get("messages", 0)), str(one.get("leader") or one.get("node"))) for one in found}

    def topology(self) -> Topology:
        """What stands in the virtual host now, without the exchanges and bindings that every one has."""
        exchanges = tuple(
            Exchange(
                one["name"], one["type"], one["durable"], one["auto_delete"], one["internal"],
                freeze_arguments(one["arguments"]),
            )
            for one in self.get("exchanges/{vhost}")
            if one["name"] and not one["name"].startswith("amq.")
        )  # fmt: skip
        queues = tuple(
            Queue(
                one["name"],
                one["durable"],
                one.get("exclusive", False),
                one["auto_delete"],
                freeze_arguments({**one["arguments"], "x-queue-type": one.get("type", "classic")}),
            )
            for one in self.get("queues/{vhost}?disable_stats=true")
        )
        bindings = tuple(
            Binding(
                one["source"],
                one["destination"],
                one["destination_type"],
                one["routing_key"],
                freeze_arguments(one["arguments"]),
            )
            for one in self.get("bindings/{vhost}")
            if one["source"]
        )
        return Topology(exchanges, queues, bindings)

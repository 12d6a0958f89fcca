"""A small client of RabbitMQ's management API, for tests and demos."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote, urlsplit

__all__ = ["Management", "ManagementError"]


class ManagementError(RuntimeError):
    """The API answered with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Management:
    """The API at `url` (with user and password), for one virtual host."""

    def __init__(self, url: str, vhost: str = "/") -> None:
        parts = urlsplit(url)
        host = parts.hostname or "localhost"
        self._base = f"{parts.scheme}://{host}:{parts.port or 15672}{parts.path.rstrip('/')}/api"
        login = f"{parts.username or 'guest'}:{parts.password or 'guest'}"
        self._authorization = "Basic " + base64.b64encode(login.encode()).decode()
        self.user = parts.username or "guest"
        self.vhost = vhost

    def request(self, method: str, path: str, body: Any = None, *, timeout: float = 30) -> Any:
        """One request; the decoded answer. Raises `ManagementError`."""
        request = urllib.request.Request(  # noqa: S310 - the scheme is the caller's http or https
            f"{self._base}/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": self._authorization, "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310 - as above
                text = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read().decode(errors="replace")[:300]
            raise ManagementError(f"{method} {path}: {error.code} {detail}", error.code) from None
        return json.loads(text) if text else None

    # -- virtual hosts, users ----------------------------------------------------------------------------------------

    def create_vhost(self, name: str) -> None:
        """Create a virtual host that this API's user may use."""
        self.request("PUT", f"vhosts/{quote(name, safe='')}", {})
        self.permit(self.user, vhost=name)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with everything in it."""
        self.request("DELETE", f"vhosts/{quote(name, safe='')}")

    def create_user(self, name: str, password: str, tags: str = "") -> None:
        """Create a user without permissions."""
        self.request("PUT", f"users/{quote(name, safe='')}", {"password": password, "tags": tags})

    def delete_user(self, name: str) -> None:
        """Delete a user."""
        self.request("DELETE", f"users/{quote(name, safe='')}")

    def permit(
        self, user: str, configure: str = ".*", write: str = ".*", read: str = ".*", *, vhost: str | None = None
    ) -> None:
        """Give a user permissions on the virtual host: three regular expressions."""
        self.request(
            "PUT",
            f"permissions/{quote(vhost or self.vhost, safe='')}/{quote(user, safe='')}",
            {"configure": configure, "write": write, "read": read},
        )

    # -- queues ------------------------------------------------------------------------------------------------------

    def _path(self, kind: str, name: str = "") -> str:
        path = f"{kind}/{quote(self.vhost, safe='')}"
        return f"{path}/{quote(name, safe='')}" if name else path

    def queues(self) -> dict[str, Any]:
        """Every queue by name."""
        return {queue["name"]: queue for queue in self.request("GET", self._path("queues"))}

    def counts(self, name: str) -> tuple[int, int]:
        """(ready, unacknowledged) of a queue as they are now, not as the last statistics had them."""
        for queue in self.request("GET", f"{self._path('queues')}?disable_stats=true&enable_queue_totals=true"):
            if queue["name"] == name:
                return int(queue.get("messages_ready", 0)), int(queue.get("messages_unacknowledged", 0))
        raise ManagementError(f"there is no queue {name!r}", 404)

    def queue(self, name: str) -> dict[str, Any]:
        """One queue: its type, arguments, and counts as old as the statistics interval."""
        found: dict[str, Any] = self.request("GET", self._path("queues", name))
        return found

    def delete_queue(self, name: str) -> None:
        """Delete a queue with its messages."""
        self.request("DELETE", self._path("queues", name))

    def unbind(self, exchange: str, queue: str, routing_key: str) -> None:
        """Remove a binding."""
        path = f"bindings/{quote(self.vhost, safe='')}/e/{quote(exchange, safe='')}/q/{quote(queue, safe='')}"
        self.request("DELETE", f"{path}/{quote(routing_key, safe='')}")

    def messages(self, queue: str, count: int = 1000, *, remove: bool = False) -> list[dict[str, Any]]:
        """Messages of a queue: payload, properties with headers, routing key. They stay unless `remove`."""
        mode = "ack_requeue_false" if remove else "ack_requeue_true"
        # Thousands from a quorum queue take their time: each is a round of agreement.
        found: list[dict[str, Any]] = self.request(
            "POST",
            f"{self._path('queues', queue)}/get",
            {"count": count, "ackmode": mode, "encoding": "auto"},
            timeout=60,
        )
        return found

    # -- connections, policies ---------------------------------------------------------------------------------------

    def connections(self) -> list[dict[str, Any]]:
        """The connections of this virtual host."""
        path = f"vhosts/{quote(self.vhost, safe='')}/connections"
        found: list[dict[str, Any]] = self.request("GET", path)
        return found

    def close_connection(self, name: str) -> None:
        """Have the broker close a connection. One that is gone already is fine."""
        try:
            self.request("DELETE", f"connections/{quote(name, safe='')}")
        except ManagementError as error:
            if error.status != 404:
                raise

    def set_policy(
        self, name: str, pattern: str, definition: dict[str, Any], *, operator: bool = False, priority: int = 0
    ) -> None:
        """Create or change a policy, or an operator policy."""
        body = {"pattern": pattern, "definition": definition, "apply-to": "queues", "priority": priority}
        self.request("PUT", self._path("operator-policies" if operator else "policies", name), body)

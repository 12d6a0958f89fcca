"""Routing: from a task's name to exchange, routing key, queue and priority. Pure, compiled once."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import translate
from typing import Literal

from amqptasks.config import RouteSettings, Settings

__all__ = ["Route", "RouteMatch", "Router"]


@dataclass(frozen=True, slots=True)
class Route:
    """Where a message goes. `queue` is None when an exchange of the user's decides."""

    exchange: str
    routing_key: str
    queue: str | None
    priority: int | None


@dataclass(frozen=True, slots=True)
class RouteMatch:
    """A route, and what decided it."""

    route: Route
    source: Literal["rule", "task", "default"]
    index: int | None = None
    rule: RouteSettings | None = None


class Router:
    """Resolves routes: call options, then the first rule that matches, then the task's own queue, then the default."""

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.topology.prefix
        self._default = settings.topology.default_queue
        self._rules = [(rule, _matcher(rule)) for rule in settings.routes]
        self._known: dict[tuple[str, str | None, int | None], Route] = {}

    def resolve(
        self,
        task: str,
        *,
        queue: str | None = None,
        exchange: str | None = None,
        routing_key: str | None = None,
        priority: int | None = None,
        task_queue: str | None = None,
        task_priority: int | None = None,
    ) -> Route:
        """The route of one call. Options of the call win over everything.

        Without them it is one look into a dict, but for a name's first call.
        """
        key = (task, task_queue, task_priority)
        route = self._known.get(key)
        if route is None:
            route = self.explain(task, task_queue=task_queue, task_priority=task_priority).route
            if len(self._known) < 10_000:  # names may come from outside (`send_task`)
                self._known[key] = route
        if queue is None and exchange is None and routing_key is None:
            return route if priority is None else Route(route.exchange, route.routing_key, route.queue, priority)
        if priority is None:
            priority = route.priority
        if exchange is not None:
            return Route(exchange, (queue or "") if routing_key is None else routing_key, queue, priority)
        if queue is not None:
            return Route(self._prefix, routing_key or queue, queue, priority)
        return Route(route.exchange, routing_key or "", None, priority)

    def explain(self, task: str, *, task_queue: str | None = None, task_priority: int | None = None) -> RouteMatch:
        """The route of a task without call options, and what decided it."""
        for index, (rule, matches) in enumerate(self._rules):
            if matches(task):
                queue = rule.queue or (None if rule.exchange else task_queue or self._default)
                key = (queue or "") if rule.routing_key is None else rule.routing_key
                priority = task_priority if rule.priority is None else rule.priority
                return RouteMatch(Route(rule.exchange or self._prefix, key, queue, priority), "rule", index, rule)
        queue = task_queue or self._default
        return RouteMatch(Route(self._prefix, queue, queue, task_priority), "task" if task_queue else "default")


def _matcher(rule: RouteSettings) -> Callable[[str], object]:
    if rule.regex is not None:
        return re.compile(rule.regex).search
    return re.compile(translate(rule.match or "")).match

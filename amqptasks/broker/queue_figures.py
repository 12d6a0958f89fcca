"""What can be said of queues: how much waits, who consumes, how fast, for how long.

With the management API: counts as they are now, rates and ages from its samples (HTTP API, ``lengths_age``,
``msg_rates_age``). Without it AMQP tells what waits and how many consume (queue.declare-ok), and no more.

Nothing here takes a message to look at it, so the age of the oldest one is worked out: a queue gives first what came
first, so the message at its head came after all those that are gone or held by now. When so many had come, the samples
tell. They reach back an hour at most.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from amqptasks.broker.counts import queue_counts
from amqptasks.broker.management import ManagementApi
from amqptasks.config import BrokerSettings
from amqptasks.errors import ConfigError

__all__ = ["Age", "QueueFigures", "figures_by_amqp", "figures_by_api", "oldest"]

_WINDOW = 60
#: How far back, and how finely, in seconds: what RabbitMQ keeps of queues by default.
_SCALES = ((600, 5), (3600, 60))
#: Seconds, messages in the queue, gone so far, published so far.
_Point = tuple[float, int, int, int]
_GONE = ("ack", "deliver_no_ack", "get_no_ack")
_COLUMNS = ",".join(
    [
        *("name", "type", "consumers", "arguments", "effective_policy_definition"),
        *("messages", "messages_ready", "messages_unacknowledged", "messages_details.samples"),
        *(f"message_stats.{kind}_details.samples" for kind in ("publish", *_GONE)),
    ]
)


@dataclass(frozen=True, slots=True)
class Age:
    """How long the oldest message has waited. `exactly` to the interval of the samples; else a bound."""

    seconds: float
    exactly: Literal["about", "at least", "at most"] = "about"


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """What is known of one queue; None is not known. Rates are messages a second, over the last minute.

    `messages` are all, also what the broker holds back until their queue takes them.
    """

    name: str
    kind: str | None = None
    messages: int | None = None
    ready: int | None = None
    unacknowledged: int | None = None
    consumers: int | None = None
    rate_in: float | None = None
    rate_out: float | None = None
    oldest: Age | None = None

    @property
    def seconds_to_empty(self) -> float | None:
        """If all goes on as in the last minute; None where it grows, stands still or nothing is known."""
        if not self.ready and not self.unacknowledged:
            return 0.0 if self.ready is not None else None
        if self.rate_in is None or self.rate_out is None or self.rate_out <= self.rate_in:
            return None
        return ((self.ready or 0) + (self.unacknowledged or 0)) / (self.rate_out - self.rate_in)


def figures_by_amqp(settings: BrokerSettings, names: Iterable[str]) -> list[QueueFigures]:
    """What waits and who consumes; a queue that does not exist has neither. Raises as `queue_counts` does."""
    counts = queue_counts(settings, names)
    return [
        QueueFigures(name) if found is None else QueueFigures(name, ready=found[0], consumers=found[1])
        for name, found in counts.items()
    ]


def figures_by_api(
    api: ManagementApi, names: Sequence[str] | None, also: tuple[str, ...] = (), ageless: Container[str] = ()
) -> list[QueueFigures]:
    """All that is known of these queues, or of every queue of the virtual host.

    `also`: and of those that stand there under names that begin so. Of those in `ageless` the age is left out: it takes
    a request or two a queue. Raises as `ManagementApi.get` does.
    """
    # With rates_mode none the broker counts no acknowledgements, and nothing that is worked out from them is true.
    counted = api.get("overview?columns=rates_mode").get("rates_mode") != "none"
    fresh = {one["name"]: one for one in api.get("queues/{vhost}?disable_stats=true&enable_queue_totals=true")}
    found = {one["name"]: {**one, **fresh.get(one["name"], {})} for one in api.get(_path("", (_WINDOW, 10)))}
    made = []
    wanted = sorted(found) if names is None else names
    for name in dict.fromkeys([*wanted, *(name for name in sorted(found) if name.startswith(also))]):
        queue = found.get(name, {"name": name})
        aged = queue.get("messages_ready") and name not in ageless
        made.append(_figures(queue, counted, _oldest(api, queue, counted) if aged else None))
    return made


def _path(queue: str, scale: tuple[int, int]) -> str:
    age, step = scale
    where = f"queues/{{vhost}}/{quote(queue, safe='')}" if queue else "queues/{vhost}"
    return f"{where}?columns={_COLUMNS}&lengths_age={age}&lengths_incr={step}&msg_rates_age={age}&msg_rates_incr={step}"


def _figures(queue: Mapping[str, Any], counted: bool, oldest: Age | None) -> QueueFigures:
    rate_in, rate_out = _rates(_History(queue)) if counted else (None, None)
    return QueueFigures(
        queue["name"],
        queue.get("type"),
        queue.get("messages"),
        queue.get("messages_ready"),
        queue.get("messages_unacknowledged"),
        queue.get("consumers"),
        rate_in,
        rate_out,
        oldest,
    )


def _oldest(api: ManagementApi, queue: Mapping[str, Any], counted: bool) -> Age | None:
    best = None
    for scale in _SCALES:
        try:
            found = oldest(queue, api.get(_path(queue["name"], scale)), counted)
        except ConfigError:
            return None  # deleted meanwhile
        if found is not None and found.exactly != "at least":
            return found
        if found is None:
            continue
        # Coarse samples may begin later than fine ones; and one stands for all that came until the next.
        bound = Age(max(0.0, found.seconds - scale[1]), "at least")
        if best is None or bound.seconds > best.seconds:
            best = bound
    return best


# --- samples ---------------------------------------------------------------------------------------------------------


class _History:
    """What the API's samples say of a queue, oldest first.

    Where the broker remembers nothing, as from before its start, it gives zeros: they are left out.
    """

    def __init__(self, queue: Mapping[str, Any]) -> None:
        stats = queue.get("message_stats") or {}
        depths = _samples(queue.get("messages_details"))
        gone = [_samples(stats.get(f"{kind}_details")) for kind in _GONE]
        published = _samples(stats.get("publish_details"))
        points: list[_Point] = [
            (moment, depth, sum(_at(one, moment) for one in gone), _at(published, moment)) for moment, depth in depths
        ]
        known = next((number for number, point in enumerate(points) if any(point[1:])), len(points))
        self.points = points[known:]


def _samples(details: Any) -> list[tuple[float, int]]:
    samples = details.get("samples") if isinstance(details, dict) else None
    return sorted((one["timestamp"] / 1000, int(one["sample"])) for one in samples or ())


def _at(samples: Sequence[tuple[float, int]], moment: float) -> int:
    """A counter's value then. It has no samples after its last change."""
    return next((value for at, value in reversed(samples) if at <= moment), samples[0][1] if samples else 0)


def _rates(history: _History) -> tuple[float | None, float | None]:
    """Into the queue and out of it. What came is what went and what more is there: so messages that the broker itself
    moved, delayed ones and dead letters, are counted too, unless as many expired meanwhile."""
    if len(history.points) < 2:
        return None, None
    (began, depth, gone, published), (ended, *now) = history.points[0], history.points[-1]
    seconds = ended - began
    went = max(0, now[1] - gone)
    came = max(0, now[0] - depth + went, now[2] - published)
    return came / seconds, went / seconds


def oldest(queue: Mapping[str, Any], samples: Mapping[str, Any], counted: bool = True) -> Age | None:
    """How long a queue's oldest ready message has waited.

    Args:
        queue: what the API says of the queue. samples: the same with samples of its counts.
        counted: whether the broker counts what is acknowledged.
    """
    arguments = {**(queue.get("effective_policy_definition") or {}), **(queue.get("arguments") or {})}
    ttl = arguments.get("x-message-ttl", arguments.get("message-ttl"))
    overflow = arguments.get("x-overflow", arguments.get("overflow", "drop-head"))
    limited = any(name.removeprefix("x-") in ("max-length", "max-length-bytes") for name in arguments)
    # What is urgent overtakes, and what is dropped is not counted.
    in_order = counted and "x-max-priority" not in arguments and not (limited and overflow == "drop-head")
    points = _History(samples).points
    held = int(queue.get("messages_unacknowledged") or 0)
    found = (_age_in_order(points, held) if in_order else _age_since_empty(points)) if points else None
    if ttl is not None and (found is None or found.seconds > ttl / 1000 or found.exactly == "at least"):
        return Age(ttl / 1000, "at most")  # what expires is not counted either
    return found


def _age_since_empty(points: Sequence[_Point]) -> Age | None:
    empty = next((moment for moment, depth, _, _ in reversed(points) if not depth), None)
    return None if empty is None else Age(points[-1][0] - empty, "at most")


def _age_in_order(points: Sequence[_Point], held: int) -> Age:
    now, _, gone, _ = points[-1]
    ahead = gone + held
    later, came_later = now, points[-1][1] + gone
    for moment, depth, went, _ in reversed(points):
        came = depth + went
        if came <= ahead:
            # Of those that came between the two moments, the first ones are gone.
            share = min(1.0, (ahead - came) / max(1, came_later - came))
            return Age(now - moment - share * (later - moment))
        later, came_later = moment, came
    return Age(now - points[0][0], "at least")

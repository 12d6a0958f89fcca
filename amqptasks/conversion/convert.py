"""From a table of Celery's settings to the document of a YAML file, and notes on what is not in it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from amqptasks.config import Settings
from amqptasks.conversion.names import ALREADY_SO, is_lost
from amqptasks.conversion.queues import add_queues
from amqptasks.conversion.routes import add_annotations, add_routes
from amqptasks.conversion.schedule import add_schedule
from amqptasks.conversion.values import plain, seconds

__all__ = ["Converted", "Note", "convert"]


@dataclass(frozen=True, slots=True)
class Note:
    """What is said of a setting that was not simply taken over.

    Args:
        key: of Celery's settings.
        kind: ``already`` needs no setting here; ``lost`` has no counterpart; ``look`` was taken over, not as it was.
    """

    key: str
    kind: Literal["already", "lost", "look"]
    text: str


@dataclass(slots=True)
class Converted:
    """The document, and notes."""

    document: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def put(self, path: str, value: Any) -> None:
        """Set a value; `path` has dots between its keys."""
        *sections, key = path.split(".")
        at = self.document
        for section in sections:
            at = at.setdefault(section, {})
        at[key] = value

    def lost(self, key: str, text: str = "no counterpart") -> None:
        """Say that something of a setting stays behind."""
        self.notes.append(Note(key, "lost", text))

    def look(self, key: str, text: str) -> None:
        """Say that somebody should look at it."""
        self.notes.append(Note(key, "look", text))


#: Setting -> where it goes as it is.
_SAME = {
    "task_time_limit": "worker.time_limit",
    "task_soft_time_limit": "worker.soft_time_limit",
    "task_always_eager": "testing.always_eager",
    "task_eager_propagates": "testing.eager_propagates",
    "task_store_eager_result": "testing.store_eager_result",
    "task_send_sent_event": "events.send_sent",
    "worker_send_task_events": "worker.send_task_events",
    "worker_concurrency": "worker.concurrency",
    "worker_max_tasks_per_child": "worker.max_tasks_per_child",
    "worker_disable_rate_limits": "worker.disable_rate_limits",
    "worker_enable_remote_control": "worker.remote_control",
    "broker_connection_timeout": "broker.connection_timeout",
    "broker_connection_retry_on_startup": "broker.connection_retry_on_startup",
}
#: Options of every task.
_FOR_ALL = {
    "task_ignore_result": "ignore_result",
    "task_track_started": "track_started",
    "task_default_rate_limit": "rate_limit",
    "task_default_priority": "priority",
}
_SERIALIZERS = {
    "application/json": "json",
    "application/x-python-serialize": "pickle",
    "application/x-msgpack": "msgpack",
    "application/x-yaml": "yaml",
}
_COMPRESSIONS = {"gzip": "gzip", "bz2": "bzip2", "bzip2": "bzip2", "lzma": "lzma", "brotli": "brotli", "zstd": "zstd"}
#: Without a bound, where it is None.
_NULLABLE = ("broker_connection_max_retries",)
_POOLS = ("prefork", "processes", "threads", "solo", "gevent", "eventlet")


def convert(settings: Mapping[str, Any]) -> Converted:
    """The YAML document that does what these settings do.

    Args:
        settings: Celery's, by their names of today. What is None there has the default here.
    """
    found = {key: value for key, value in settings.items() if value is not None or key in _NULLABLE}
    to = Converted()
    for key, path in _SAME.items():
        if key in found:
            to.put(path, plain(found[key]))
    for part in (_general, _broker, _results, _bodies, _worker, _for_all):
        part(found, to)
    add_queues(found, to.document, to.look, to.lost)
    add_annotations(found.get("task_annotations"), to.document, to.lost)
    add_routes(found.get("task_routes"), to.document, to.lost)
    add_schedule(found.get("beat_schedule") or {}, to.document, to.lost)
    for key in found:
        if key in ALREADY_SO:
            to.notes.append(Note(key, "already", ALREADY_SO[key]))
        elif is_lost(key):
            to.lost(key)
    to.document = {section: to.document[section] for section in Settings.model_fields if section in to.document}
    return to


def _general(found: Mapping[str, Any], to: Converted) -> None:
    modules = [*_words(found.get("imports", ())), *_words(found.get("include", ()))]
    if modules:
        to.put("include", list(dict.fromkeys(modules)))
    if "timezone" in found:
        to.put("timezone", str(found["timezone"]))


def _broker(found: Mapping[str, Any], to: Converted) -> None:
    for option in found.get("broker_transport_options") or {}:
        if option == "confirm_publish":
            to.notes.append(Note("broker_transport_options", "already", "confirm_publish: always so"))
        else:
            to.lost("broker_transport_options", f"{option} has no counterpart")
    tls = found.get("broker_use_ssl")
    urls = found.get("broker_url", ())
    parts = urls.split(";") if isinstance(urls, str) else list(urls)
    nodes = [url for url in (_amqp(str(part).strip(), bool(tls), to) for part in parts) if url]
    if nodes:
        to.put("broker.url", nodes[0] if len(nodes) == 1 else nodes)
    if isinstance(tls, Mapping):
        for theirs, ours in (("ca_certs", "ca_file"), ("certfile", "cert_file"), ("keyfile", "key_file")):
            if tls.get(theirs):
                to.put(f"broker.tls.{ours}", str(tls[theirs]))
        if "cert_reqs" in tls and not tls["cert_reqs"]:
            to.put("broker.tls.verify", False)
    if "broker_heartbeat" in found:
        if found["broker_heartbeat"]:
            to.put("broker.heartbeat", int(found["broker_heartbeat"]))
        else:
            to.lost("broker_heartbeat", "heartbeats cannot be turned off: no task runs where they are answered")
    if "broker_connection_max_retries" in found:
        to.put("broker.connection_max_retries", found["broker_connection_max_retries"] or None)
    if found.get("task_publish_retry") is False:
        to.put("broker.publish_retry.max_retries", 0)
    policy = found.get("task_publish_retry_policy") or {}
    for key, value in policy.items():
        if key in ("max_retries", "interval_start", "interval_step", "interval_max"):
            to.put(f"broker.publish_retry.{key}", value)
        else:
            to.lost("task_publish_retry_policy", f"{key} has no counterpart")


def _amqp(url: str, tls: bool, to: Converted) -> str | None:
    scheme, separator, rest = url.partition("://")
    if scheme not in ("amqp", "amqps", "pyamqp", "librabbitmq") or not separator:
        to.lost("broker_url", f"{scheme}:// is no AMQP; RabbitMQ it must be. Write its broker.url")
        return None
    if urlsplit(url).password:
        to.look(
            "broker_url", "a password stands in it; AMQPTASKS_BROKER__URL or AMQPTASKS_BROKER__URL_FILE keep it out"
        )
    return f"{'amqps' if tls or scheme == 'amqps' else 'amqp'}://{rest}"


def _results(found: Mapping[str, Any], to: Converted) -> None:
    if "result_backend" in found:
        backend = _backend(str(found["result_backend"]), to)
        if backend is not None:
            to.put("result.backend", backend)
            if urlsplit(backend).password:
                to.look("result_backend", "a password stands in it; AMQPTASKS_RESULT__BACKEND keeps it out")
    if "result_expires" in found:
        lifetime = seconds(found["result_expires"])
        if lifetime:
            to.put("result.expires", lifetime)
        else:
            to.lost("result_expires", "results always expire; result.expires may be long")


def _backend(theirs: str, to: Converted) -> str | None:
    scheme, separator, rest = theirs.partition("://")
    if scheme in ("rpc", "amqp"):
        return "rpc://"
    if scheme == "disabled":
        return "none"
    if scheme == "cache" or scheme.startswith("cache+"):
        scheme = scheme.removeprefix("cache+")
        if scheme != "cache" and "memory" not in scheme:
            return f"memcached://{rest.replace(';', ',')}"
    elif scheme.startswith("db+"):
        return f"{scheme.removeprefix('db+').partition('+')[0]}{separator}{rest}"
    elif scheme in ("redis", "rediss", "mongodb"):
        return theirs if separator else f"{scheme}://"
    to.lost("result_backend", f"{scheme}: rpc, redis, postgresql, mysql, sqlite, memcached and mongodb there are here")
    return None


def _bodies(found: Mapping[str, Any], to: Converted) -> None:
    if "task_serializer" in found:
        to.put("serialization.serializer", _SERIALIZERS.get(found["task_serializer"], found["task_serializer"]))
    if "accept_content" in found:
        accepted = [_SERIALIZERS.get(one, one) for one in _words(found["accept_content"])]
        to.put("serialization.accept_content", sorted(set(accepted), key=accepted.index))
    if "task_compression" in found:
        name = str(found["task_compression"]).removeprefix("application/x-")
        if name in _COMPRESSIONS:
            to.put("serialization.compression", _COMPRESSIONS[name])
        else:
            to.lost("task_compression", f"{name}: {', '.join(dict.fromkeys(_COMPRESSIONS.values()))} there are here")


def _worker(found: Mapping[str, Any], to: Converted) -> None:
    if "worker_pool" in found:
        if found["worker_pool"] in _POOLS:
            to.put("worker.pool", found["worker_pool"])
        else:
            to.lost("worker_pool", f"{found['worker_pool']}: process, thread, asyncio, gevent and solo there are here")
    if found.get("worker_soft_shutdown_timeout"):
        to.put("worker.grace_period", plain(found["worker_soft_shutdown_timeout"]))
    if "worker_max_memory_per_child" in found:
        to.put("worker.max_memory_per_child", f"{int(found['worker_max_memory_per_child'])}KiB")


def _for_all(found: Mapping[str, Any], to: Converted) -> None:
    for key, option in _FOR_ALL.items():
        if key in found:
            to.document.setdefault("tasks", {}).setdefault("*", {})[option] = plain(found[key])


def _words(value: str | Iterable[Any]) -> list[str]:
    return [value] if isinstance(value, str) else [str(one) for one in value]

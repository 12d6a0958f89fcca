"""Types of single settings: durations, sizes, names, and what each refuses."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from amqptasks.config.quantities import parse_bytes, parse_seconds, rate_text

__all__ = [
    "AmqpUrls",
    "BrokerSeconds",
    "Compression",
    "Count",
    "FileSystemUrl",
    "HttpAddress",
    "ManagementUrl",
    "PoolName",
    "PositiveSeconds",
    "Prefetch",
    "Priority",
    "Rate",
    "RegularExpression",
    "ResultBackend",
    "Seconds",
    "Serializer",
    "Size",
    "TimeZone",
    "WholeSeconds",
    "http_address",
]


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _amqp_url(value: str) -> str:
    if not value.startswith(("amqp://", "amqps://")):
        raise ValueError("a broker URL begins with amqp:// or amqps://")
    try:
        _ = urlsplit(value).port
    except ValueError:
        # The text of the error may hold a piece of the password.
        raise ValueError(
            "the URL's host or port cannot be read (a port is a number up to 65535); write special characters of user "
            "name and password in percent notation (`/` is %2F, `@` is %40, `:` is %3A)"
        ) from None
    return value


def _management_url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("the management API's URL begins with http:// or https://")
    try:
        host = urlsplit(value).hostname if urlsplit(value).port != 0 else None
    except ValueError:
        host = None
    if not host:  # the text of the error may hold a piece of the password
        raise ValueError("the URL's host or port cannot be read; write special characters in percent notation")
    return value


def _zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        zones = available_timezones()
        if not zones and value == "UTC":
            return value
        if not zones:
            raise ValueError("this machine has no time zone data: install tzdata, or use UTC") from None
        near = get_close_matches(value, zones, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ", such as Europe/Berlin"
        raise ValueError(f"{value!r} is no time zone{hint}") from None
    return value


def http_address(value: object) -> str:
    """``HOST:PORT`` in one way of writing. Raises `ValueError` with a sentence."""
    text = str(value).strip()
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535) or ("]" in host) != (":" in host):
        raise ValueError(
            f"{text!r} is no address; write HOST:PORT, such as 127.0.0.1:9808 or [::1]:9808, or :9808 for all of them"
        )
    return f"{host}:{int(port)}"


def _compiles(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a regular expression: {error}") from None
    return value


_BACKENDS = ("none", "rpc", "redis", "rediss", "postgresql", "mysql", "sqlite", "memcached", "mongodb")


def _backend(value: str) -> str:
    scheme, separator, _ = value.partition("://")
    name = scheme.partition("+")[0]
    if name not in _BACKENDS or bool(separator) == (name == "none"):
        near = get_close_matches(name, _BACKENDS, 1)
        urls = ["none", *(f"{one}://" for one in _BACKENDS[1:])]
        hint = f"did you mean {urls[_BACKENDS.index(near[0])]}?" if near else f"one of {', '.join(urls)}"
        raise ValueError(f"{scheme + separator!r} is no result backend; {hint}")
    return value


def _file_system(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if not (scheme and separator and rest):
        raise ValueError("a file system's URL is SCHEME://PATH, such as file:///mnt/tasks/bodies or s3://bucket/tasks")
    # fsspec has two names for it: here it has one.
    if scheme == "local" or (scheme == "file" and not (rest.startswith("/") and rest.strip("/"))):
        raise ValueError("a directory's URL has three slashes and its whole path, such as file:///mnt/tasks/bodies")
    return value


_DURATION_SCHEMA = WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]})
_SIZE_SCHEMA = WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]})
_RATE_SCHEMA = WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]})
_URLS_SCHEMA = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
)
#: RabbitMQ refuses longer times to live with 406 (measured on 3.10: 3650 days pass, 3660 do not).
_BROKER_MAX_SECONDS = 3650 * 86400

Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0, allow_inf_nan=False), _DURATION_SCHEMA]
PositiveSeconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0, allow_inf_nan=False), _DURATION_SCHEMA]
BrokerSeconds = Annotated[
    float, BeforeValidator(parse_seconds), Field(ge=0, le=_BROKER_MAX_SECONDS, allow_inf_nan=False), _DURATION_SCHEMA
]
WholeSeconds = Annotated[int, BeforeValidator(parse_seconds), _DURATION_SCHEMA]
Size = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0), _SIZE_SCHEMA]
Rate = Annotated[str, BeforeValidator(rate_text), _RATE_SCHEMA]
Count = Annotated[int, Field(ge=1)]
Priority = Annotated[int, Field(ge=0, le=255)]
AmqpUrls = Annotated[
    tuple[Annotated[str, AfterValidator(_amqp_url)], ...],
    BeforeValidator(_one_or_many),
    Field(min_length=1),
    _URLS_SCHEMA,
]
RegularExpression = Annotated[str, AfterValidator(_compiles)]
ResultBackend = Annotated[str, AfterValidator(_backend)]
HttpAddress = Annotated[str, BeforeValidator(http_address)]
FileSystemUrl = Annotated[str, AfterValidator(_file_system)]
ManagementUrl = Annotated[str, AfterValidator(_management_url)]
TimeZone = Annotated[str, AfterValidator(_zone)]
Prefetch = Annotated[int, Field(ge=1, le=65535)] | Literal["auto"]
Serializer = Literal["json", "msgpack", "yaml", "pickle"]
Compression = Literal["gzip", "bzip2", "lzma", "brotli", "zstd"]
PoolName = Literal["process", "prefork", "processes", "thread", "threads", "asyncio", "solo", "gevent", "eventlet"]

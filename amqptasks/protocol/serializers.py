"""Serializers by name and by content type, with the accept list.

Only what the accept list names is decoded (promise G9): pickle executes code while it loads, so a worker decodes it
only when ``serialization.accept_content`` says so.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from amqptasks.errors import ConfigError, DecodeError
from amqptasks.protocol import jsontypes

__all__ = ["Serializer", "accepted", "serializer"]


@dataclass(frozen=True, slots=True)
class Serializer:
    """One way to write a body. `dumps` raises what its library raises, `loads` raises `DecodeError`."""

    name: str
    content_type: str
    content_encoding: str
    dumps: Callable[[Any], bytes]
    loads: Callable[[bytes], Any]


def _yaml_dumps(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode()


def _yaml_loads(body: bytes) -> Any:
    try:
        return yaml.safe_load(body)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise DecodeError(f"not YAML: {error}") from None


def _msgpack() -> Any:
    try:
        return importlib.import_module("msgpack")
    except ImportError:
        raise ConfigError(
            "the msgpack serializer needs the package msgpack: pip install 'amqptasks[msgpack]'"
        ) from None


def _msgpack_dumps(value: Any) -> bytes:
    return bytes(_msgpack().packb(value, use_bin_type=True))


def _msgpack_loads(body: bytes) -> Any:
    msgpack = _msgpack()
    try:
        return msgpack.unpackb(body, raw=False, strict_map_key=False)
    except (ValueError, TypeError, UnicodeDecodeError, msgpack.UnpackException, RecursionError) as error:
        raise DecodeError(f"not msgpack: {error}") from None


def _pickle_loads(body: bytes) -> Any:
    try:
        return pickle.loads(body)  # noqa: S301 - only reached when the accept list names pickle
    except Exception as error:
        raise DecodeError(f"not a pickle: {error!r}") from None


_SERIALIZERS = {
    one.name: one
    for one in (
        Serializer("json", "application/json", "utf-8", jsontypes.dumps, jsontypes.loads),
        Serializer("msgpack", "application/x-msgpack", "binary", _msgpack_dumps, _msgpack_loads),
        Serializer("yaml", "application/x-yaml", "utf-8", _yaml_dumps, _yaml_loads),
        Serializer("pickle", "application/x-python-serialize", "binary", pickle.dumps, _pickle_loads),
    )
}


def serializer(name: str) -> Serializer:
    """The serializer of that name. Raises `ConfigError` naming those that exist."""
    found = _SERIALIZERS.get(name)
    if found is None:
        raise ConfigError(f"serializer {name!r} is not known; one of {', '.join(_SERIALIZERS)}")
    return found


def accepted(names: Iterable[str]) -> dict[str, Serializer]:
    """Content type -> serializer, for an accept list of names or content types."""
    by_type = {one.content_type: one for one in _SERIALIZERS.values()}
    chosen = (by_type.get(name) or serializer(name) for name in names)
    return {one.content_type: one for one in chosen}

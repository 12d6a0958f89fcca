"""One file per result store. Each has its own optional dependency."""

from __future__ import annotations

import importlib
from difflib import get_close_matches

from amqptasks.errors import ConfigError
from amqptasks.results.store import ResultStore

__all__ = ["open_store"]

#: Scheme -> (module, class, extra of the package).
_STORES = {
    "redis": ("redis", "RedisStore", "redis"),
    "rediss": ("redis", "RedisStore", "redis"),
    "redis+socket": ("redis", "RedisStore", "redis"),
    "postgresql": ("sql", "SqlStore", "postgresql"),
    "mysql": ("sql", "SqlStore", "mysql"),
    "mariadb": ("sql", "SqlStore", "mysql"),
    "sqlite": ("sql", "SqlStore", "sqlite"),
    "memcached": ("memcached", "MemcachedStore", "memcached"),
    "mongodb": ("mongodb", "MongoStore", "mongodb"),
    "mongodb+srv": ("mongodb", "MongoStore", "mongodb"),
}


def open_store(url: str, *, expires: float | None) -> ResultStore:
    """The store of this URL; it connects at its first use. Raises `ConfigError`, naming the package that is missing."""
    scheme = url.partition(":")[0]
    plain = scheme if scheme in _STORES else scheme.partition("+")[0]
    if plain not in _STORES:
        near = get_close_matches(scheme, _STORES, 1)
        hint = f"; did you mean {near[0]}://?" if near else f". Stores: {', '.join(f'{one}://' for one in _STORES)}"
        raise ConfigError(f"result.backend: {scheme}:// is no result store{hint}")
    module, name, extra = _STORES[plain]
    try:
        found = importlib.import_module(f"amqptasks.results.stores.{module}")
        made: ResultStore = getattr(found, name)(url, expires=expires)
    except ImportError as error:
        raise ConfigError(
            f"result.backend: {scheme}:// needs the package {error.name}: pip install 'amqptasks[{extra}]'"
        ) from None
    return made

"""What a report of a problem begins with: versions, the machine, settings without secrets."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from amqptasks.config.masking import masked_dump
from amqptasks.config.models import Settings

__all__ = ["problem_report"]

#: What a worker is made of; of the optional ones those that are installed.
_PACKAGES = (
    *("amqptasks", "pika", "aio-pika", "pydantic", "structlog", "sentry-sdk", "click", "uvloop", "gevent"),
    *("redis", "SQLAlchemy", "psycopg", "PyMySQL", "pymemcache", "pymongo", "cryptography"),
)


def problem_report(settings: Settings) -> dict[str, Any]:
    """Plain values: ``packages`` and their versions, ``python``, ``platform``, and the ``settings`` that were set."""
    return {
        "packages": {name: found for name in _PACKAGES if (found := _installed(name)) is not None},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "settings": masked_dump(settings, defaults=False),
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

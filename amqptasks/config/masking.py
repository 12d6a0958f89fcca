"""Secrets out of what is shown: passwords in URLs, DSNs, and values whose key says that they are secret."""

from __future__ import annotations

import re
from typing import Any

from pydantic import SecretStr

from amqptasks.config.models import Settings

__all__ = ["MASK", "looks_secret", "mask_url", "masked_dump"]

MASK = "***"
#: Up to the last @ of a URL: a password that was not percent-encoded may hold one.
_PASSWORD = re.compile(r"(?P<head>[a-z][a-z0-9+.-]*://[^:/@\s]*:)(?:(?!://)\S)*(?=@)", re.IGNORECASE)
_SECRET = re.compile(
    r"passw(?:or)?d|passphrase|secret|token|api_?key|private_?key|(?:signing|verification)_?keys?|\bdsn\b",
    re.IGNORECASE,
)
_PARAMETER = re.compile(r"(?P<head>[?&][^=&\s]*=)[^&\s]+")


def mask_url(url: str) -> str:
    """The text with each URL's password replaced, also one in its query: for logs, errors and screens."""
    masked = _PASSWORD.sub(rf"\g<head>{MASK}", url)
    return _PARAMETER.sub(lambda found: f"{found['head']}{MASK}" if looks_secret(found["head"]) else found[0], masked)


def looks_secret(name: object) -> bool:
    """Whether a key's name says that its value is a secret."""
    return isinstance(name, str) and _SECRET.search(name) is not None


def masked_dump(settings: Settings, *, defaults: bool = True) -> dict[str, Any]:
    """The settings as plain values, without secrets. `defaults`: also those that nobody has set to something else."""
    data: dict[str, Any] = _mask(settings.model_dump(exclude_defaults=not defaults))
    return data


def _mask(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, dict):
        return {
            name: MASK if isinstance(item, str) and item and looks_secret(name) else _mask(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mask(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return mask_url(str(value))

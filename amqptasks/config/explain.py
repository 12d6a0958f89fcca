"""What pydantic says of wrong settings, in sentences that name the key and the nearest valid name. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails

from amqptasks.config.masking import looks_secret, mask_url
from amqptasks.config.schema import Path, annotation_at, keys_at

__all__ = ["explain", "key_text"]

#: The name of a model, which is nobody's key.
_MODEL = re.compile(r" or instance of \w+")


def key_text(path: Path) -> str:
    """``("routes", 1, "queue")`` as ``routes[1].queue``."""
    text = ""
    for key in path:
        if isinstance(key, int) or not key or not key.isprintable():
            text += f"[{key!r}]"
        else:
            text += f".{key}" if text else key
    return text


def explain(error: ValidationError, data: Mapping[str, Any]) -> list[tuple[Path, str]]:
    """Path and sentence of each problem. The alternatives of a union are one problem."""
    found: dict[Path, list[str]] = {}
    for one in error.errors(include_url=False):
        if one["type"] == "too_short" and one["input"]:
            continue  # only for want of the items that are wrong, which are listed
        path = _path(one, data)
        sentence = _sentence(one, path)
        sentences = found.setdefault(path, [])
        if sentence not in sentences:
            sentences.append(sentence)
    return [(path, _joined(sentences)) for path, sentences in found.items()]


def _path(error: ErrorDetails, data: Mapping[str, Any]) -> Path:
    """The error's place in the data: pydantic adds the names of union members, which are nobody's keys."""
    path: Path = ()
    value: Any = data
    for key in error["loc"]:
        inside = isinstance(value, Mapping) and key in value
        if not inside and not (isinstance(value, list | tuple) and isinstance(key, int) and key < len(value)):
            return (*path, key) if error["type"] == "missing" else path
        value = value[key]
        path = (*path, key)
    return path


def _sentence(error: ErrorDetails, path: Path) -> str:
    if error["type"] == "extra_forbidden":
        known = keys_at(path[:-1])
        near = get_close_matches(str(path[-1]), known, 1)
        return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; keys here: {', '.join(known)}"
    if error["type"] == "missing":
        return "this key is required"
    if error["type"] == "too_short":
        return "must not be empty"
    given = error["input"]
    if error["type"] == "tuple_type" and isinstance(given, Mapping) and all(map(str.isdecimal, given)):
        return "items are numbered from 0, without gaps"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return mask_url(message)
    not_this = f", not {_shown(given)}" if not _is_secret(path) else ""
    if error["type"] == "literal_error":
        expected = str(error.get("ctx", {}).get("expected", ""))
        names = [name.strip("'") for name in expected.replace(" or ", ", ").split(", ")]
        near = get_close_matches(str(given).lower(), names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"must be {expected}{not_this}{hint}"
    message = _MODEL.sub("", message).replace("Input should", "must").replace("dictionary", "table")
    return message.replace("tuple", "list") + not_this


def _is_secret(path: Path) -> bool:
    return annotation_at(path) == SecretStr | None or any(looks_secret(key) for key in path)


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    return "null" if value is None else f"{mask_url(repr(value)):.80}"


def _joined(sentences: list[str]) -> str:
    """``must be a valid integer, not 'x'`` and ``must be 'auto', not 'x'`` in one line."""
    ends = {sentence.rpartition(", not ")[2] for sentence in sentences}
    if len(sentences) > 1 and len(ends) == 1 and all(", not " in sentence for sentence in sentences):
        starts = [sentence.rpartition(", not ")[0] for sentence in sentences]
        return f"{' or '.join([starts[0], *(start.removeprefix('must ') for start in starts[1:])])}, not {ends.pop()}"
    return "; ".join(sentences)

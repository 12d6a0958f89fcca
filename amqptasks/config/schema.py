"""The shape of the settings: which keys a place has, and the JSON Schema. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from amqptasks.config.models import Settings

__all__ = ["Path", "annotation_at", "inside", "is_list", "is_table", "keys_at", "may_be_null", "settings_schema"]

#: Keys and list indices from the top of the file down to a value.
Path = tuple[str | int, ...]


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, without `Annotated`'s wrapping."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for one in get_args(annotation):
            yield from _alternatives(one)
    else:
        yield annotation


def inside(annotation: Any, key: str | int) -> Any:
    """The type of the value that stands at `key` in a value of this type; None where it has no such key."""
    for one in _alternatives(annotation):
        if isinstance(one, type) and issubclass(one, BaseModel):
            field = one.model_fields.get(str(key))
            return None if field is None else field.annotation
        if get_origin(one) is Mapping:
            return get_args(one)[1]
        if get_origin(one) is tuple:
            return get_args(one)[0]
    return None


def annotation_at(path: Path) -> Any:
    """The type at a path; None where no setting is."""
    annotation: Any = Settings
    for key in path:
        annotation = inside(annotation, key)
        if annotation is None:
            return None
    return annotation


def keys_at(path: Path) -> list[str]:
    """The keys that a section may have; empty for a table, whose keys are the user's, and for what is no section."""
    for one in _alternatives(annotation_at(path)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return list(one.model_fields)
    return []


def is_list(annotation: Any) -> bool:
    """Whether values of this type are lists."""
    return any(get_origin(one) is tuple for one in _alternatives(annotation))


def is_table(annotation: Any) -> bool:
    """Whether values of this type have keys: a section, or a table whose keys are the user's."""
    return any(
        get_origin(one) is Mapping or (isinstance(one, type) and issubclass(one, BaseModel))
        for one in _alternatives(annotation)
    )


def may_be_null(annotation: Any) -> bool:
    """Whether null is a value of this type."""
    return any(one is NoneType or one is Any for one in _alternatives(annotation))


def settings_schema() -> dict[str, Any]:
    """The JSON Schema of the file, for editors. Numbers and switches may be a ``${VARIABLE}``."""
    schema = _with_variables(Settings.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "amqptasks"}


_VARIABLE = {"type": "string", "pattern": r"\$\{"}
#: They belong to the number, not to the alternative.
_BOUNDS = ("type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "const")


def _with_variables(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_variables(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") in ("integer", "number", "boolean") or ("enum" in node and node.get("type") == "string"):
        rest = {name: value for name, value in node.items() if name not in _BOUNDS}
        return {"anyOf": [{name: node[name] for name in _BOUNDS if name in node}, _VARIABLE], **rest}
    return {name: _with_variables(value) for name, value in node.items()}

"""YAML as values with positions: every value remembers the line it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

__all__ = ["Document", "Path", "Problem", "parse_document"]

Path = tuple[str | int, ...]

_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with the configuration: where, and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


@dataclass(slots=True)
class Document:
    """The content of one file."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, path: Path) -> str:
        """``file:line`` of the value, or of the nearest one around it."""
        while path and path not in self.lines:
            path = path[:-1]
        line = self.lines.get(path)
        return f"{self.name}:{line}" if line is not None else self.name


def parse_document(name: str, text: str, environ: Mapping[str, str]) -> Document:
    """Parse YAML text. ``${VAR}`` and ``${VAR:-default}`` in strings are expanded, ``$$`` is a dollar sign.

    What is wrong stands in `problems`: malformed YAML, duplicate keys, variables that are not set.
    """
    document = Document(name)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return document
        value = _Builder(document, loader, environ).value(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        what = " ".join(part for part in (error.context, error.problem) if part)
        document.problems.append(Problem(where, f"not YAML: {what}"))
        return document
    except yaml.YAMLError as error:
        document.problems.append(Problem(name, f"not YAML: {error}"))
        return document
    if isinstance(value, dict):
        document.data = value
    else:
        document.problems.append(Problem(f"{name}:1", "the file must hold keys and values, like `queues:`"))
    return document


class _Builder:
    def __init__(self, document: Document, loader: yaml.SafeLoader, environ: Mapping[str, str]) -> None:
        self._document = document
        self._loader = loader
        self._environ = environ

    def value(self, node: yaml.Node, path: Path) -> Any:
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        value = self._loader.construct_object(node)
        return self._expand(value, path) if isinstance(value, str) else value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        own = {str(key.value) for key, _ in node.value}
        if len(own) < len(node.value):
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    where = f"{self._document.name}:{key.start_mark.line + 1}"
                    self._document.problems.append(Problem(where, f"key {key.value!r} stands twice"))
                seen.add(key.value)
        self._loader.flatten_mapping(node)
        result = {}
        for key, item in node.value:
            name = str(self._loader.construct_object(key, deep=True))
            self._document.lines[(*path, name)] = key.start_mark.line + 1
            result[name] = self.value(item, (*path, name))
        return result

    def _expand(self, text: str, path: Path) -> str:
        def replace(found: re.Match[str]) -> str:
            if found[1]:
                return "$"
            value = self._environ.get(found[2])
            if value:
                return value
            if found[3] is not None:
                return found[3]
            if value is None:
                self._document.problems.append(
                    Problem(self._document.where(path), f"${{{found[2]}}}: the environment variable is not set")
                )
            return ""

        return _VARIABLE.sub(replace, text)

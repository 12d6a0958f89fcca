"""YAML as values with positions: every value remembers the line it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from amqptasks.config.schema import Path

__all__ = ["Document", "Problem", "parse_document"]

#: A dollar twice, a variable, or the beginning of what should have been one.
_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Za-z_][A-Za-z0-9_]*)(?:(:-)([^{}]*))?\}|(\{[^}]*\}?))")


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
    #: Names of the environment variables that the file mentions.
    variables: set[str] = field(default_factory=set)

    def where(self, path: Path) -> str:
        """``file:line`` of the value, or of the nearest one around it."""
        while path and path not in self.lines:
            path = path[:-1]
        line = self.lines.get(path)
        return f"{self.name}:{line}" if path and line is not None else self.name


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
        document.problems.append(Problem(where, f"not YAML: {_what(error)}"))
        return document
    except yaml.YAMLError as error:
        document.problems.append(Problem(name, f"not YAML: {str(error).partition(chr(10))[0]}"))
        return document
    except ValueError as error:  # a date or number that YAML's types take for one, such as 2026-02-31
        document.problems.append(Problem(name, f"not YAML: {error}"))
        return document
    if isinstance(value, dict):
        document.data = value
    else:
        document.problems.append(Problem(f"{name}:1", "the file must hold keys and values, like `queues:`"))
    return document


def _what(error: yaml.MarkedYAMLError) -> str:
    what = ", ".join(part for part in (error.context, error.problem) if part)
    if "scanning an alias" in what:
        return f"{what}. A value that begins with * needs quotes"
    if "cannot start any token" in what:
        return f"{what}. Indent with spaces; a value that begins with this character needs quotes"
    return what


class _Builder:
    def __init__(self, document: Document, loader: yaml.SafeLoader, environ: Mapping[str, str]) -> None:
        self._document = document
        self._loader = loader
        self._environ = environ
        #: Nodes that are being built, to notice one that contains itself.
        self._open: set[int] = set()

    def value(self, node: yaml.Node, path: Path) -> Any:
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            value = self._loader.construct_object(node)
            return self._expand(value, path) if isinstance(value, str) else value
        if id(node) in self._open:
            self._problem(node, "the alias stands inside what it stands for")
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            self._problem(node, f"the tag {node.tag} has no place here")
            return None
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._problem(key, "a key must be one word, not a list or table")
            elif key.value in seen:
                self._problem(key, f"key {key.value!r} stands twice")
            else:
                seen.add(key.value)
        self._loader.flatten_mapping(node)
        result = {}
        for key, item in node.value:
            if isinstance(key, yaml.ScalarNode):
                # As it is written: YAML 1.1 would make a queue called `on` or `007` something else.
                name = str(key.value)
                self._document.lines[(*path, name)] = key.start_mark.line + 1
                result[name] = self.value(item, (*path, name))
        return result

    def _problem(self, node: yaml.Node, what: str) -> None:
        self._document.problems.append(Problem(f"{self._document.name}:{node.start_mark.line + 1}", what))

    def _expand(self, text: str, path: Path) -> str:
        where = self._document.where(path)

        def replace(found: re.Match[str]) -> str:
            dollar, name, has_default, default, broken = found.groups()
            if dollar:
                return "$"
            if broken:
                what = f"${broken} is not a variable; write ${{NAME}} or ${{NAME:-default}}, and $$ for a dollar sign"
                self._document.problems.append(Problem(where, what))
                return ""
            self._document.variables.add(name)
            value = self._environ.get(name)
            if has_default:
                return str(value or default)
            if value is None:
                what = f"${{{name}}}: the environment variable is not set, and there is no default (${{{name}:-…}})"
                self._document.problems.append(Problem(where, what))
                return ""
            return value

        return _VARIABLE.sub(replace, text)

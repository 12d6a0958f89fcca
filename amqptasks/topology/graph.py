"""A topology as a picture's source: Mermaid and Graphviz DOT. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from amqptasks.topology.entities import Exchange, Queue, Topology

__all__ = ["dot", "mermaid"]


@dataclass(frozen=True, slots=True)
class _Node:
    """A box: an exchange's is another shape than a queue's."""

    shape: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Arrow:
    """From box to box; dotted where the broker moves messages that could not go on."""

    source: tuple[str, str]
    target: tuple[str, str]
    label: str = ""
    dotted: bool = False


@dataclass(frozen=True, slots=True)
class _Graph:
    #: (kind, name) -> box.
    nodes: dict[tuple[str, str], _Node]
    arrows: list[_Arrow]


def mermaid(topology: Topology, folded: str = "") -> str:
    """A Mermaid flowchart, as GitHub and GitLab show it in Markdown.

    `folded`: everything whose name begins so is one box; the delay ladder is the same for everybody.
    """
    graph = _graph(topology, folded)
    names = {key: f"n{number}" for number, key in enumerate(graph.nodes)}
    shapes = {"exchange": '{{"%s"}}', "queue": '["%s"]'}
    lines = ["flowchart LR"]
    for key, node in graph.nodes.items():
        text = "<br/>".join(_entities(line) for line in node.lines)
        lines.append(f"    {names[key]}{shapes[node.shape] % text}")
    for one in graph.arrows:
        label = f'|"{_entities(one.label)}"|' if one.label else ""
        lines.append(f"    {names[one.source]} {'-.->' if one.dotted else '-->'}{label} {names[one.target]}")
    return "\n".join(lines) + "\n"


def _entities(text: str) -> str:
    """Mermaid takes characters by their HTML names or numbers, with ``#`` in the place of ``&``."""
    return "".join(one if one.isalnum() or one in " .,:;_-+=/()*@" else f"#{ord(one)};" for one in text)


def dot(topology: Topology, folded: str = "") -> str:
    """A directed graph for Graphviz: ``dot -Tsvg``. `folded` as for `mermaid`."""
    graph = _graph(topology, folded)
    lines = ["digraph topology {", "    rankdir=LR;", '    node [fontname="sans-serif"];']
    for key, node in graph.nodes.items():
        shape = "hexagon" if node.shape == "exchange" else "box"
        text = "\\n".join(_quoted(line) for line in node.lines)
        lines.append(f'    {_name(key)} [shape={shape}, label="{text}"];')
    for one in graph.arrows:
        options = [f'label="{_quoted(one.label)}"'] if one.label else []
        options += ["style=dotted"] if one.dotted else []
        attributes = f" [{', '.join(options)}]" if options else ""
        lines.append(f"    {_name(one.source)} -> {_name(one.target)}{attributes};")
    return "\n".join([*lines, "}"]) + "\n"


def _name(key: tuple[str, str]) -> str:
    return f'"{_quoted(":".join(key))}"'


def _quoted(text: str) -> str:
    # A backslash would begin one of Graphviz's escapes; a line break would be shown as one.
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


def _graph(topology: Topology, folded: str) -> _Graph:
    def key(kind: str, name: str) -> tuple[str, str]:
        return ("exchange", folded) if folded and name.startswith(folded) else (kind, name)

    nodes: dict[tuple[str, str], _Node] = {}
    for exchange in topology.exchanges:
        nodes.setdefault(key("exchange", exchange.name), _Node("exchange", (exchange.name, exchange.type)))
    for queue in topology.queues:
        nodes.setdefault(key("queue", queue.name), _Node("queue", (queue.name, queue.kind)))
    if ("exchange", folded) in nodes:
        nodes["exchange", folded] = _Node("exchange", (f"{folded}*", "delay ladder"))
    for one in topology.bindings:
        # Exchanges that every virtual host has are nobody's declaration, and still on the way.
        nodes.setdefault(key("exchange", one.source), _Node("exchange", (one.source,)))
    arrows = dict.fromkeys(_arrows(topology, folded, key, set(nodes)))
    return _Graph(nodes, list(arrows))


def _arrows(
    topology: Topology, folded: str, key: Callable[[str, str], tuple[str, str]], known: set[tuple[str, str]]
) -> Iterator[_Arrow]:
    for one in topology.bindings:
        source, target = key("exchange", one.source), key(one.destination_type, one.destination)
        if source != target:
            # The ladder's keys are 25 bits long, and say nothing to people.
            yield _Arrow(source, target, "" if source == ("exchange", folded) else one.routing_key)
    entities: list[Exchange | Queue] = [*topology.exchanges, *topology.queues]
    for entity in entities:
        table = dict(entity.arguments)
        way, label = _way_out(entity), str(table.get("x-dead-letter-routing-key", ""))
        if way is None:
            continue
        source = key("exchange" if isinstance(entity, Exchange) else "queue", entity.name)
        target = key("exchange", way)
        if source != target and target in known:
            yield _Arrow(source, target, label or "alternate", dotted=True)


def _way_out(entity: Exchange | Queue) -> str | None:
    table = dict(entity.arguments)
    found = table.get("x-dead-letter-exchange") or table.get("alternate-exchange")
    return None if found is None else str(found)

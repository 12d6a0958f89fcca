"""What the structure of the code promises, read off its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "amqptasks"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FUNCTION = 60
LONGEST_FILE = 400
#: `Calls.prepare` is one signature: every option of `apply_async` by name, with its default.
LONG_BY_CONTRACT = {("calls.py", "prepare")}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_functions_fit_a_screen_and_files_hold_one_thing(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for function in functions(ast.parse(text)):
        length = (function.end_lineno or 0) - function.lineno + 1
        if (file.name, function.name) not in LONG_BY_CONTRACT:
            assert length <= LONGEST_FUNCTION, f"{function.name} has {length} lines"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_own_modules_are_imported_at_the_top(file: Path) -> None:
    for function in functions(ast.parse(file.read_text())):
        for node in ast.walk(function):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("amqptasks"), f"{function.name} imports {node.module}"
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("amqptasks") for name in node.names), function.name


def test_only_settlement_acknowledges() -> None:
    """Tasks are acknowledged by `worker/settlement.py` alone.

    Parts of chords and replies are no tasks: `worker/joiner.py` acknowledges those when the chord's body is confirmed,
    `broker/replies.py` these when they are in memory. Dead letters are removed in `deadletters/`, by
    `broker/reader.py`, when their copies are confirmed. What waits for its turn is acknowledged by `worker/rates.py`
    when its copy is confirmed; the journal of revokes keeps what it gives, and `worker/revoked.py` asks for more.
    `broker/mover.py` acknowledges what it moves to another queue when the copy there is confirmed.
    `broker/transactions.py` acknowledges the schedule's state in the transaction that publishes what takes its place.
    """
    callers: dict[str, set[str]] = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else None
            if name in {"basic_ack", "basic_nack", "basic_reject", "send_ack", "send_requeue"}:
                callers.setdefault(name, set()).add(str(file.relative_to(PACKAGE)))
    assert callers == {
        "basic_ack": {"broker/consumer.py", "broker/mover.py", "broker/reader.py", "broker/replies.py"},
        "basic_nack": {"broker/consumer.py"},
        "send_ack": {
            "broker/transactions.py",
            "worker/joiner.py",
            "worker/rates.py",
            "worker/revoked.py",
            "worker/settlement.py",
        },
        "send_requeue": {"worker/rates.py", "worker/settlement.py"},
    }

"""Ids are UUIDs, and no two are the same, whoever makes them."""

from __future__ import annotations

import multiprocessing
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from amqptasks.ids import new_id


def test_an_id_is_a_random_uuid() -> None:
    for _ in range(1000):
        made = uuid.UUID(text := new_id())
        assert (made.version, made.variant, str(made)) == (4, uuid.RFC_4122, text)


def _tell(connection: Any) -> None:
    connection.send([new_id() for _ in range(600)])


def test_neither_threads_nor_forked_children_make_the_same() -> None:
    new_id()
    with ThreadPoolExecutor(8) as pool:
        made = [one.result() for one in [pool.submit(new_id) for _ in range(5000)]]
    fork = multiprocessing.get_context("fork")
    for _ in range(2):
        ours, theirs = fork.Pipe()
        child = fork.Process(target=_tell, args=(theirs,))
        child.start()
        made += ours.recv()
        child.join()
    made += [new_id() for _ in range(600)]
    assert len(set(made)) == len(made)

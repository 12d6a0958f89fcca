"""Mistakes of operators at `queues`, `purge`, `plan` and `migrate`: each is one line, with an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pika
import pytest

from integration.conftest import ROOT, Bench

COMMANDS = {
    "queues": ["queues"],
    "purge": ["purge", "-Q", "default", "-f"],
    "plan": ["topology", "plan"],
    "migrate": ["topology", "migrate", "default", "-y"],
}


def run(bench: Bench, *command: str) -> subprocess.CompletedProcess[str]:
    """One command, whose errors are one line without traceback and password."""
    done = subprocess.run(
        [sys.executable, "-m", "amqptasks", "--config", str(bench.config), *command],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode:
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "secret-word" not in done.stderr + done.stdout
    return done


@pytest.fixture
def declared(bench: Bench) -> Bench:
    """A topology that stands, and the management API."""
    bench.settings["broker"]["management_url"] = bench.vhost.broker.management_url
    bench.client().declare()
    return bench


@pytest.fixture
def management_user(declared: Bench) -> Iterator[Callable[..., str]]:
    """Makes a user of the management API, without permissions in the virtual host; its URL."""
    management = declared.vhost.management
    made = []

    def make(tags: str) -> str:
        name = f"operator-{tags or 'none'}"
        management.create_user(name, "secret-word", tags)
        made.append(name)
        return f"http://{name}:secret-word@{declared.vhost.broker.management_url.rpartition('@')[2]}"

    yield make
    for name in made:
        management.delete_user(name)


#: What is wrong -> command -> exit code and what is said. A command that is not named works all the same.
CASES: dict[str, dict[str, tuple[int, str]]] = {
    "no management URL": {
        "plan": (2, "set broker.management_url, such as http://user:password@host:15672"),
        "migrate": (2, "set broker.management_url"),
    },
    "management password": {
        "queues": (1, "wrong user or password"),
        "plan": (1, "wrong user or password"),
        "migrate": (1, "wrong user or password"),
    },
    "no tag": {
        "queues": (1, "needs the tag management"),
        "plan": (1, "needs the tag management"),
        "migrate": (1, "needs the tag management"),
    },
    "no permission": {
        "queues": (1, "'operator-management' has no permission in the virtual host"),
        "plan": (1, "'operator-management' has no permission in the virtual host"),
        "migrate": (1, "'operator-management' has no permission in the virtual host"),
    },
    "nobody answers": {
        "queues": (1, "the management API does not answer"),
        "plan": (1, "the management API does not answer"),
        "migrate": (1, "the management API does not answer"),
    },
    "broker password": {"purge": (1, "the broker refused the user name or password of 'guest'")},
    "no rights": {"purge": (1, "refused")},
    "no virtual host": {
        "queues": (2, "there is no virtual host 'nowhere'"),
        "purge": (1, "the virtual host 'nowhere' does not exist"),
        "plan": (2, "there is no virtual host 'nowhere'"),
        "migrate": (2, "there is no virtual host 'nowhere'"),
    },
}


@pytest.mark.parametrize("wrong", list(CASES))
def test_what_is_wrong_is_one_line_with_an_exit_code(
    declared: Bench, management_user: Callable[..., str], restricted_user: Callable[[str, str, str], str], wrong: str
) -> None:
    broker, vhost = declared.settings["broker"], declared.vhost
    address = vhost.broker.management_url.rpartition("@")[2]
    head, _, tail = vhost.url.rpartition("@")
    changes: dict[str, Callable[[], Any]] = {
        "no management URL": lambda: broker.pop("management_url"),
        "management password": lambda: broker.update(management_url=f"http://guest:secret-word@{address}"),
        "no tag": lambda: broker.update(management_url=management_user("")),
        "no permission": lambda: broker.update(management_url=management_user("management")),
        "nobody answers": lambda: broker.update(management_url="http://guest:secret-word@127.0.0.1:1"),
        "broker password": lambda: broker.update(url=f"{head.rpartition(':')[0]}:secret-word@{tail}"),
        "no rights": lambda: broker.update(url=restricted_user("^$", "^$", "^$")),
        "no virtual host": lambda: broker.update(url=f"{vhost.url.rpartition('/')[0]}/nowhere"),
    }
    changes[wrong]()
    for name, command in COMMANDS.items():
        code, said = CASES[wrong].get(name, (0, ""))
        done = run(declared, *command)
        assert (name, done.returncode) == (name, code), done.stderr + done.stdout
        assert said in done.stderr


def test_a_queue_of_somebody_else(declared: Bench) -> None:
    """One that stands there, one that only its connection may use, one that is not there."""
    with pika.BlockingConnection(pika.URLParameters(declared.vhost.url)) as connection:
        channel = connection.channel()
        channel.queue_declare("theirs", durable=True)
        channel.queue_declare("locked", exclusive=True)
        assert run(declared, "topology", "plan").returncode == 0
        assert "theirs" in run(declared, "queues", "--all").stdout
        for command, said in (
            (["topology", "migrate", "theirs", "-y"], "it belongs to somebody else"),
            (["purge", "-Q", "locked", "-f"], "RESOURCE_LOCKED"),
            (["purge", "-Q", "nowhere", "-f"], "there is no queue 'nowhere'"),
        ):
            done = run(declared, *command)
            assert done.returncode == 2, done.stderr
            assert said in done.stderr

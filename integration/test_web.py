"""Publishing from web servers: many processes made by fork, many threads, one connection each."""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from amqptasks.testing.rabbitmq import free_port
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench

CALLERS = 8

WSGI = """
import os
from amqptasks import AmqpTasks

tasks = AmqpTasks("web", config={config!r})
tasks.send_task("shop.charge")  # before the fork

def application(environ, start_response):
    task_id = tasks.send_task("shop.charge").id
    answer = f"{{os.getpid()}} {{task_id}}".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(answer)))])
    return [answer]
"""

ASGI = """
import os
from amqptasks import AmqpTasks

tasks = AmqpTasks("web", config={config!r})

async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({{"type": "lifespan.startup.complete"}})
        await receive()
        await tasks.aclose()
        await send({{"type": "lifespan.shutdown.complete"}})
        return
    task_id = (await tasks.asend_task("shop.charge")).id
    answer = f"{{os.getpid()}} {{task_id}}".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(answer)).encode())]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": answer}})
"""


@dataclass(frozen=True)
class Server:
    """A web server: what `sys.executable` runs, the application, how many processes publish."""

    command: str
    source: str
    processes: int
    requests: int = 20_000
    #: Whether its processes end with Python's exit handlers, so that no reply queue stays for its five minutes.
    orderly: bool = True


SERVERS = {
    "gunicorn": Server("-m gunicorn --preload -w 8 --threads 4 -b 127.0.0.1:{port} shopweb", WSGI, 8),
    "uvicorn": Server("-m uvicorn --port {port} --workers 2 --no-access-log shopweb:application", ASGI, 2),
    # A connection for each request, so fewer of them.
    "uwsgi": Server(
        f"{Path(sys.executable).with_name('uwsgi')} --master --processes 4 --enable-threads --py-call-uwsgi-fork-hooks "
        "--need-app --die-on-term --disable-logging --add-header 'Connection: close' "
        "--http-socket 127.0.0.1:{port} --module shopweb",
        WSGI,
        4,
        requests=4_000,
        orderly=False,
    ),
}


def ask(port: int, count: int) -> list[tuple[int, str]]:
    """(process, task id) of each answer, over connections that are kept for a hundred requests."""
    answers = []
    for start in range(0, count, 100):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        for _ in range(min(100, count - start)):
            connection.request("GET", "/")
            response = connection.getresponse()
            body = response.read().decode()
            assert response.status == 200, body
            pid, task_id = body.split()
            answers.append((int(pid), task_id))
        connection.close()
    return answers


def answers(port: int) -> bool:
    try:
        return bool(ask(port, 1))
    except (OSError, http.client.HTTPException):
        return False


def our_connections(bench: Bench) -> Counter[str]:
    """How many there are of each name: a name says which process's it is, by its client's port."""
    found: Counter[str] = Counter()
    for one in bench.vhost.management.connections():
        found[one.get("client_properties", {}).get("connection_name", "")] += 1
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", SERVERS)
def test_thousands_of_requests_are_published_over_one_connection_a_process(bench: Bench, kind: str) -> None:
    bench.settings["broker"]["heartbeat"] = 2
    server = SERVERS[kind]
    bench.client().declare()
    port = free_port()
    (bench.folder / "shopweb.py").write_text(textwrap.dedent(server.source).format(config=str(bench.config)))
    log = (bench.folder / "server.log").open("wb")
    whole = [sys.executable, *shlex.split(server.command.format(port=port))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        log,
        subprocess.Popen(
            whole, cwd=bench.folder, stdout=log, stderr=log, env=environment, start_new_session=True
        ) as running,
    ):
        try:
            wait_until(lambda: answers(port), 30, lambda: (bench.folder / "server.log").read_text()[-2000:])
            with ThreadPoolExecutor(CALLERS) as pool:
                shares = pool.map(lambda _: ask(port, server.requests // CALLERS), range(CALLERS))
                found = [one for share in shares for one in share]
            pids, ids = {pid for pid, _ in found}, {task_id for _, task_id in found}
            assert len(ids) == server.requests
            assert len(pids) == server.processes
            time.sleep(6)  # idle for three heartbeats; the management API is up to date after 5 s
            counts = our_connections(bench)
            # asyncio callers publish over a connection of their loop; replies come over the publisher's.
            assert max(counts.values()) <= server.processes + 1, counts
            assert sum(counts.values()) <= 2 * server.processes + 2, counts
            assert ask(port, 1)
        finally:
            if server.orderly:
                os.killpg(running.pid, signal.SIGTERM)
            else:  # uWSGI's master starts anew what it did not end itself
                running.send_signal(signal.SIGTERM)
            running.wait(20)
    assert bench.vhost.ready("default") >= server.requests + 1
    wait_until(lambda: not our_connections(bench), 15, lambda: f"no connection is left: {our_connections(bench)}")
    left = [name for name in bench.vhost.management.queues() if ".reply." in name]
    assert not (server.orderly and left), left

"""Publishing from web servers: many processes made by fork, many threads, one connection each."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from amqptasks.testing.rabbitmq import free_port
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench

REQUESTS, CALLERS = 20_000, 8

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

SERVERS = {
    "gunicorn": (WSGI, ["gunicorn", "--preload", "-w", "8", "--threads", "4", "-b", "127.0.0.1:{port}", "shopweb"], 8),
    "uvicorn": (ASGI, ["uvicorn", "--port", "{port}", "--workers", "2", "--no-access-log", "shopweb:application"], 2),
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
def test_twenty_thousand_requests_are_published_over_one_connection_a_process(bench: Bench, kind: str) -> None:
    bench.settings["broker"]["heartbeat"] = 2
    source, command, processes = SERVERS[kind]
    bench.client().declare()
    port = free_port()
    (bench.folder / "shopweb.py").write_text(textwrap.dedent(source).format(config=str(bench.config)))
    log = (bench.folder / "server.log").open("wb")
    whole = [sys.executable, "-m", *(one.format(port=port) for one in command)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        log,
        subprocess.Popen(
            whole, cwd=bench.folder, stdout=log, stderr=log, env=environment, start_new_session=True
        ) as server,
    ):
        try:
            wait_until(lambda: answers(port), 30, lambda: (bench.folder / "server.log").read_text()[-2000:])
            with ThreadPoolExecutor(CALLERS) as pool:
                found = [
                    one for some in pool.map(lambda _: ask(port, REQUESTS // CALLERS), range(CALLERS)) for one in some
                ]
            pids, ids = {pid for pid, _ in found}, {task_id for _, task_id in found}
            assert len(ids) == REQUESTS
            assert len(pids) == processes
            time.sleep(6)  # idle for three heartbeats; the management API is up to date after 5 s
            counts = our_connections(bench)
            # asyncio callers publish over a connection of their loop; replies come over the publisher's.
            assert max(counts.values()) <= processes + 1, counts
            assert sum(counts.values()) <= 2 * processes + 2, counts
            assert ask(port, 1)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)
    assert bench.vhost.ready("default") >= REQUESTS + 1
    wait_until(lambda: not our_connections(bench), 15, lambda: f"no connection is left: {our_connections(bench)}")
    assert not [name for name in bench.vhost.management.queues() if ".reply." in name]

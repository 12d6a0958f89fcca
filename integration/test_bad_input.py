"""Mistakes of people: each gets one clear sentence, an exit code, and nothing is lost."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pika
import pytest

from amqptasks import (
    AccessRefused,
    AmqpTasks,
    BrokerUnreachable,
    ConfigError,
    InvalidArguments,
    PublishError,
    SerializationError,
    TopologyConflict,
    Unroutable,
)
from amqptasks.testing.rabbitmq import free_port
from amqptasks.testing.waiting import wait_until
from integration.conftest import ROOT, Bench

SECRET = "secret-word"


def run_worker(bench: Bench, *options: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
    """A worker that is expected to end by itself."""
    where = ["-A", bench.APP, "--config", str(bench.config), *(["-b", url] if url is not None else [])]
    command = [sys.executable, "-m", "amqptasks", *where, "worker", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, check=False)


def url_with(url: str, *, password: str | None = None, vhost: str | None = None, port: int | None = None) -> str:
    parts = urlsplit(url)
    return (
        f"amqp://{parts.username}:{password or parts.password}@{parts.hostname}:{port or parts.port}"
        f"{parts.path if vhost is None else f'/{vhost}'}"
    )


def one_clear_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert SECRET not in done.stderr + done.stdout


def test_a_worker_waits_for_a_broker_that_is_down_says_so_and_gives_up(bench: Bench) -> None:
    bench.settings["broker"] = {"url": f"amqp://guest:{SECRET}@127.0.0.1:{free_port()}/", "connection_max_retries": 2}
    done = run_worker(bench, "-Q", "default")
    assert done.returncode == 1
    one_clear_error(done, "connection refused: is RabbitMQ running there?")
    waits = [line for line in done.stderr.splitlines() if "Cannot reach the broker; trying again" in line]
    assert len(waits) == 2
    assert "attempt=1 of=2" in waits[0]


@pytest.mark.fault
def test_a_worker_starts_when_the_broker_comes(bench: Bench) -> None:
    port = free_port()
    worker = bench.worker("default", url=url_with(bench.vhost.url, port=port), ready=False)
    wait_until(lambda: "Cannot reach the broker" in worker.log, 10, "it waits")
    from amqptasks.testing.proxy import TcpProxy

    parts = urlsplit(bench.vhost.url)
    with TcpProxy(parts.hostname or "", parts.port or 0, port=port):
        worker.wait_ready()
        assert worker.stop() == 0


def test_a_signal_ends_a_worker_that_still_waits_for_the_broker(bench: Bench) -> None:
    worker = bench.worker("default", url=f"amqp://guest:guest@127.0.0.1:{free_port()}/", ready=False)
    wait_until(lambda: "Cannot reach the broker" in worker.log, 10, "it waits")
    assert worker.stop(5) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"password": SECRET}, ["refused the user name or password of 'guest'"]),
        ({"vhost": "nowhere-at-all"}, ["nowhere-at-all", "does not exist"]),
    ],
    ids=["wrong password", "missing virtual host"],
)
def test_a_worker_that_is_refused_says_why_and_ends(bench: Bench, change: dict[str, str], words: list[str]) -> None:
    done = run_worker(bench, "-Q", "default", url=url_with(bench.vhost.url, **change))
    assert done.returncode == 1
    one_clear_error(done, *words)


def test_a_worker_without_permission_names_the_permission(
    bench: Bench, restricted_user: Callable[[str, str, str], str]
) -> None:
    done = run_worker(bench, "-Q", "default", url=restricted_user("^$", "^$", "^$"))
    assert done.returncode == 1
    one_clear_error(done, "configure permission", "amqptasks")


def test_a_queue_that_exists_with_other_arguments_is_named_with_both_values_and_the_way_out(bench: Bench) -> None:
    app = bench.client()
    app.declare()
    bench.settings["queues"] = {"default": {"message_ttl": 60}, "email": {"max_priority": 5}}
    done = run_worker(bench, "-Q", "default")
    assert done.returncode == 2
    one_clear_error(done, "queue 'default'", "x-message-ttl", "60000", "AMQP freezes arguments")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("queues: [unclosed", ["amqptasks.yaml:", "not YAML"]),
        (
            "queues:\n  email: {max_lenght: 5}\n",
            ["amqptasks.yaml:2: queues.email.max_lenght", "did you mean 'max_length'?"],
        ),
        (
            "queues:\n  email: {}\nroutes:\n  - {match: 'a.*', queue: emial}\n",
            ["amqptasks.yaml:4: routes[0].queue: queue 'emial' is not declared; did you mean 'email'?"],
        ),
        (
            "routes:\n  - {regex: '(', queue: default}\n",
            ["amqptasks.yaml:2: routes[0].regex: '(' is not a regular expression"],
        ),
    ],
)
def test_a_wrong_file_is_told_with_line_key_and_nearest_name(bench: Bench, text: str, words: list[str]) -> None:
    file = bench.folder / "amqptasks.yaml"
    file.write_text(text)
    command = [sys.executable, "-m", "amqptasks", "-A", bench.APP, "--config", str(file), "worker", "-Q", "default"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, check=False)
    assert done.returncode == 2
    one_clear_error(done, *words)


def test_an_undeclared_queue_and_an_unknown_pool_are_named(bench: Bench) -> None:
    bench.settings["queues"]["email"] = {}
    done = run_worker(bench, "-Q", "emial")
    assert done.returncode == 2
    one_clear_error(done, "queue 'emial' is not declared; did you mean 'email'?")
    done = run_worker(bench, "-Q", "email", "-P", "swimming")
    assert done.returncode == 2
    one_clear_error(done, "pool 'swimming' is not known; use process, thread, asyncio, gevent or solo")


def test_a_missing_app_is_named(bench: Bench) -> None:
    command = [sys.executable, "-m", "amqptasks", "-A", "no.such.module", "--config", str(bench.config), "worker"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, check=False)
    assert done.returncode == 2
    one_clear_error(done, "no app at 'no.such.module'")


# --- callers ---------------------------------------------------------------------------------------------------------


def test_an_argument_that_cannot_be_serialized_is_named_at_the_call(bench: Bench) -> None:
    app = bench.client()
    with pytest.raises(SerializationError, match="positional argument 1"):
        app.send_task("shop.charge", (1, object()))
    with pytest.raises(SerializationError, match="header 'trace'"):
        app.send_task("shop.charge", (1,), headers={"trace": object()})


def test_an_argument_that_does_not_fit_is_refused_at_the_call(bench: Bench) -> None:
    from integration.apps.jobs import add, charge

    with pytest.raises(InvalidArguments, match="x: Input should be a valid integer"):
        add.delay("one", 2)
    with pytest.raises(InvalidArguments, match=r"receipt\.amount: Input should be a valid decimal"):
        charge.delay({"order": 1, "amount": "much"})


def test_a_key_that_no_queue_takes_raises_unroutable_and_names_it(bench: Bench) -> None:
    app = bench.client()
    with pytest.raises(Unroutable, match="'nobody-listens'"):
        app.send_task("shop.charge", (), queue="nobody-listens")
    with pytest.raises(Unroutable, match="does not exist"):
        app.send_task("shop.charge", (), exchange="nowhere")
    app.send_task("shop.charge", ())


def test_a_conflicting_topology_is_told_to_the_caller(bench: Bench) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(bench.vhost.url))
    connection.channel().queue_declare("default", durable=True)
    connection.close()
    app = bench.client()
    with pytest.raises(TopologyConflict, match="x-queue-type") as caught:
        app.declare()
    assert (caught.value.entity, caught.value.argument) == ("default", "x-queue-type")
    with pytest.raises(PublishError) as missing:
        app.send_task("shop.charge", ())
    assert isinstance(missing.value.__cause__, ConfigError), "the reason is told, not only that it failed"


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.timing
@pytest.mark.fault
def test_every_way_to_miss_the_broker_is_told_apart_and_in_time(bench: Bench, deaf_port: int) -> None:
    cases: list[tuple[str, type[Exception], str]] = [
        (f"amqp://guest:{SECRET}@127.0.0.1:{free_port()}/", BrokerUnreachable, "connection refused"),
        (f"amqp://guest:{SECRET}@127.0.0.1:{deaf_port}/", BrokerUnreachable, ""),
        (url_with(bench.vhost.url, password=SECRET), AccessRefused, "user name or password"),
        (url_with(bench.vhost.url, vhost="nowhere-at-all"), AccessRefused, "nowhere-at-all"),
    ]
    for url, cause, words in cases:
        app = AmqpTasks("caller", config={"broker": {"url": url, "publish_timeout": 3}})
        for attempt in ("first", "second"):
            started = time.monotonic()
            with pytest.raises(PublishError) as caught:
                app.send_task("shop.charge", ())
            assert time.monotonic() - started < 3.5, (url, attempt)
            assert isinstance(caught.value.__cause__, cause), (url, caught.value.__cause__)
            assert words in str(caught.value)
            assert SECRET not in str(caught.value)
        app.close()


def test_the_command_line_calls_a_task_and_tells_errors_in_one_line(bench: Bench) -> None:
    def call(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "amqptasks", "--config", str(bench.config), "call", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, check=False)

    done = call("shop.charge", "--args", '[1, "9.99"]')
    assert done.returncode == 0
    assert bench.vhost.management.messages("default")[0]["properties"]["correlation_id"] == done.stdout.strip()
    assert call("shop.charge", "--args", "{").returncode == 2
    lost = call("shop.charge", "--queue", "nobody")
    assert lost.returncode == 1
    one_clear_error(lost, "'nobody'")

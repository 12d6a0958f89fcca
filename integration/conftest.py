"""One broker for the run, a virtual host for each test.

The broker is ``AMQPTASKS_TEST_BROKER_URL`` (with ``AMQPTASKS_TEST_MANAGEMENT_URL``), else a container when a Docker
engine answers and has the image, else a private node of the installed RabbitMQ, or of the version that
``AMQPTASKS_TEST_RABBITMQ`` names. A run that gets none fails.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pika
import pytest
import yaml

from amqptasks import AmqpTasks
from amqptasks.broker.counts import queue_counts
from amqptasks.config import BrokerSettings, mask_url
from amqptasks.testing.ledger import PATH_VARIABLE, Ledger
from amqptasks.testing.management import Management
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.rabbitmq import VERSION_VARIABLE, PrivateNode
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import WorkerProcess
from integration.apps import canvas
from integration.store_servers import stop_servers

ROOT = Path(__file__).resolve().parents[1]
#: Characters of a worker's log that are shown of a test that failed.
_SHOWN = 8000
_IMAGE = os.environ.get("AMQPTASKS_TEST_IMAGE", "rabbitmq:3.13-management")


@dataclass(frozen=True)
class Broker:
    """A broker for the run."""

    origin: str
    url: str
    management_url: str


def _container(stack: contextlib.ExitStack) -> Broker | None:
    """A container, when a Docker engine answers and can run the image; None otherwise, within a second or so."""
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").exists():
        return None
    from docker import DockerClient
    from docker.errors import DockerException

    try:
        with contextlib.closing(DockerClient.from_env(timeout=1)) as client:
            client.ping()
            client.images.get(_IMAGE)
    except DockerException:
        return None
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    started = LogMessageWaitStrategy("Server startup complete")
    container = stack.enter_context(DockerContainer(_IMAGE).with_exposed_ports(5672, 15672).waiting_for(started))
    host = container.get_container_host_ip()
    return Broker(
        f"container of {_IMAGE}",
        f"amqp://guest:guest@{host}:{container.get_exposed_port(5672)}/",
        f"http://guest:guest@{host}:{container.get_exposed_port(15672)}",
    )


@pytest.fixture(scope="session")
def broker(pytestconfig: pytest.Config) -> Iterator[Broker]:
    """The broker of this run."""
    with contextlib.ExitStack() as stack:
        url = os.environ.get("AMQPTASKS_TEST_BROKER_URL")
        if url:
            host = urlsplit(url).hostname
            default = f"http://guest:guest@{host}:15672"
            found = Broker("AMQPTASKS_TEST_BROKER_URL", url, os.environ.get("AMQPTASKS_TEST_MANAGEMENT_URL", default))
        else:
            container = None if os.environ.get(VERSION_VARIABLE) else _container(stack)
            if container is None:
                node = stack.enter_context(PrivateNode("tests"))
                container = Broker("private node", node.url, node.management_url)
            found = container
        version = Management(found.management_url).request("GET", "overview")["rabbitmq_version"]
        reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"broker: RabbitMQ {version}, {found.origin}, {mask_url(found.url)}")
        yield found


@dataclass(frozen=True)
class VirtualHost:
    """A virtual host of its own."""

    name: str
    url: str
    management: Management
    broker: Broker

    def ready(self, queue: str) -> int:
        """Messages that wait."""
        return self._counted(queue)[0]

    def consumers(self, queue: str) -> int:
        """Consumers that it has."""
        return self._counted(queue)[1]

    def _counted(self, queue: str) -> tuple[int, int]:
        found = queue_counts(BrokerSettings.model_validate({"url": self.url}), [queue])[queue]
        assert found is not None, f"there is no queue {queue!r}"
        return found

    def unacked(self, queue: str) -> int:
        """Messages that a consumer holds."""
        return self.management.counts(queue)[1]

    def wait_settled(self, queue: str, timeout: float = 20.0) -> None:
        """Wait until nothing waits and nothing is unacknowledged."""
        wait_until(
            lambda: self.ready(queue) == 0 and self.management.counts(queue) == (0, 0),
            timeout,
            lambda: f"{queue} is empty: (ready, unacknowledged) {self.management.counts(queue)}",
            pause=0.1,
        )

    def dead_letters(self, queue: str, count: int, timeout: float = 20.0) -> list[dict[str, Any]]:
        """Wait for so many dead letters of a queue; they stay where they are."""

        def look() -> list[dict[str, Any]]:
            # Each look takes and gives back every letter, which holds up those who write them.
            if self.ready(f"{queue}.dlq") < count:
                return []
            found = self.management.messages(f"{queue}.dlq")
            return found if len(found) >= count else []

        def what() -> str:
            counts = {name: self.management.counts(name) for name in (queue, f"{queue}.dlq")}
            return f"{count} dead letters in {queue}.dlq; ready and unacknowledged: {counts}"

        found = wait_until(look, timeout, what, pause=0.1)
        assert len(found) == count, [letter["properties"]["headers"].get("x-task-reason") for letter in found]
        return found


@pytest.fixture
def vhost(broker: Broker) -> Iterator[VirtualHost]:
    """A new virtual host, deleted afterwards."""
    name = f"test-{secrets.token_hex(4)}"
    management = Management(broker.management_url, name)
    management.create_vhost(name)
    base = broker.url.rstrip("/") if urlsplit(broker.url).path in ("", "/") else broker.url.rpartition("/")[0]
    yield VirtualHost(name, f"{base}/{quote(name, safe='')}", management, broker)
    management.delete_vhost(name)


@pytest.fixture
def restricted_user(vhost: VirtualHost) -> Iterator[Callable[[str, str, str], str]]:
    """Makes a user with these permissions (configure, write, read) and gives its URL."""
    made = []

    def make(configure: str, write: str, read: str) -> str:
        name = f"user-{secrets.token_hex(3)}"
        vhost.management.create_user(name, "secret-word")
        vhost.management.permit(name, configure, write, read)
        made.append(name)
        parts = urlsplit(vhost.url)
        return f"amqp://{name}:secret-word@{parts.hostname}:{parts.port}{parts.path}"

    yield make
    for name in made:
        vhost.management.delete_user(name)


@pytest.fixture
def proxy(broker: Broker) -> Iterator[TcpProxy]:
    """A proxy in front of the broker."""
    parts = urlsplit(broker.url)
    with TcpProxy(parts.hostname or "127.0.0.1", parts.port or 5672) as running:
        yield running


@pytest.fixture
def through_proxy(vhost: VirtualHost, proxy: TcpProxy) -> str:
    """The virtual host's URL through the proxy."""
    parts = urlsplit(vhost.url)
    return f"amqp://{parts.username}:{parts.password}@127.0.0.1:{proxy.port}{parts.path}"


@pytest.fixture
def node() -> Iterator[PrivateNode]:
    """A node for one test alone, to stop, kill and alarm."""
    with PrivateNode("own") as running:
        yield running


class Bench:
    """An app, its configuration file, its workers and its ledger, on one virtual host."""

    APP = "integration.apps.jobs:app"

    def __init__(self, vhost: VirtualHost, folder: Path) -> None:
        self.vhost = vhost
        self.folder = folder
        self.ledger = Ledger(folder / "ledger")
        self._apps: list[AmqpTasks] = []
        self._workers: list[WorkerProcess] = []
        self.settings: dict[str, Any] = {"broker": {"url": vhost.url}, "queues": {"default": {}}}

    @property
    def config(self) -> Path:
        """The configuration file, as `settings` are now."""
        file = self.folder / "amqptasks.yaml"
        file.write_text(yaml.safe_dump(self.settings))
        return file

    def client(self) -> AmqpTasks:
        """An app that publishes by name with these settings."""
        app = AmqpTasks("client", config=self.config)
        self._apps.append(app)
        return app

    def send(self, app: AmqpTasks, task: str, *args: Any, **options: Any) -> str:
        """Publish a call of a task of `integration.apps.jobs`; its id."""
        return app.send_task(f"integration.apps.jobs.{task}", args, **options).id

    def worker(
        self, queues: str = "default", *options: str, url: str | None = None, ready: bool = True, path: Path = ROOT
    ) -> WorkerProcess:
        """Start a worker, and wait until it is ready. `path`: where its app is."""
        worker = WorkerProcess(
            self.APP,
            queues,
            *options,
            config=self.config,
            log=self.folder / f"worker-{len(self._workers)}.log",
            environment={PATH_VARIABLE: str(self.ledger.path), "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
            global_options=["-b", url] if url is not None else [],
        )
        self._workers.append(worker)
        return worker.wait_ready() if ready else worker

    def wait_done(self, ids: set[str], timeout: float = 30.0, event: str = "done") -> None:
        """Wait until all these ids stand in the ledger."""
        wait_until(lambda: ids <= self.ledger.ids(event), timeout, lambda: self._missing(ids, event), pause=0.05)

    def _missing(self, ids: set[str], event: str) -> str:
        missing = ids - self.ledger.ids(event)
        logs = "\n".join(worker.log[-3000:] for worker in self._workers)
        return f"{len(missing)} of {len(ids)} are not {event}: {sorted(missing)[:5]}\n{logs}"

    def story(self) -> Iterator[tuple[str, str]]:
        """What a test that failed leaves: its queues, and of each worker the log, with the stacks of all processes."""
        counts = {name: self.vhost.management.counts(name) for name in self.vhost.management.queues()}
        yield "queues: (ready, unacknowledged)", str({name: both for name, both in counts.items() if any(both)})
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGUSR1)
                time.sleep(0.5)
            yield worker.log_file.name, worker.log[-_SHOWN:]

    def close(self) -> None:
        """End everything."""
        for worker in self._workers:
            worker.kill()
        for app in self._apps:
            app.close()


@pytest.fixture
def bench(vhost: VirtualHost, tmp_path: Path) -> Iterator[Bench]:
    """App, configuration, workers and ledger."""
    made = Bench(vhost, tmp_path)
    yield made
    made.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed tells what its workers do, while they are there: it may not fail again."""
    report = yield
    if report.when == "call" and report.failed:
        benches = {id(one): one for one in getattr(item, "funcargs", {}).values() if isinstance(one, Bench)}
        for bench in benches.values():
            try:
                report.sections.extend(bench.story())
            except Exception as error:  # the failure itself counts
                report.sections.append(("no story", repr(error)))
    return report


@pytest.fixture(scope="session", autouse=True)
def _store_servers() -> Iterator[None]:
    yield
    stop_servers()


JOINS = "amqptasks.joins"


class CanvasBench(Bench):
    """The bench with the tasks of `integration.apps.canvas`, and its app as the client."""

    APP = "integration.apps.canvas:app"
    CLIENT = canvas.app

    def caller(self, url: str | None = None) -> AmqpTasks:
        """The application itself, with these settings."""
        app = self.CLIENT
        app.close()
        for name in ("client", "calls", "results", "result_store"):
            app.__dict__.pop(name, None)
        for task in app.tasks.values():
            task._options = None
        app._overrides.clear()
        app.configure(config=self.config, broker=url)
        return app

    def close(self) -> None:
        """End everything."""
        self.CLIENT.close()
        super().close()

    def stop_workers(self) -> None:
        """Stop them as an operator would."""
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.stop()

    def wait_joined(self, chords: int, *, again: int = 0) -> None:
        """Wait until the queue of parts holds nothing but the markers of so many chords. Ends the workers.

        So many chords may have been marked once more.
        """
        counts = self.vhost.management.counts
        wait_until(lambda: 1 <= sum(counts(JOINS)) <= chords + again, 20, lambda: f"{JOINS} holds {counts(JOINS)}")
        self.stop_workers()
        # What a consumer held waits again as soon as the consumer is gone.
        wait_until(lambda: self.vhost.consumers(JOINS) == 0, 20, "the workers gave the markers back", pause=0.1)
        waiting = self.vhost.ready(JOINS)
        with contextlib.closing(pika.BlockingConnection(pika.URLParameters(self.vhost.url))) as connection:
            # A quorum queue with a single active consumer refuses basic.get.
            consumed = connection.channel().consume(JOINS, inactivity_timeout=20)
            tables = [json.loads(body or b'"nothing came"') for _, _, body in itertools.islice(consumed, waiting)]
        assert all(list(table) == ["done"] for table in tables), tables
        assert len({chord for table in tables for chord in table["done"]}) == chords


@pytest.fixture
def desk(vhost: VirtualHost, tmp_path: Path) -> Iterator[CanvasBench]:
    """App, configuration, workers and ledger, for results and compositions."""
    made = CanvasBench(vhost, tmp_path)
    yield made
    made.close()

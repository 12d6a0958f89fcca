"""Gets the demo a broker: the one that is named, else a private RabbitMQ node, else a container."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote, urlsplit, urlunsplit

from amqptasks.broker.counts import queue_counts
from amqptasks.config import load_settings
from amqptasks.errors import BrokerError
from amqptasks.testing.rabbitmq import PrivateNode, install_rabbitmq, rabbitmq_installed
from examples.demo.errors import DemoError

__all__ = ["Broker", "find_broker"]

URL_VARIABLE = "AMQPTASKS_DEMO_BROKER_URL"
MANAGEMENT_VARIABLE = "AMQPTASKS_DEMO_MANAGEMENT_URL"
_IMAGE = "rabbitmq:4-management"
_CONTAINER_SECONDS = 60
_DOCKER_SECONDS = 5.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Broker:
    """A broker to use. `own`: it was started for this run, and ends with it."""

    kind: str
    url: str
    management_url: str | None
    own: bool

    def queue_page(self, queue: str) -> str | None:
        """The page of a queue in the management UI, without a password."""
        if self.management_url is None:
            return None
        vhost = urlsplit(self.url).path.removeprefix("/") or quote("/", safe="")
        base = urlsplit(self.management_url)
        return (
            f"{base.scheme}://{base.netloc.rpartition('@')[2]}{base.path.rstrip('/')}/#/queues/{vhost}/{quote(queue)}"
        )

    @property
    def login(self) -> str:
        """Who may look: with the password where it is one of this run's own node."""
        user, password = _credentials(self.management_url or self.url)
        return f"user {user}, password {password}" if self.own else f"user {user}"


@contextmanager
def find_broker(environment: Mapping[str, str], say: Say) -> Iterator[Broker]:
    """A broker for one run, ended afterwards when it was started for it.

    Raises `DemoError` where none can be had, naming what was tried.
    """
    url = environment.get(URL_VARIABLE)
    if url:
        say(f"Using the broker of {URL_VARIABLE}")
        yield Broker("given", url, environment.get(MANAGEMENT_VARIABLE) or _management_beside(url), own=False)
        return
    if not rabbitmq_installed():
        if _docker_answers():
            say("No RabbitMQ is installed here, but Docker answers: starting a container")
            with _container(environment.get("AMQPTASKS_DEMO_IMAGE", _IMAGE)) as broker:
                yield broker
            return
        if os.geteuid() != 0:
            raise DemoError(
                f"no broker: {URL_VARIABLE} is not set, RabbitMQ is not installed, and no Docker engine answers. "
                "Install the package rabbitmq-server (or run this as root, which does it), start Docker, or set the "
                "variable."
            )
        say("Installing the distribution's rabbitmq-server (once)")
        install_rabbitmq()
    say("Starting a private RabbitMQ node on free ports")
    with PrivateNode() as node:
        try:
            yield Broker("private node", node.url, node.management_url, own=True)
        finally:
            # Its data is thrown away with it, so it need not be written down first: that takes six seconds.
            node.kill()
            _wait_closed(node.port)


def _wait_closed(port: int) -> None:
    # The name server epmd refuses to end while it knows of a node; it forgets one whose sockets are closed.
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                break
        time.sleep(0.02)
    time.sleep(0.2)


def _credentials(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.username or "guest", parts.password or "guest"


def _management_beside(url: str) -> str | None:
    # RabbitMQ's default port; with TLS there is no telling.
    parts = urlsplit(url)
    if parts.scheme != "amqp" or not parts.hostname:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    login = parts.netloc.rpartition("@")[0]
    return urlunsplit(("http", f"{login}@{host}:15672" if login else f"{host}:15672", "", "", ""))


def _docker(*arguments: str, timeout: float = _DOCKER_SECONDS) -> str:
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise DemoError(f"docker {arguments[0]} does not answer within {timeout:.0f} s") from None
    if done.returncode != 0:
        raise DemoError(f"docker {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def _docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    try:
        _docker("info", "--format", "{{.ServerVersion}}")
    except DemoError:
        return False
    return True


@contextmanager
def _container(image: str) -> Iterator[Broker]:
    try:
        _docker("image", "inspect", image)
    except DemoError:
        # By itself, as this may take its time and the rest may not.
        _docker("pull", "--quiet", image, timeout=600)
    # Ports on the loopback interface only.
    published = ("--publish", "127.0.0.1::5672", "--publish", "127.0.0.1::15672")
    name = _docker("run", "--detach", "--rm", *published, image, timeout=60)
    try:
        url = f"amqp://guest:guest@{_docker('port', name, '5672/tcp').splitlines()[0]}/"
        management = f"http://guest:guest@{_docker('port', name, '15672/tcp').splitlines()[0]}"
        _wait(url)
        yield Broker(f"container of {image}", url, management, own=True)
    finally:
        _docker("rm", "--force", "--volumes", name, timeout=60)


def _wait(url: str) -> None:
    settings = load_settings(data={"broker": {"url": url}})
    deadline = time.monotonic() + _CONTAINER_SECONDS
    while True:
        try:
            queue_counts(settings.broker, [])
        except BrokerError as error:
            if time.monotonic() > deadline:
                raise DemoError(f"RabbitMQ in the container does not answer: {error}") from error
            time.sleep(0.3)
        else:
            return

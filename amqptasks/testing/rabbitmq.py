"""A private RabbitMQ node: of the installed distribution, any user, or another version; free ports, its own folder."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from amqptasks.testing.management import Management, ManagementError
from amqptasks.testing.trees import Tree, broker_tree

__all__ = ["VERSION_VARIABLE", "NodeError", "PrivateNode", "free_port", "install_rabbitmq", "rabbitmq_installed"]

#: Names the version of private nodes; without it they are of the installed distribution.
VERSION_VARIABLE = "AMQPTASKS_TEST_RABBITMQ"
_HOMES = ("/usr/lib/rabbitmq/bin", "/usr/lib/rabbitmq/sbin", "/opt/rabbitmq/sbin", "/usr/local/sbin")
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
_TICK = 500  # ms


class NodeError(RuntimeError):
    """The node cannot be had or does not start. The message has the end of its log."""


def _scripts(root: Path = Path("/")) -> Path | None:
    for home in _HOMES:
        # Not the wrapper in /usr/sbin: that one insists on root or the user rabbitmq.
        here = root / home.removeprefix("/")
        if (here / "rabbitmq-server").exists() and (here / "rabbitmqctl").exists():
            return Path(home)
    return None


def rabbitmq_installed() -> bool:
    """Whether this machine has RabbitMQ's scripts."""
    return _scripts() is not None


def install_rabbitmq() -> None:
    """Install the distribution's package, as root on Debian and Ubuntu. Raises `NodeError` where that cannot be."""
    if rabbitmq_installed():
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise NodeError(
            "RabbitMQ is not installed. Install it (Debian: apt-get install rabbitmq-server), start Docker, "
            "or name a broker that runs"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "rabbitmq-server"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NodeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    if not rabbitmq_installed():
        raise NodeError("the package rabbitmq-server was installed, but its scripts were not found")


#: Ports that were given out here, and not again while this process lives.
_given: set[int] = set()


def free_port() -> int:
    """A TCP port of the loopback that nobody uses now, and no process gets from here while this one lives.

    Below those that the system gives to connections (32768 and above, on Linux): one of them might be a connection's by
    the time that somebody listens.
    """
    while True:
        port = random.randrange(15_000, 32_000)
        if port in _given or not _reserve(port):
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given.add(port)
            return port


def _reserve(port: int) -> bool:
    """Whether no other process has it: each that runs has locked a byte for every port of its own."""
    try:
        fcntl.lockf(_reservations(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


@functools.cache
def _reservations() -> int:
    file = Path(tempfile.gettempdir()) / f"amqptasks-ports-{os.getuid()}"
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


class PrivateNode:
    """One node with the management plugin. Use it as a context manager, or `start` and `stop` it.

    Args:
        name: of the node, which gets a suffix; one with ``@`` stands as it is.
        epmd_port, cookie: what nodes of one cluster share; its own by default.
        config: more lines of ``rabbitmq.conf``; ``{folder}`` in a value is the node's own folder.
        files: name -> content of more files in that folder.
        application: more settings of the Erlang application ``rabbit``, which ``rabbitmq.conf`` does not know.
        tune: statistics twice a second, for tests that look at them.
        version: a version of `amqptasks.testing.trees.SUITES`; by default ``$AMQPTASKS_TEST_RABBITMQ``, else the
            installed one.

    Attributes:
        url: AMQP URL of the default virtual host.
        management_url: URL of the management API and UI, with user and password.
    """

    def __init__(
        self,
        name: str = "private",
        *,
        plugins: Sequence[str] = ("rabbitmq_management",),
        config: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        application: Mapping[str, int] | None = None,
        tune: bool = True,
        version: str | None = None,
        epmd_port: int | None = None,
        cookie: str | None = None,
    ) -> None:
        version = version or os.environ.get(VERSION_VARIABLE)
        self._tree: Tree | None = broker_tree(version) if version else None
        scripts = _scripts(self._tree.root if self._tree else Path("/"))
        if scripts is None:
            raise NodeError("RabbitMQ is not installed (Debian: apt-get install rabbitmq-server)")
        self._scripts = scripts
        self.folder = Path(tempfile.mkdtemp(prefix="amqptasks-rabbitmq-"))
        self.port, self.management_port = free_port(), free_port()
        self.name = name if "@" in name else f"{name}-{secrets.token_hex(3)}@localhost"
        self._epmd_port, self._cookie = epmd_port or free_port(), cookie or secrets.token_hex(16)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/"
        self.management_url = f"http://guest:guest@127.0.0.1:{self.management_port}"
        self._process: subprocess.Popen[bytes] | None = None
        ticks = {"quorum_tick_interval": _TICK} if tune else {}
        self._write_files(plugins, config or {}, {**ticks, **(application or {})}, tune=tune)
        for file, content in (files or {}).items():
            (self.folder / file).write_bytes(content)

    def _command(self, *command: str) -> list[str]:
        return list(command) if self._tree is None else self._tree.command(self.folder, *command)

    def _write_files(
        self, plugins: Sequence[str], config: Mapping[str, str], application: Mapping[str, int], *, tune: bool
    ) -> None:
        home = self.folder / "home"
        home.mkdir()
        cookie = home / ".erlang.cookie"
        cookie.write_text(self._cookie)
        cookie.chmod(0o400)
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "management.tcp.ip": "127.0.0.1",
            "management.tcp.port": str(self.management_port),
            # Management figures are five seconds old and more by default; tests look more often.
            "collect_statistics_interval": str(_TICK if tune else 5000),
            **{key: value.format(folder=self.folder) for key, value in config.items()},
        }
        (self.folder / "rabbitmq.conf").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
        (self.folder / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")
        self._environment = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(self.folder / "no-conf.d"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "no-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(self.folder / "generated"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}"
            + "".join(f" -rabbit {key} {value}" for key, value in application.items()),
        }

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the node and wait until it takes connections. Raises `NodeError` with the end of its log."""
        if self._tree is not None:
            for path in [self.folder, *self.folder.rglob("*")]:
                os.chown(path, self._tree.uid, self._tree.gid, follow_symlinks=False)
        output = (self.folder / "output").open("ab")
        with output:
            self._process = subprocess.Popen(
                self._command(str(self._scripts / "rabbitmq-server")),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not (self._listens(self.port) and self._answers()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "output").read_text(errors="replace")[-2000:]
                raise NodeError(f"RabbitMQ did not start:\n{tail}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        """Whether the management API does: 4.3 listens a moment before it can."""
        try:
            Management(self.management_url).request("GET", "overview")
        except (ManagementError, OSError):
            return False
        return True

    @staticmethod
    def _listens(port: int) -> bool:
        with socket.socket() as probe:
            probe.settimeout(0.2)
            return probe.connect_ex(("127.0.0.1", port)) == 0

    @property
    def runs(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Stop the node in good order. Its data stays for the next `start`."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, as a power failure would."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP to its Erlang machine: connections stay, and nobody answers. Until `thaw`."""
        self._to_beam(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._to_beam(signal.SIGCONT)

    @property
    def pid(self) -> int:
        """Of the Erlang machine. Raises `NodeError` where none runs."""
        beam = self._beam(self._process.pid) if self._process is not None else None
        if beam is None:
            raise NodeError(f"{self.name} does not run")
        return beam

    def _to_beam(self, number: signal.Signals) -> None:
        _signal(self.pid, number)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        beam = self._beam(process.pid)
        for pid in (beam, process.pid) if number is signal.SIGTERM else (beam,):
            if pid is not None:
                _signal(pid, number)
                break
        if number is signal.SIGKILL:
            _signal_group(process.pid, number)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait(5)
        # The shell around it may be gone before the machine is, whose ports then still answer for a moment.
        deadline = time.monotonic() + 5
        while (self._listens(self.port) or self._listens(self.management_port)) and time.monotonic() < deadline:
            time.sleep(0.02)

    @staticmethod
    def _beam(session: int) -> int | None:
        """The Erlang machine among the processes of the node's session."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.getsid(int(entry.name)) == session and "beam" in (entry / "comm").read_text():
                        return int(entry.name)
                except (OSError, ProcessLookupError):
                    continue
        return None

    def remove(self) -> None:
        """End the node and its epmd, and delete its folder: at once, since nobody wants the data."""
        self.kill()
        self.end_epmd()
        self.delete()

    def end_epmd(self) -> None:
        """End the daemon that knows the ports of nodes. It refuses while a node lives."""
        epmd = shutil.which("epmd") or next(
            (str(path) for path in Path("/usr/lib/erlang").glob("erts-*/bin/epmd")), None
        )
        if epmd is not None:
            deadline = time.monotonic() + 5
            # It believes for a moment that a node lives which was killed.
            while self._listens(self._epmd_port) and time.monotonic() < deadline:
                subprocess.run([epmd, "-kill"], env=self._environment, capture_output=True, check=False)
                time.sleep(0.05)

    def delete(self) -> None:
        """Delete the folder of a node that has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._tree is not None:
            self._tree.forget(self.folder)

    def rabbitmqctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on this node. Raises `NodeError` with what it printed."""
        done = subprocess.run(
            self._command(str(self._scripts / "rabbitmqctl"), "-n", self.name, "-q", *arguments),
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise NodeError(f"rabbitmqctl {' '.join(arguments)} failed: {done.stderr or done.stdout}")
        return done.stdout


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return

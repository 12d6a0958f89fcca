"""Private servers for tests of result stores and metrics, on free ports and in folders of their own.

Installed from the distribution where they are missing (as root on Debian and Ubuntu).
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import psutil

from amqptasks.testing.rabbitmq import NodeError, free_port

__all__ = ["MariaDBServer", "MemcachedServer", "PostgresServer", "Program", "PrometheusServer", "RedisServer", "Server"]

_START_SECONDS = 60.0


class Program:
    """A program of the distribution's."""

    #: Debian's package, the program to look for, and where else it may be.
    package: ClassVar[str]
    program: ClassVar[str]
    homes: ClassVar[str] = ""

    @classmethod
    def find(cls, program: str) -> str:
        """The path of one of its programs. Raises `NodeError` when it is not installed."""
        found = shutil.which(program) or next((str(one) for one in sorted(Path("/").glob(cls.homes + program))), None)
        if cls.homes:
            # The distribution's own comes first: another on PATH may be a part of something else.
            found = next((str(one) for one in sorted(Path("/").glob(cls.homes + program))), found)
        if found is None:
            raise NodeError(f"{program} is not installed (Debian: apt-get install {cls.package})")
        return found

    @classmethod
    def install(cls) -> None:
        """Install the distribution's package where it is missing. Raises `NodeError` where that cannot be."""
        try:
            cls.find(cls.program)
        except NodeError:
            if os.geteuid() != 0 or shutil.which("apt-get") is None:
                raise
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
            install = ["apt-get", "install", "-y", "--no-install-recommends", cls.package]
            for command in (["apt-get", "update"], install):
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise NodeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}") from None


class Server(Program, ABC):
    """One server. Use it as a context manager, or `start` and `stop` it."""

    #: The user that it runs as (not root).
    user: ClassVar[str] = ""

    def __init__(self) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"amqptasks-{self.program}-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._is_set_up = False

    @property
    @abstractmethod
    def url(self) -> str:
        """As in ``result.backend``."""

    @abstractmethod
    def command(self) -> list[str]:
        """What starts it in the foreground."""

    @abstractmethod
    def ready_command(self) -> list[str] | None:
        """What exits 0 when it takes clients; None: when its port is open."""

    def set_up(self) -> None:
        """Make its data folder."""

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it and wait until it takes clients. Raises `NodeError` with the end of its log."""
        self.install()
        if not self._is_set_up:
            if self._as_user():
                shutil.chown(self.folder, self.user, self.user)
                self.folder.chmod(0o755)
            self.set_up()
            self._is_set_up = True
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, cwd=self.folder, user=self._as_user(), start_new_session=True
            )
        until = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if time.monotonic() > until or self._process.poll() is not None:
                raise NodeError(f"{self.program} does not start:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it; its data stays."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)

    def freeze(self) -> None:
        """SIGSTOP to all its processes: connections stay, its kernel acknowledges, and nobody answers. Until `thaw`."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise NodeError(f"{self.program} does not run")
        # PostgreSQL's processes are each a group of their own. First the one that makes the others.
        own = psutil.Process(self._process.pid)
        own.send_signal(number)
        for one in own.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of its programs as its user."""
        return subprocess.run(
            [self.find(command[0]), *command[1:]],
            user=self._as_user(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def _as_user(self) -> str | None:
        if os.geteuid() != 0 or not self.user:
            return None
        pwd.getpwnam(self.user)
        return self.user

    def _is_ready(self) -> bool:
        command = self.ready_command()
        return command is not None and self.run(*command).returncode == 0


class RedisServer(Server):
    """Redis."""

    package, program = "redis-server", "redis-server"

    @property
    def url(self) -> str:
        """As in ``result.backend``."""
        return f"redis://:s3cret@127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        """What starts it."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        return [self.find("redis-server"), *options, "--requirepass", "s3cret", "--appendonly", "yes"]

    def ready_command(self) -> list[str]:
        """What tells that it runs."""
        return ["redis-cli", "-p", str(self.port), "-a", "s3cret", "--no-auth-warning", "-e", "ping"]


class PostgresServer(Server):
    """PostgreSQL."""

    package, program, homes, user = "postgresql", "postgres", "usr/lib/postgresql/*/bin/", "postgres"

    @property
    def url(self) -> str:
        """As in ``result.backend``."""
        return f"postgresql://postgres:s3cret@127.0.0.1:{self.port}/postgres"

    def set_up(self) -> None:
        """initdb."""
        password = self.folder / "password"
        password.write_text("s3cret")
        password.chmod(0o644)
        done = self.run(
            *("initdb", "-D", str(self.folder / "data"), "-U", "postgres", "--no-sync", "-E", "UTF8"),
            *("--locale", "C", "--auth", "scram-sha-256", "--pwfile", str(password)),
        )
        if done.returncode != 0:
            raise NodeError(f"initdb failed:\n{done.stderr[-2000:]}")

    def command(self) -> list[str]:
        """What starts it."""
        options = ["-D", str(self.folder / "data"), "-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder)]
        return [self.find("postgres"), *options]

    def ready_command(self) -> list[str]:
        """What tells that it runs."""
        return ["pg_isready", "-h", "127.0.0.1", "-p", str(self.port)]

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """A fast shutdown: PostgreSQL's SIGTERM waits for its clients."""
        super().stop(number)


class MariaDBServer(Server):
    """MariaDB."""

    package, program, homes, user = "mariadb-server", "mariadbd", "usr/sbin/", "mysql"

    @classmethod
    def find(cls, program: str) -> str:
        """The server stands in /usr/sbin, its other programs do not."""
        return super().find(program) if program == cls.program else shutil.which(program) or program

    @property
    def url(self) -> str:
        """As in ``result.backend``."""
        return f"mysql://results:s3cret@127.0.0.1:{self.port}/results"

    def set_up(self) -> None:
        """mariadb-install-db, a database and a user."""
        done = self.run(
            *("mariadb-install-db", "--no-defaults", f"--datadir={self.folder / 'data'}"),
            *("--auth-root-authentication-method=normal", "--skip-test-db"),
        )
        if done.returncode != 0:
            raise NodeError(f"mariadb-install-db failed:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
        (self.folder / "init.sql").write_text(
            "CREATE DATABASE IF NOT EXISTS results CHARACTER SET utf8mb4;\n"
            "CREATE USER IF NOT EXISTS results@'127.0.0.1' IDENTIFIED BY 's3cret';\n"
            "GRANT ALL ON results.* TO results@'127.0.0.1';\n"
        )

    def command(self) -> list[str]:
        """What starts it."""
        data, local = self.folder / "data", self.folder / "socket"
        options = [f"--datadir={data}", f"--port={self.port}", "--bind-address=127.0.0.1", f"--socket={local}"]
        options += [f"--init-file={self.folder / 'init.sql'}", f"--pid-file={self.folder / 'pid'}"]
        return [self.find("mariadbd"), "--no-defaults", *options, "--innodb-flush-log-at-trx-commit=0"]

    def ready_command(self) -> list[str]:
        """What tells that it runs."""
        return ["mariadb-admin", "--no-defaults", f"--socket={self.folder / 'socket'}", "-u", "root", "ping"]


class MemcachedServer(Server):
    """memcached."""

    package, program = "memcached", "memcached"

    @property
    def url(self) -> str:
        """As in ``result.backend``."""
        return f"memcached://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """What starts it."""
        root = ["-u", "nobody"] if os.geteuid() == 0 else []
        return [self.find("memcached"), "-l", "127.0.0.1", "-p", str(self.port), "-m", "64", *root]

    def ready_command(self) -> list[str] | None:
        """It has no program that asks it."""
        return None

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1):
                return True
        except OSError:
            return False


class PrometheusServer(Server):
    """Prometheus, with its `promtool`.

    Args:
        target: ``host:port`` of what it scrapes, each second.
        rules: a rule file.
    """

    package, program = "prometheus", "prometheus"

    def __init__(self, target: str, rules: Path) -> None:
        super().__init__()
        self._target = target
        self._rules = rules

    @property
    def url(self) -> str:
        """Of its API."""
        return f"http://127.0.0.1:{self.port}"

    def set_up(self) -> None:
        """Its configuration."""
        (self.folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
            f"rule_files: ['{self._rules}']\n"
            f"scrape_configs: [{{job_name: worker, static_configs: [{{targets: ['{self._target}']}}]}}]\n"
        )

    def command(self) -> list[str]:
        """What starts it."""
        data, listen = self.folder / "data", f"127.0.0.1:{self.port}"
        options = [f"--config.file={self.folder / 'prometheus.yml'}", f"--storage.tsdb.path={data}"]
        return [self.find("prometheus"), *options, f"--web.listen-address={listen}"]

    def ready_command(self) -> list[str]:
        """What tells that it runs."""
        return ["promtool", "query", "instant", self.url, "vector(1)"]

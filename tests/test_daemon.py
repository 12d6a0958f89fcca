"""Background programs: pid files, names of files, what a service manager is told."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amqptasks.errors import AlreadyRunning, ConfigError
from amqptasks.worker.daemon import DaemonOptions, Launch, PidFile, expand
from amqptasks.worker.notify import Notifier

HOLDER = """
import sys, time
from amqptasks.worker.daemon import PidFile
PidFile(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("/log/%n.log", "/log/w1.log"),
        ("/log/%p%I.log", "/log/w1@mq.example.com.log"),
        ("/log/%h-%d-%i", "/log/mq.example.com-example.com-0"),
        ("/log/100%%/%x%", "/log/100%/%x%"),
    ],
)
def test_names_of_files_have_celerys_marks(pattern: str, name: str) -> None:
    assert expand(pattern, "w1@mq.example.com") == name


def test_a_pid_file_names_its_process_and_goes_with_it(tmp_path: Path) -> None:
    file = PidFile(tmp_path / "worker.pid")
    file.acquire()
    assert file.path.read_text() == f"{os.getpid()}\n"
    assert file.path.stat().st_mode & 0o444 == 0o444, "service managers read it"
    file.release()
    assert not file.path.exists()


def test_a_pid_file_of_a_process_that_lives_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "worker.pid"
    with holder(path) as process:
        second = PidFile(path)
        with pytest.raises(AlreadyRunning, match=rf"worker\.pid: process {process.pid} runs with it"):
            second.acquire()
        second.release()
        assert path.read_text() == f"{process.pid}\n"


def test_a_pid_file_that_another_program_wrote_is_refused_while_that_lives(tmp_path: Path) -> None:
    path = tmp_path / "worker.pid"
    with subprocess.Popen(["sleep", "60"]) as other:
        path.write_text(f"{other.pid}\n")
        with pytest.raises(AlreadyRunning, match=f"process {other.pid} "):
            PidFile(path).acquire()
        other.kill()
    file = PidFile(path)
    file.acquire()
    file.release()


@pytest.mark.parametrize("text", ["", "no number", "-5", "999999999", "{parent}"])
def test_a_stale_pid_file_is_replaced(tmp_path: Path, text: str) -> None:
    """Also where its pid has come to belong to a process that is younger than the file."""
    path = tmp_path / "worker.pid"
    path.write_text(text.format(parent=os.getppid()))
    long_ago = time.time() - 10 * 365 * 86400
    os.utime(path, (long_ago, long_ago))
    file = PidFile(path)
    file.acquire()
    assert path.read_text() == f"{os.getpid()}\n"
    file.release()


def test_a_pid_file_outlives_kill_and_the_next_start_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "worker.pid"
    with holder(path):
        pass
    assert path.exists()
    with holder(path) as process:
        assert path.read_text() == f"{process.pid}\n"


def test_files_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--pidfile .*/missing/worker\.pid: No such file or directory"):
        PidFile(tmp_path / "missing" / "worker.pid").acquire()
    options = DaemonOptions(logfile=str(tmp_path / "missing" / "%n.log"))
    with Launch(options, "w1@host") as launch, pytest.raises(ConfigError, match=r"--logfile .*/missing/w1\.log: No"):
        launch.complete()
    with pytest.raises(ConfigError, match=r"--uid, --gid: .*nobody-of-this-name"):
        Launch(DaemonOptions(uid="nobody-of-this-name"), "w1@host").__enter__()


DETACHED = """
import os, sys, time
from amqptasks.worker.daemon import DaemonOptions, Launch
folder, how = sys.argv[1:]
options = DaemonOptions(pidfile=f"{folder}/%n.pid", logfile=f"{folder}/%n.log", detach=True, umask=0o027)
with Launch(options, "w1@host") as launch:
    if how == "fails":
        print("told to the terminal", file=sys.stderr)
        sys.exit(2)
    launch.complete()
    print("written to the log", os.getsid(0) != os.getpid(), os.getppid(), flush=True)
    while not os.path.exists(f"{folder}/stop"):
        time.sleep(0.02)
"""


def test_a_detached_program_leaves_its_terminal_and_goes_on(tmp_path: Path) -> None:
    starter = subprocess.run(
        [sys.executable, "-c", DETACHED, str(tmp_path), "runs"], check=False, capture_output=True, text=True, timeout=20
    )
    assert (starter.returncode, starter.stdout, starter.stderr) == (0, "", "")
    pid = int((tmp_path / "w1.pid").read_text())
    assert os.getsid(pid) != os.getsid(0)
    log = tmp_path / "w1.log"
    deadline = time.monotonic() + 10
    while not log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert log.read_text().startswith("written to the log True ")
    assert log.stat().st_mode & 0o777 == 0o640
    (tmp_path / "stop").touch()
    while (tmp_path / "w1.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not (tmp_path / "w1.pid").exists()


def test_a_program_that_cannot_start_says_so_to_the_terminal_with_its_exit_code(tmp_path: Path) -> None:
    starter = subprocess.run(
        [sys.executable, "-c", DETACHED, str(tmp_path), "fails"],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (starter.returncode, starter.stderr) == (2, "told to the terminal\n")
    assert list(tmp_path.iterdir()) == []


def test_only_root_becomes_another_user(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from amqptasks.worker.daemon import DaemonOptions, Launch\n"
        "from amqptasks.errors import ConfigError\n"
        "try:\n"
        "    Launch(DaemonOptions(uid='nobody'), 'w1@host').__enter__()\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
        "else:\n"
        "    print(os.getuid(), os.geteuid(), os.getgroups())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    nobody = pwd.getpwnam("nobody")
    became = f"{nobody.pw_uid} {nobody.pw_uid} [{nobody.pw_gid}]\n"
    assert done.stdout == (became if os.getuid() == 0 else "--uid, --gid: only root may become another user\n")


# -- the service manager ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_gets_datagrams(tmp_path: Path, abstract: bool) -> None:
    name = f"@amqptasks-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())})
        assert notifier.interval == 1.5
        notifier.ready("Consuming")
        notifier.alive()
        notifier.reloading()
        notifier.stopping("Bye")
        got = [manager.recv(4096).decode().split("\n") for _ in range(4)]
    assert got[0] == ["READY=1", "STATUS=Consuming", f"MAINPID={os.getpid()}"]
    assert got[1] == ["WATCHDOG=1"]
    assert got[2][0] == "RELOADING=1"
    assert abs(int(got[2][1].removeprefix("MONOTONIC_USEC=")) / 1e6 - time.monotonic()) < 60
    assert got[3] == ["STOPPING=1", "STATUS=Bye"]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": "3000000"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "soon"},
    ],
)
def test_nobody_watches_or_somebody_else_is_watched(environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    assert notifier.interval is None
    notifier.ready("a socket that is not there harms nothing")

"""An app that cannot be imported: one line that names the file and line, on every command; a finding of the doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
APP = "from amqptasks import AmqpTasks\napp = AmqpTasks('shop')\n"
BROKEN = {
    "raises": (f"{APP}\nraise RuntimeError('no\\n  database')\n", "RuntimeError: no database", 4),
    "no Python": (f"{APP}def broken(:\n", "SyntaxError: ", 3),
    "lacks a module": (f"{APP}import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'", 3),
    "ends": (f"{APP}import sys\nsys.exit('usage: shop')\n", "SystemExit: usage: shop", 4),
    "calls Python's wrongly": (f"{APP}import json\njson.loads('{{')\n", "JSONDecodeError: ", 4),
}


@pytest.fixture(params=list(BROKEN))
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, int]:
    """The folder of such an app, what is said of it, and the line."""
    text, said, line = BROKEN[request.param]
    (tmp_path / "shop.py").write_text(text)
    return tmp_path, said, line


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "amqptasks", "-b", "amqp://guest:guest@127.0.0.1:1/", *arguments],
        capture_output=True, text=True, timeout=60, check=False, cwd=folder, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["topology plan", "topology show", "routes test x", "beat", "worker -Q default"])
def test_a_broken_app_is_one_line_with_the_place(broken: tuple[Path, str, int], command: str) -> None:
    folder, said, line = broken
    done = _run(folder, "-A", "shop:app", *command.split())
    assert done.returncode == 2, done.stdout + done.stderr
    (error,) = done.stderr.splitlines()
    assert said in error
    assert f"({folder}/shop.py:{line})" in error


def test_the_traceback_is_shown_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(BROKEN["raises"][0])
    assert "raise RuntimeError" in _run(tmp_path, "-v", "-A", "shop:app", "topology", "show").stderr


def test_the_doctor_has_one_finding_of_it_and_looks_at_the_rest(broken: tuple[Path, str, int]) -> None:
    folder, said, line = broken
    done = _run(folder, "-A", "shop:app", "doctor", "--json")
    assert done.returncode == 1, done.stderr
    (found,) = [one for one in json.loads(done.stdout) if one["check"] == "application"]
    assert found["level"] == "error"
    assert said in found["what"]
    assert f"{folder}/shop.py:{line}" in found["what"]
    assert [one["level"] for one in json.loads(done.stdout) if one["check"] == "connection"] == ["error"]


def test_what_an_app_includes_and_an_app_that_the_file_names(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(APP.replace("'shop'", "'shop', include=['jobs']"))
    (tmp_path / "jobs.py").write_text("1 / 0\n")
    (tmp_path / "shop.yaml").write_text("app: shop:app\n")
    for named in (["-A", "shop:app"], ["--config", "shop.yaml"]):
        done = _run(tmp_path, *named, "topology", "show")
        assert done.returncode == 2, done.stderr
        assert f"ZeroDivisionError: division by zero ({tmp_path}/jobs.py:1)" in done.stderr
    # What stands in the code is left out where the code is not at hand.
    (tmp_path / "jobs.py").write_text("import no_such_module\n")
    done = _run(tmp_path, "--config", "shop.yaml", "topology", "show")
    assert done.returncode == 0
    assert done.stderr.startswith("Note: rate limits that stand in the code are left out")


@pytest.mark.parametrize(
    "command",
    ["list", "show 1", "replay --all", "purge --all -f", "export", "import letters.jsonl", "edit 1 --set args.0=1"],
)
def test_dead_letters_where_what_an_app_includes_is_broken(tmp_path: Path, command: str) -> None:
    (tmp_path / "shop.py").write_text(APP.replace("'shop'", "'shop', include=['jobs']"))
    (tmp_path / "jobs.py").write_text("1 / 0\n")
    (tmp_path / "shop.yaml").write_text("app: shop:app\n")
    (tmp_path / "letters.jsonl").touch()
    for named in (["-A", "shop:app"], ["--config", "shop.yaml"]):
        done = _run(tmp_path, *named, "dlq", *command.split())
        assert done.returncode == 2, done.stderr
        (error,) = done.stderr.splitlines()
        assert f"ZeroDivisionError: division by zero ({tmp_path}/jobs.py:1)" in error
    # Letters can be looked at where the code is not at hand, though not edited: that is checked against the task.
    (tmp_path / "jobs.py").write_text("import no_such_module\n")
    done = _run(tmp_path, "--config", "shop.yaml", "dlq", *command.split())
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("Note: the settings alone are looked at: ") != command.startswith("edit")

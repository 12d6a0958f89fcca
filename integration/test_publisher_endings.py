"""How programs that publish end, fork and are interrupted: what `delay()` returned for is there, and nobody hangs."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import pytest

from integration.conftest import Bench

Run = Callable[..., tuple[int, list[str], str]]

HEAD = """
import os, random, signal, sys, threading, time
from amqptasks import AmqpTasks
app = AmqpTasks("ending", config={config!r})

count = 0

def told(*ids):
    # One write: a line is whole, or not there at all.
    os.write(1, ("".join(one + "\\n" for one in ids)).encode())
    global count
    count += len(ids)

def until_told(least):
    end = time.monotonic() + 20
    while count < least and time.monotonic() < end:
        time.sleep(0.01)
"""


@pytest.fixture
def run(bench: Bench) -> Run:
    """Runs a program with an app; its exit code, the ids that it told of, and what it said on stderr."""
    bench.client().declare()

    def start(program: str, *, timeout: float = 30) -> tuple[int, list[str], str]:
        text = HEAD.format(config=str(bench.config)) + textwrap.dedent(program)
        command = [sys.executable, "-c", text]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        return done.returncode, done.stdout.split(), done.stderr

    return start


def waiting(bench: Bench) -> list[str]:
    return [one["properties"]["correlation_id"] for one in bench.vhost.management.messages("default", 100_000)]


@pytest.mark.fault
def test_what_was_confirmed_is_there_though_the_process_ends_at_once(bench: Bench, run: Run) -> None:
    code, ids, errors = run("told(app.send_task('shop.charge').id); os._exit(3)")
    assert (code, errors) == (3, "")
    assert waiting(bench) == ids


@pytest.mark.fault
def test_of_a_bulk_whose_process_ends_in_the_middle_what_was_told_is_there(bench: Bench, run: Run) -> None:
    code, ids, _ = run(
        """
        def bulk():
            while True:
                told(*(one.id for one in app.send_many([app.signature("shop.charge") for _ in range(40)])))

        threading.Thread(target=bulk, daemon=True).start()
        until_told(120)
        os._exit(0)
        """
    )
    assert code == 0
    assert len(ids) > 100
    assert set(ids) <= set(waiting(bench))


@pytest.mark.fault
@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)", "os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)"])
def test_an_interpreter_that_ends_while_threads_publish_neither_hangs_nor_complains(
    bench: Bench, run: Run, ending: str
) -> None:
    started = time.monotonic()
    code, ids, errors = run(
        f"""
        def publish():
            while True:
                told(app.send_task("shop.charge").id)

        for _ in range(4):
            threading.Thread(target=publish, daemon=True).start()
        until_told(60)
        {ending}
        """
    )
    assert code == (-signal.SIGTERM if "kill" in ending else 0)
    assert errors == ""
    assert time.monotonic() - started < 30
    assert len(ids) > 50
    assert set(ids) <= set(waiting(bench))


def test_a_thread_that_exits_after_its_call_takes_nothing_with_it(bench: Bench, run: Run) -> None:
    code, ids, errors = run(
        """
        def publish():
            told(app.send_task("shop.charge").id)
            sys.exit(5)

        threads = [threading.Thread(target=publish) for _ in range(8)]
        for one in threads: one.start()
        for one in threads: one.join()
        told(app.send_task("shop.charge").id)
        """
    )
    assert (code, errors) == (0, "")
    assert sorted(waiting(bench)) == sorted(ids)
    assert len(ids) == 9


@pytest.mark.parametrize("before", ["", "told(app.send_task('shop.charge').id)"], ids=["first call", "later call"])
def test_a_call_in_an_exit_handler_works_or_says_that_it_is_too_late(bench: Bench, run: Run, before: str) -> None:
    """`atexit` runs handlers last in, first out: the app's own closes the connection after those of its user."""
    code, ids, errors = run(
        f"""
        import atexit
        atexit.register(lambda: told(app.send_task("shop.charge").id))
        {before}
        """
    )
    assert (code, errors) == (0, "")
    assert sorted(waiting(bench)) == sorted(ids)
    assert len(ids) == (2 if before else 1)


@pytest.mark.fault
def test_forking_while_threads_publish_harms_neither_parent_nor_child(bench: Bench, run: Run) -> None:
    code, ids, errors = run(
        """
        stop = threading.Event()

        def publish():
            while not stop.is_set():
                told(app.send_task("shop.charge").id)

        threads = [threading.Thread(target=publish) for _ in range(4)]
        for one in threads: one.start()
        time.sleep(0.3)
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                for _ in range(3):
                    told(app.send_task("shop.charge").id)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        stop.set()
        for one in threads: one.join()
        """,
        timeout=60,
    )
    assert (code, errors) == (0, "")
    assert len(ids) > 100
    assert sorted(waiting(bench)) == sorted(ids)


def test_a_signal_handler_may_publish_while_its_thread_publishes(bench: Bench, run: Run) -> None:
    code, ids, errors = run(
        """
        dice = random.Random(7)
        told(app.send_task("shop.charge").id)

        def again():
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.0001, 0.003))

        def handler(number, frame):
            told(app.send_task("shop.charge").id)
            again()

        signal.signal(signal.SIGALRM, handler)
        again()
        end = time.monotonic() + 3
        while time.monotonic() < end or count < 150:
            told(app.send_task("shop.charge").id)
        signal.setitimer(signal.ITIMER_REAL, 0)
        """
    )
    assert (code, errors) == (0, "")
    assert len(ids) > 100
    assert sorted(waiting(bench)) == sorted(ids)


@pytest.mark.timing
def test_a_call_may_be_interrupted_by_another_at_each_of_its_instructions(bench: Bench, run: Run) -> None:
    """What a signal handler does at a random place is done here at every place, one after the other."""
    code, ids, errors = run(
        """
        told(app.send_task("shop.charge").id)
        seen = set()

        def trace(frame, event, argument):
            frame.f_trace_opcodes = True
            place = (frame.f_code, frame.f_lasti)
            if event == "opcode" and place not in seen and "importlib" not in frame.f_code.co_filename:
                seen.add(place)
                sys.settrace(None)
                started = time.monotonic()
                told(app.send_task("shop.charge").id)
                took = time.monotonic() - started
                assert took < 5, (took, frame.f_code, frame.f_lineno)
                sys.settrace(trace)
            return trace

        before = -1
        while len(seen) != before:
            before = len(seen)
            sys.settrace(trace)
            call = app.send_task("shop.charge")
            sys.settrace(None)
            told(call.id)
        print(len(seen), "places", file=sys.stderr)
        """,
        timeout=60,
    )
    assert code == 0, errors
    assert int(errors.split()[0]) > 500
    assert sorted(waiting(bench)) == sorted(ids)


def test_a_signal_handler_may_publish_while_the_first_call_connects(bench: Bench, run: Run) -> None:
    """Either it works, or it says why not."""
    program = """
    from amqptasks import PublishError

    def handler(number, frame):
        try:
            told(app.send_task("shop.charge").id)
        except PublishError as error:
            assert "signal handler" in str(error), error

    app.client  # reading the settings imports modules, which Python does not do twice at once
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, {delay})
    told(app.send_task("shop.charge").id)
    time.sleep({delay})
    """
    every = []
    for number in range(8):
        code, ids, errors = run(program.format(delay=0.0005 + number * 0.004))
        assert (code, errors) == (0, "")
        every += ids
    assert sorted(waiting(bench)) == sorted(every)

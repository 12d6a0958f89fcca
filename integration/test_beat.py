"""Beats: one leads, each tick is run once, and nothing is forgotten, whoever dies.

The ledger has a line for each run, with the entry's name and the moment that the tick was due.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

import psutil
import pytest

from amqptasks.beat.commands import command_envelope
from amqptasks.beat.state import Mark, State
from amqptasks.broker.inquiry import ask
from amqptasks.testing.ledger import PATH_VARIABLE
from amqptasks.testing.management import Management
from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.rabbitmq import PrivateNode
from amqptasks.testing.waiting import wait_until
from amqptasks.testing.workers import BeatProcess
from amqptasks.topology.permissions import permissions
from integration.conftest import ROOT, Bench, Broker, VirtualHost
from integration.strangers import strange_channel

QUEUE = "amqptasks.beat"
#: Seconds within which another beat leads.
FAIL_OVER = 10.0
TICK = "integration.apps.jobs.tick"


class Beats(Bench):
    """The bench with beats."""

    def __init__(self, vhost: VirtualHost, folder: Path) -> None:
        super().__init__(vhost, folder)
        self.beats: list[BeatProcess] = []
        self.environment = {PATH_VARIABLE: str(self.ledger.path), "PYTHONPATH": str(ROOT)}

    def schedule(self, **entries: dict[str, Any]) -> None:
        self.settings["schedule"] = {name.replace("_", "-"): {"task": TICK, **one} for name, one in entries.items()}

    def beat(self, *options: str, url: str | None = None, ready: bool = True) -> BeatProcess:
        made = BeatProcess(
            self.APP,
            *options,
            config=self.config,
            log=self.folder / f"beat-{len(self.beats)}.log",
            environment=self.environment,
            global_options=["-b", url] if url is not None else [],
        )
        self.beats.append(made)
        return made.wait_ready() if ready else made

    def remember(self, state: State) -> None:
        """Have the broker hold this state, as beats that ran before would have left it."""
        self.client().declare()
        with strange_channel(self.vhost.url) as channel:
            channel.basic_publish("", QUEUE, state.to_bytes())

    def leader(self, timeout: float = 15.0) -> BeatProcess:
        """The beat that leads, by what the broker says of its consumers."""

        def look() -> BeatProcess | None:
            pid = self._active_pid()
            return next((one for one in self.beats if one.process.pid == pid and one.process.poll() is None), None)

        found = wait_until(look, timeout, "a beat leads", pause=0.05)
        assert found is not None
        return found

    def _active_pid(self) -> int | None:
        request = self.vhost.management.request
        for one in request("GET", f"queues/{quote(self.vhost.name, safe='')}/{QUEUE}").get("consumer_details", []):
            # Details come with statistics, a moment after the consumer.
            if one["active"] and one["channel_details"]:
                found = request("GET", f"connections/{quote(one['channel_details']['connection_name'])}")
                return int(found["client_properties"]["connection_name"].rpartition("/")[2])
        return None

    def ticks(self, entry: str) -> list[tuple[datetime, float, str]]:
        """Due moment, run moment and task id of each run of an entry, by due moment."""
        found = []
        for line in self.ledger.entries():
            name, _, due = line.event.partition("@")
            if name == entry:
                found.append((datetime.fromisoformat(due), line.at, line.task_id))
        return sorted(found)

    def wait_ticks(self, entry: str, count: int, timeout: float = 30.0) -> list[tuple[datetime, float, str]]:
        def logs() -> str:
            return "\n".join(one.log[-3000:] for one in (*self.beats, *self._workers))

        return wait_until(
            lambda: found if len(found := self.ticks(entry)) >= count else None,
            timeout,
            lambda: f"{count} ticks of {entry}, not {len(self.ticks(entry))}\n{logs()}",
            pause=0.05,
        )

    def command(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "amqptasks", "--config", str(self.config), "schedule", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def close(self) -> None:
        for one in self.beats:
            one.kill()
        super().close()


@pytest.fixture
def beats(vhost: VirtualHost, tmp_path: Path) -> Iterator[Beats]:
    made = Beats(vhost, tmp_path)
    yield made
    made.close()


def quiet_period() -> int:
    """Seconds near an hour of which no multiple is due now: a tick while the test runs would be one too many."""
    now = time.time()
    return next(one for one in range(3600, 4200, 60) if 60 < now % one < one - 120)


def assert_each_once(ticks: list[tuple[datetime, float, str]]) -> None:
    runs = Counter(due for due, _, _ in ticks)
    assert [due for due, count in runs.items() if count > 1] == []
    assert len({task_id for _, _, task_id in ticks}) == len(ticks)


def test_a_beat_sends_ticks_on_time_and_ends_with_0(beats: Beats) -> None:
    beats.schedule(every_second={"every": 1, "args": [1]})
    beats.worker()
    beat = beats.beat()
    ticks = beats.wait_ticks("every-second", 3)
    assert beat.stop() == 0
    assert_each_once(ticks)
    assert all(due.microsecond == 0 for due, _, _ in ticks)
    assert all(0 <= at - due.timestamp() < 10 for due, at, _ in ticks)
    assert [b[0] - a[0] for a, b in itertools.pairwise(ticks)] == [timedelta(seconds=1)] * (len(ticks) - 1)


@pytest.mark.fault
@pytest.mark.timeout(180)
def test_leaders_that_are_killed_repeat_no_tick_and_miss_none(beats: Beats, capsys: pytest.CaptureFixture[str]) -> None:
    # So many ticks that many a leader dies while one is on its way.
    steps = {"second": 1.0, "blink": 0.05}
    beats.schedule(second={"every": 1, "catch_up": "all"}, blink={"every": 0.05, "catch_up": "skip"})
    beats.worker("default", "-c", "2")
    for _ in range(3):
        beats.beat()
    beats.wait_ticks("second", 2)
    begun, pauses = time.time(), []
    for kill in range(10):
        leader = beats.leader()
        # At another moment of the second each time, and half of them when the second's tick is due.
        time.sleep((2 - time.time() % 1 + (kill / 10 if kill % 2 else 0.001 * kill)) % 1 + 0.2)
        leader.process.kill()
        killed, count = time.time(), len(beats.ticks("blink"))
        beats.wait_ticks("blink", count + 5)
        pauses.append(time.time() - killed)
        beats.beat(ready=False)
    assert sum(one.log.count("The broker holds no state") for one in beats.beats) == 1
    end = datetime.fromtimestamp(time.time() + 1, UTC)
    wait_until(lambda: all(beats.ticks(one)[-1][0] > end for one in steps), 20, "the schedule goes on")
    for entry, step in steps.items():
        ticks = beats.ticks(entry)
        assert_each_once(ticks)
        assert [a for (a, *_), (b, *_) in itertools.pairwise(ticks) if (b - a).total_seconds() > step + 0.001] == []
    late = max(at - due.timestamp() for due, at, _ in beats.ticks("second"))
    with capsys.disabled():
        print(
            f"\nbeat: 10 leaders killed in {time.time() - begun:.0f} s, {len(beats.ledger.entries())} ticks: 0 twice, "
            f"0 missing; ticks went on within {max(pauses):.2f} s, the latest was {late:.2f} s late"
        )
    assert max(pauses) < FAIL_OVER


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_five_minutes_of_a_schedule_whose_leaders_are_killed_miss_nothing(
    beats: Beats, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three beats, a schedule of one second, 300 s, ten leaders killed: each tick once, and no long pause."""
    beats.schedule(second={"every": 1, "catch_up": "all"})
    beats.worker("default", "-c", "2")
    for _ in range(3):
        beats.beat()
    begun = beats.wait_ticks("second", 1)[0][0]
    for kill in range(10):
        wait_until(lambda least=28 * (kill + 1): len(beats.ticks("second")) >= least, 90, "ticks go on", pause=0.1)
        leader = beats.leader()
        time.sleep(kill / 10)  # at another moment of the second each time
        leader.process.kill()
        beats.beat(ready=False)
    end = begun + timedelta(seconds=299)
    ticks = wait_until(
        lambda: found if (found := beats.ticks("second")) and found[-1][0] >= end else None, 120, "300 ticks", pause=0.2
    )
    dues = [due for due, _, _ in ticks]
    missed = [a for a, b in itertools.pairwise(sorted(set(dues))) if b - a != timedelta(seconds=1)]
    ran = sorted(at for _, at, _ in ticks)
    pause = max(b - a for a, b in itertools.pairwise(ran))
    with capsys.disabled():
        print(
            f"\nbeat: {len(dues)} ticks in {ran[-1] - ran[0]:.0f} s, 10 leaders killed: longest pause {pause:.2f} s, "
            f"repeated {len(dues) - len(set(dues))}, missed {len(missed)}"
        )
    assert_each_once(ticks)
    assert missed == []
    assert pause < FAIL_OVER


@pytest.mark.fault
def test_a_leader_that_was_stopped_cannot_send_when_it_goes_on(
    beats: Beats, capsys: pytest.CaptureFixture[str]
) -> None:
    beats.schedule(second={"every": 1, "catch_up": "all"}, blink={"every": 0.1})
    beats.worker("default", "-c", "2")
    for _ in range(2):
        beats.beat()
    beats.wait_ticks("blink", 5)
    stopped = beats.leader()
    stopped.process.send_signal(signal.SIGSTOP)
    since, count = time.time(), len(beats.ticks("blink"))
    beats.wait_ticks("blink", count + 10, timeout=20)
    pause = time.time() - since
    time.sleep(2)
    stopped.process.send_signal(signal.SIGCONT)
    # It believes for a moment that it leads; its ticks of this time go nowhere.
    wait_until(lambda: "Leading no more" in stopped.log, 10, lambda: f"it notices:\n{stopped.log}")
    beats.wait_ticks("second", len(beats.ticks("second")) + 3)
    assert beats.leader() is not stopped
    for entry in ("second", "blink"):
        assert_each_once(beats.ticks(entry))
    gaps = [b - a for (a, *_), (b, *_) in itertools.pairwise(beats.ticks("second"))]
    assert set(gaps) == {timedelta(seconds=1)}
    with capsys.disabled():
        print(f"\nbeat: a leader stopped; another's ticks came after {pause:.1f} s, none twice when it went on")
    assert pause < FAIL_OVER + 1


@pytest.mark.fault
def test_a_broker_that_stops_or_is_killed_keeps_the_schedule(node: PrivateNode, tmp_path: Path) -> None:
    vhost = VirtualHost("/", node.url, Management(node.management_url), Broker("own", node.url, node.management_url))
    beats = Beats(vhost, tmp_path)
    try:
        beats.schedule(second={"every": 1, "catch_up": "all"}, once={"every": 1, "catch_up": "one"})
        beats.worker("default", "-c", "1")
        for _ in range(2):
            beats.beat()
        beats.wait_ticks("second", 3)
        for end, twice in ((node.stop, 0), (node.kill, 2)):
            end()
            node.start()
            after = datetime.now(UTC)
            wait_until(lambda moment=after: beats.ticks("second")[-1][0] > moment, 60, "ticks go on", pause=0.2)
            for entry in ("second", "once"):
                runs = beats.ticks(entry)
                dues = sorted({due for due, _, _ in runs})
                assert len({task_id for _, _, task_id in runs}) == len(dues)
                # A broker that is killed in the middle of a commit, or of an ack of a task, may have a message twice.
                assert len(runs) - len(dues) <= twice
            # What was due meanwhile was sent afterwards, by whichever beat.
            dues = sorted({due for due, _, _ in beats.ticks("second")})
            assert {b - a for a, b in itertools.pairwise(dues)} == {timedelta(seconds=1)}
        assert [one.stop() for one in beats.beats] == [0, 0]
        assert sum(one.log.count("The broker holds no state") for one in beats.beats) == 1
    finally:
        beats.close()


def _trouble(
    beats: Beats, node: PrivateNode, proxies: dict[BeatProcess, TcpProxy], another: Callable[[], None], begun: float
) -> tuple[float, float]:
    """All that happens to them in five minutes. Returns from when to when the broker was away."""

    def until(second: float) -> None:
        time.sleep(max(0.0, begun + second - time.time()))

    def kill_leader() -> None:
        beats.leader(60).kill()
        another()

    for second in (7.5, 17.5):
        until(second)
        kill_leader()
    until(30)
    stopped = beats.leader()
    stopped.process.send_signal(signal.SIGSTOP)
    until(90)
    stopped.process.send_signal(signal.SIGCONT)
    until(100)
    proxies[beats.leader()].stall()
    until(125)
    for proxy in proxies.values():
        proxy.resume()
    until(142.5)  # between two ticks
    away = time.time()
    node.stop()
    time.sleep(25)
    node.start()
    back = time.time()
    for second in (210, 252):
        until(second)
        kill_leader()
    until(300)
    return away, back


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_minutes_of_beats_that_are_killed_stopped_cut_off_and_left_by_their_broker(
    node: PrivateNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three beats, a call every 5 s: each tick once, none missing, and what each `catch_up` promises."""
    vhost = VirtualHost("/", node.url, Management(node.management_url), Broker("own", node.url, node.management_url))
    beats, step = Beats(vhost, tmp_path), 5
    with contextlib.ExitStack() as stack:
        stack.callback(beats.close)
        beats.schedule(**{one: {"every": step, "catch_up": one} for one in ("all", "one", "skip")})
        beats.worker("default", "-c", "2")
        proxies: dict[BeatProcess, TcpProxy] = {}

        def another() -> None:
            proxy = stack.enter_context(TcpProxy("127.0.0.1", node.port))
            url = node.url.replace(f":{node.port}/", f":{proxy.port}/")
            proxies[beats.beat(url=url)] = proxy

        for _ in range(3):
            another()
        begun = beats.wait_ticks("all", 1)[0][0].timestamp()

        absences = [_trouble(beats, node, proxies, another, begun + 300 * half) for half in range(2)]
        ticks = {one: beats.ticks(one) for one in ("all", "one", "skip")}
        due = {one: [moment.timestamp() for moment, _, _ in found] for one, found in ticks.items()}
        ran = sorted(at for _, at, _ in ticks["all"])
        without = [(away, min(at for at in ran if at > back)) for away, back in absences]
        pauses = [b - a for a, b in itertools.pairwise(ran) if b not in [resumed for _, resumed in without]]
        left_out = {one: set(due["all"]) - set(due[one]) for one in ("one", "skip")}
        with capsys.disabled():
            print(
                f"\nbeat: {len(due['all'])} ticks in 600 s, 8 leaders killed, 2 stopped, 2 cut off, 2 broker restarts; "
                f"the longest pause but for the broker's {max(pauses):.1f} s; "
                f"left out: {', '.join(f'{len(found)} with {one}' for one, found in left_out.items())}"
            )
        for found in ticks.values():
            assert_each_once(found)
        assert len(due["all"]) >= 600 // step
        assert {b - a for a, b in itertools.pairwise(due["all"])} == {float(step)}
        assert max(pauses) < FAIL_OVER + step
        # Only the broker's absences were longer than a change of leaders: there the two others left ticks out.
        for missing in left_out.values():
            for away, resumed in without:
                assert [moment for moment in missing if away - 1 < moment < resumed]
            assert all(any(away - 1 < moment < resumed for away, resumed in without) for moment in missing)
        assert set(due["skip"]) <= set(due["one"])
        assert [one.stop() for one in beats.beats if one.process.poll() is None] == [0, 0, 0]


def test_what_was_missed_is_skipped_or_run_once_or_run_entirely(beats: Beats) -> None:
    every = quiet_period()
    entries: dict[str, dict[str, Any]] = {one: {"every": every, "catch_up": one} for one in ("skip", "one", "all")}
    beats.schedule(**entries, changed={"every": every, "catch_up": "all"}, fresh={"every": every, "catch_up": "all"})
    period = timedelta(seconds=every)
    last = datetime.fromtimestamp(time.time() // every * every, UTC)
    ago = last - 3 * period + timedelta(minutes=1)
    state = State.new(ago)
    state.serial = 7
    state.marks = {one: Mark(ago, f"every {every} s") for one in entries} | {"changed": Mark(ago, "every 60 s")}
    beats.remember(state)
    beats.worker()
    first = beats.beat()
    beats.wait_ticks("all", 3)
    assert first.stop() == 0
    # Another beat knows what was sent.
    beats.beat()
    second = json.loads(beats.command("list", "--json"))
    time.sleep(1)
    assert [due for due, _, _ in beats.ticks("all")] == [last - periods * period for periods in (2, 1, 0)]
    assert [due for due, _, _ in beats.ticks("one")] == [last]
    assert [task_id for _, _, task_id in beats.ticks("one")] == [state.task_id("one", last)]
    for entry in ("skip", "changed", "fresh"):
        assert beats.ticks(entry) == []
    ran = {one["name"]: one["last_run"] for one in second["entries"]}
    assert ran == {"all": last.isoformat(), "one": last.isoformat(), "skip": None, "changed": None, "fresh": None}


def test_a_beat_whose_clock_was_ahead_says_so_and_goes_on_by_command(beats: Beats) -> None:
    beats.schedule(waits={"every": 1}, other={"every": 1})
    ahead = datetime.now(UTC) + timedelta(hours=2)
    state = State.new(ahead)
    state.marks = {"waits": Mark(ahead, "every 1 s"), "other": Mark(ahead, "every 1 s")}
    beats.remember(state)
    beats.worker()
    beat = beats.beat()
    wait_until(lambda: "Served up to a moment that is to come" in beat.log, 10, lambda: beat.log)
    (row, _) = json.loads(beats.command("list", "--json"))["entries"]
    assert datetime.fromisoformat(row["next"][0]) > ahead
    beats.command("resume", "waits")
    assert_each_once(beats.wait_ticks("waits", 3))
    assert beats.ticks("other") == []
    assert beat.log.count("Served up to a moment that is to come") == 1
    assert beat.stop() == 0


def test_of_two_states_the_newest_counts_and_one_that_is_not_known_is_left_alone(beats: Beats) -> None:
    every = quiet_period()
    beats.schedule(hour={"every": every, "catch_up": "all"})
    ago = datetime.now(UTC) - timedelta(hours=3)
    newest = State.new(ago)
    newest.marks = {"hour": Mark(datetime.now(UTC), f"every {every} s")}
    for serial in (5, 7, 6):
        newest.serial = serial
        if serial != 7:
            beats.remember(State(newest.lineage, ago, serial, set(), {"hour": Mark(ago, f"every {every} s")}))
        else:
            beats.remember(newest)
    beats.worker()
    beat = beats.beat()
    table = json.loads(beats.command("list", "--json"))
    assert [one["last_run"] for one in table["entries"]] == [None]
    assert beat.stop() == 0
    wait_until(lambda: beats.vhost.management.counts(QUEUE) == (1, 0), 10, "one state is left", pause=0.1)
    assert beats.ledger.entries() == []

    table = json.loads(newest.to_bytes())
    table["state"] |= {"version": 99, "serial": 1000}
    with strange_channel(beats.vhost.url) as channel:
        channel.basic_publish("", QUEUE, json.dumps(table).encode())
    old = beats.beat(ready=False)
    assert old.wait(20) == 1
    assert "has version 99, and this beat knows 1" in old.log
    wait_until(lambda: beats.vhost.management.counts(QUEUE)[0] >= 2, 10, "both are left", pause=0.1)


@pytest.mark.timing
def test_entries_are_paused_resumed_and_run_by_command(beats: Beats) -> None:
    beats.schedule(
        blink={"every": 0.2},
        dawn={"cron": "30 2 * * *", "timezone": "America/New_York", "args": [1], "options": {"priority": 3}},
        off={"every": 1, "enabled": False},
    )
    beats.worker()
    beats.beat()
    second = beats.beat()
    beats.wait_ticks("blink", 2)
    begun = time.time()
    table = json.loads(beats.command("list", "--json"))
    assert time.time() - begun < 5  # a process that starts, and an answer
    found = {one["name"]: one for one in table["entries"]}
    assert list(found) == ["blink", "dawn", "off"]
    dues = [datetime.fromisoformat(one).astimezone(ZoneInfo("America/New_York")) for one in found["dawn"]["next"]]
    assert len(dues) == 5
    assert found["dawn"]["schedule"] == "30 2 * * *"
    assert all((due.minute, due.hour) == (30, 2) for due in dues if due.dst() == dues[0].dst())
    assert found["off"]["next"] == []
    assert not found["off"]["enabled"]

    assert beats.command("pause", "blink") == "blink is paused.\n"
    count = len(beats.ticks("blink"))
    shown = beats.command("list")
    assert "paused" in shown
    assert re.search(r"dawn +30 2 \* \* \* \(America/New_York\) .*:\d\d:00 E[SD]T", shown)
    leader = beats.leader()
    leader.kill()  # the next one keeps to it
    other = second if leader is not second else beats.beats[0]
    wait_until(lambda: beats.leader() is other, 10, "the other leads")
    time.sleep(0.5)
    assert len(beats.ticks("blink")) <= count + 1
    assert beats.command("pause", "blink") == "blink was paused already.\n"
    paused_until = datetime.now(UTC)
    assert beats.command("resume", "blink") == "blink is resumed.\n"
    beats.wait_ticks("blink", count + 4)
    resumed = [due for due, _, _ in beats.ticks("blink")][count + 1 :]
    assert all(due >= paused_until - timedelta(seconds=0.2) for due in resumed)

    ids = {beats.command("run", one).strip() for one in ("dawn", "off", "dawn")}
    wait_until(lambda: ids <= _ids(beats), 10, "they run")
    assert len(ids) == 3
    assert "did you mean 'dawn'" in beats.command("run", "down", code=1)


def _ids(beats: Beats) -> set[str]:
    return {line.task_id for line in beats.ledger.entries()}


def test_a_command_without_a_beat_says_so_and_does_nothing_later(beats: Beats) -> None:
    beats.schedule(rare={"every": 8_640_000})
    beats.client().declare()
    error = beats.command("run", "rare", "--timeout", "0.5", code=1)
    assert error.startswith("Error: no beat has answered within 0.5 s")
    assert "Traceback" not in error
    beats.worker()
    beats.beat()
    assert json.loads(beats.command("list", "--json"))["entries"][0]["last_run"] is None
    assert beats.ledger.entries() == []


@pytest.mark.timeout(240)
def test_entries_are_added_changed_and_removed_by_command_and_outlive_every_beat(beats: Beats) -> None:
    beats.schedule(rare={"every": 8_640_000})
    beats.worker()
    first = beats.beat()
    asked = time.time()
    assert beats.command("add", "blink", "--task", TICK, "--every", "0.2s", "--args", "[1]").startswith(
        "blink is added: every 0.2 s; next "
    )
    begun = beats.wait_ticks("blink", 3)
    assert begun[2][1] < asked + 15
    assert all(due.timestamp() > asked - 0.5 for due, _, _ in begun)
    # The only beat is killed; a new one takes the entry from the broker, and no tick is sent twice, or left out.
    first.kill()
    second = beats.beat()
    beats.wait_ticks("blink", len(beats.ticks("blink")) + 5)
    ticks = beats.ticks("blink")
    assert_each_once(ticks)
    assert {b - a for (a, *_), (b, *_) in itertools.pairwise(ticks)} == {timedelta(seconds=0.2)}
    listed = {one["name"]: one for one in json.loads(beats.command("list", "--json"))["entries"]}
    assert [(name, one["added"]) for name, one in listed.items()] == [("blink", True), ("rare", False)]
    assert "blink (added)" in beats.command("list")

    changed = beats.command("add", "blink", "--task", TICK, "--cron", "0 3 * * *", "--timezone", "Asia/Shanghai")
    assert changed.startswith("blink is changed, from every 0.2 s: 0 3 * * *; next ")
    assert " 03:00:00 CST" in changed
    time.sleep(0.5)
    beats.vhost.wait_settled("default")
    count = len(beats.ticks("blink"))
    time.sleep(1)
    assert len(beats.ticks("blink")) == count  # no surprise run
    assert beats.command("remove", "blink") == "blink is removed.\n"
    assert second.stop() == 0
    beats.beat()
    assert [one["name"] for one in json.loads(beats.command("list", "--json"))["entries"]] == ["rare"]


@pytest.mark.timeout(240)
def test_what_cannot_be_added_or_removed_is_told_at_once(beats: Beats) -> None:
    beats.schedule(hour={"every": 3600})
    add = ("--task", TICK, "--every", "30s")
    bad_cron = beats.command("add", "one", "--task", TICK, "--crontab", "61 * * * *", code=2)  # no beat runs yet
    assert bad_cron.startswith("Error: schedule 'one': cron: '61 * * * *' is not a crontab")
    beats.beat()
    for code, arguments, sentence in (
        (1, ("hour", *add), "entry 'hour' stands in the settings or the code of the beat: change it there"),
        (1, ("one", *add, "--queue", "nowhere"), "schedule 'one': queue 'nowhere' is not declared; queues: default"),
        (2, ("one", *add, "--cron", "* * * * *"), "a schedule has `cron` or `every`; this one has both"),
        (2, ("one", "--task", TICK, "--cron", "* * * * *", "--timezone", "Mars/Base"), "'Mars/Base' is no time zone"),
        (1, ("one", "--task", "integration.apps.jobs.add", "--every", "1h", "--args", '["x", 2]'), "schedule 'one': "),
    ):
        error = beats.command("add", *arguments, code=code)
        assert sentence in error
        assert "Traceback" not in error
    assert beats.command("remove", "hour", code=1).startswith(
        "Error: entry 'hour' stands in the settings or the code of the beat: remove it there"
    )
    assert "there is no entry 'two'" in beats.command("remove", "two", code=1)
    assert [one["name"] for one in json.loads(beats.command("list", "--json"))["entries"]] == ["hour"]
    large = json.dumps(["y" * 120_000])
    for name in ("large-1", "large-2"):
        beats.command("add", name, *add, "--args", large)
    assert "262144 is what is kept in the broker" in beats.command("add", "large-3", *add, "--args", large, code=1)
    # A task that the beat does not know may be known to the workers.
    done = beats.command("add", "stranger", "--task", "shop.stranger", "--every", "1h", "--json")
    assert json.loads(done)["warning"].startswith("no task 'shop.stranger' is known to the beat")


@pytest.mark.timeout(240)
def test_where_messages_are_signed_an_added_entry_is_too(beats: Beats) -> None:
    """A beat signs what it sends: it must not sign for whoever can write to its queue."""
    old, new = "old-secret-" * 4, "new-secret-" * 4
    add = ("--task", TICK, "--every", "0.5")
    beats.settings["security"] = {"signing_key": old}
    worker = beats.worker()
    first = beats.beat()
    beats.command("add", "ours", *add)
    beats.wait_ticks("ours", 2)
    beats.settings["security"] = {}
    assert "is not signed" in beats.command("add", "forged", *add, code=1)
    beats.settings["security"] = {"signing_key": new}
    assert "signed with key" in beats.command("add", "forged", *add, code=1)
    # Nor does a state that somebody writes into the queue have it sign.
    assert first.stop() == 0
    forged = State.new(datetime.now(UTC))
    forged.serial = 1_000_000
    forged.added = {"forged": {"entry": {"task": TICK, "every": 0.5}, "signed": {}}}
    beats.remember(forged)
    beats.settings["security"] = {"signing_key": old}
    second = beats.beat()
    wait_until(lambda: "is not signed" in second.log, 10, lambda: second.log)
    beats.command("add", "ours", *add)
    # Another key: the beat signs what it keeps anew, so that the old one can go.
    assert (second.stop(), worker.stop()) == (0, 0)
    beats.settings["security"] = {"signing_key": new, "verification_keys": [old]}
    assert beats.beat().stop() == 0
    beats.settings["security"] = {"signing_key": new}
    beats.worker()
    beats.beat()
    beats.wait_ticks("ours", len(beats.ticks("ours")) + 2)
    assert beats.ticks("forged") == []


def test_sighup_takes_up_the_edited_schedule_and_a_bad_edit_changes_nothing(beats: Beats) -> None:
    beats.schedule(blink={"every": 0.2}, gone={"every": 0.2})
    beats.worker()
    beats.beat()
    other = beats.beat()
    beats.wait_ticks("gone", 2)
    good = beats.settings["schedule"]
    beats.settings["schedule"] = {"blink": {"task": TICK, "cron": "99 * * * *"}}
    _ = beats.config
    for one in beats.beats:
        one.process.send_signal(signal.SIGHUP)
    wait_until(lambda: all("going on with the schedule as it was" in one.log for one in beats.beats), 10, "refused")
    assert "schedule.blink.cron" in other.log
    count = len(beats.ticks("gone"))
    beats.wait_ticks("gone", count + 3)

    beats.settings["schedule"] = {"blink": good["blink"] | {"args": [7]}, "fresh": {"task": TICK, "every": 0.5}}
    _ = beats.config
    edited = time.time()
    for one in beats.beats:
        one.process.send_signal(signal.SIGHUP)
    fresh = beats.wait_ticks("fresh", 1)
    assert fresh[0][1] < edited + 5
    assert fresh[0][0].timestamp() > edited - 0.5
    taken = "SIGHUP: going on with the schedule as it is in the settings now"
    wait_until(lambda: all(taken in one.log for one in beats.beats), 10, "both have taken it up")
    time.sleep(1)
    count = len(beats.ticks("gone"))
    leader = beats.leader()
    leader.process.kill()  # the other has taken it up too
    beats.wait_ticks("fresh", len(beats.ticks("fresh")) + 3)
    assert len(beats.ticks("gone")) == count
    for entry, step in (("blink", 0.2), ("fresh", 0.5)):
        ticks = beats.ticks(entry)
        assert_each_once(ticks)
        assert {b - a for (a, *_), (b, *_) in itertools.pairwise(ticks)} == {timedelta(seconds=step)}


@pytest.mark.timeout(180)
def test_edits_a_second_before_a_tick_at_it_and_after_it_count_within_five_seconds(beats: Beats) -> None:
    """By SIGHUP, while beats run: entries are switched off and on, renamed, deleted, and have other arguments."""
    steady, step = {"task": TICK, "every": 5, "catch_up": "all"}, 5
    one = {"kept": steady, "switched": steady, "gone": steady, "old": steady}
    other = {"kept": steady | {"args": [1]}, "switched": steady | {"enabled": False}, "new": steady}
    beats.settings["schedule"] = one
    beats.worker("default", "-c", "2")
    for _ in range(2):
        beats.beat()
    beats.wait_ticks("kept", 1)
    told = "SIGHUP: going on with the schedule as it is in the settings now"
    #: From when on which entries are there: between the signal and the line of log either may have been served.
    spans: list[tuple[float, float, dict[str, Any]]] = []
    for turn, moment in enumerate((-1.0, 0.0, 1.0)):
        wanted = beats.settings["schedule"] = (other, one)[turn % 2]
        _ = beats.config
        time.sleep((moment - time.time()) % step)
        asked = time.time()
        for beat in beats.beats:
            beat.process.send_signal(signal.SIGHUP)
        wait_until(lambda times=turn + 1: all(beat.log.count(told) == times for beat in beats.beats), 10, "taken up")
        spans.append((asked, time.time(), wanted))
        assert spans[-1][1] < asked + 5
        tick = asked - asked % step + 2 * step  # not the one that may be due just now, but the next
        name = "new" if wanted is other else "old"
        wait_until(
            lambda name=name, tick=tick: any(due.timestamp() >= tick for due, _, _ in beats.ticks(name)),
            20,
            f"the next tick of {name}",
            pause=0.1,
        )
    begun, end = spans[0][0], time.time() - 1
    for entry in {*one, *other}:
        ticks = beats.ticks(entry)
        assert_each_once(ticks)
        assert all(at - due.timestamp() < step for due, at, _ in ticks), "no tick is made up for"
        dues = {due.timestamp() for due, _, _ in ticks}
        for due in range(int(begun // step * step + step), int(end // step * step), step):
            before = [wanted for asked, _, wanted in spans if asked < due][-1:]
            certain = not any(asked <= due <= taken for asked, taken, _ in spans)
            if certain and before:
                expected = entry in before[0] and before[0][entry].get("enabled", True)
                assert (due in dues) == expected, (entry, due, spans)


def test_sighup_of_a_worker_takes_up_the_schedule_of_its_beat(beats: Beats) -> None:
    beats.schedule(gone={"every": 0.5})
    worker = beats.worker("default", "-B", "-c", "1")
    beats.wait_ticks("gone", 2)
    beats.command("add", "added", "--task", TICK, "--every", "0.5")
    beats.settings["schedule"] = {"fresh": {"task": TICK, "every": 0.5}}
    _ = beats.config
    worker.process.send_signal(signal.SIGHUP)
    beats.wait_ticks("fresh", 3)
    count = len(beats.ticks("gone"))
    beats.wait_ticks("added", len(beats.ticks("added")) + 3)
    assert len(beats.ticks("gone")) == count
    for entry in ("fresh", "added"):
        assert_each_once(beats.ticks(entry))
    assert worker.stop() == 0


@pytest.mark.timing
def test_a_beat_answers_within_a_second(beats: Beats, capsys: pytest.CaptureFixture[str]) -> None:
    beats.schedule(**{f"e{number}": {"every": 1} for number in range(100)})
    beats.worker()
    beats.beat()
    beats.wait_ticks("e0", 2)
    broker = beats.client().settings.broker
    needed = []
    for verb, name in (("list", None), ("pause", "e1"), ("resume", "e1"), ("run", "e2")) * 3:
        envelope = command_envelope("amqptasks", verb, name, seconds=5)
        begun = time.perf_counter()
        assert ask(broker, envelope, prefix="amqptasks", seconds=5) is not None
        needed.append(time.perf_counter() - begun)
    with capsys.disabled():
        print(f"\nbeat: a command and its answer need {statistics.median(needed):.2f} s, {max(needed):.2f} s at most")
    # One may fall into a busy moment of the machine.
    assert sorted(needed)[-2] < 1


def test_a_worker_is_a_beat_too_and_replaces_it_when_it_dies(beats: Beats) -> None:
    beats.schedule(blink={"every": 0.2})
    worker = beats.worker("default", "-B", "-c", "1")
    beats.wait_ticks("blink", 2)
    beat = worker.helper("beat")
    assert beat is not None
    beat.kill()
    count = len(beats.ticks("blink"))
    beats.wait_ticks("blink", count + 3)
    assert_each_once(beats.ticks("blink"))
    assert worker.stop() == 0
    assert not psutil.pid_exists(beat.pid)


def test_ticks_wait_for_room_in_a_full_queue_and_are_kept_where_none_takes_them(beats: Beats) -> None:
    beats.settings["queues"] |= {"narrow": {"max_length": 2}, "gone": {}}
    beats.settings["exchanges"] = {"news": {"type": "headers"}}
    beats.schedule(
        narrow={"every": 0.2, "options": {"queue": "narrow"}},
        gone={"every": 1, "options": {"queue": "gone"}},
        nobody={"every": 1, "options": {"exchange": "news"}},
    )
    beats.beat()
    management = beats.vhost.management
    wait_until(lambda: management.counts("gone")[0] > 0, 10, "ticks come")
    management.delete_queue("gone")
    wait_until(lambda: _unroutable(beats) >= {"gone", "nobody"}, 15, lambda: f"kept: {_unroutable(beats)}", pause=0.3)
    # Counted neither as ready nor as unacknowledged: the broker tries to hand them over.
    due = "amqptasks.due.narrow"
    wait_until(lambda: management.queue(due).get("messages", 0) > 10, 10, "ticks wait beside a full queue", pause=0.2)
    assert management.counts("narrow")[0] <= 4  # a quorum queue's limit is not sharp
    assert "Leading no more" not in beats.beats[0].log


def _unroutable(beats: Beats) -> set[str]:
    found = beats.vhost.management.messages("amqptasks.unroutable")
    return {one["properties"]["headers"]["periodic_task_name"] for one in found}


def test_an_entry_that_the_broker_refuses_does_not_hold_up_the_others(
    beats: Beats, restricted_user: Callable[[str, str, str], str]
) -> None:
    beats.settings["exchanges"] = {"secret": {"type": "headers"}}
    beats.schedule(
        refused={"every": 1, "options": {"exchange": "secret"}},
        refused_too={"every": 1, "options": {"exchange": "secret"}},
        second={"every": 1, "catch_up": "all"},
    )
    beats.client().declare()
    beats.worker()
    beat = beats.beat(url=restricted_user("^$", r"^(amqptasks(\..+)?|amq\.default)$", "^amqptasks.beat$"))
    # They are due together, and the broker does not say which of them it means: they go one by one, and then wait.
    wait_until(lambda: beat.log.count("The broker refuses a tick") >= 3, 30, lambda: beat.log)
    ticks = beats.wait_ticks("second", len(beats.ticks("second")) + 3)
    assert_each_once(ticks)
    assert {b - a for (a, *_), (b, *_) in itertools.pairwise(ticks)} == {timedelta(seconds=1)}
    assert "ACCESS_REFUSED" in beat.log


def test_a_beat_works_with_the_permissions_of_its_role(
    beats: Beats, restricted_user: Callable[[str, str, str], str]
) -> None:
    beats.schedule(blink={"every": 0.2})
    app = beats.client()
    app.declare()
    beats.worker()
    role = permissions(app.topology, "amqptasks")["beat"]
    beats.beat(url=restricted_user(role.configure, role.write, role.read))
    beats.wait_ticks("blink", 3)
    assert "blink" in beats.command("list")


@pytest.mark.fault
def test_a_beat_waits_for_its_broker_and_comes_back_after_a_stalled_connection(
    beats: Beats, through_proxy: str, proxy: TcpProxy
) -> None:
    beats.schedule(second={"every": 1, "catch_up": "all"})
    beats.worker()
    proxy.refuse()
    first = beats.beat(url=through_proxy, ready=False)
    wait_until(lambda: "Cannot reach the broker; trying again" in first.log, 20, "it waits")
    proxy.accept()
    first.wait_ready()
    beats.wait_ticks("second", 2)
    proxy.stall()
    other = beats.beat()
    count = len(beats.ticks("second"))
    beats.wait_ticks("second", count + 3)
    assert beats.leader() is other
    proxy.resume()
    beats.wait_ticks("second", len(beats.ticks("second")) + 3)
    assert_each_once(beats.ticks("second"))
    assert {b - a for (a, *_), (b, *_) in itertools.pairwise(beats.ticks("second"))} == {timedelta(seconds=1)}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"cron": "61 * * * *"}, "'61 * * * *' is not a crontab"),
        ({"cron": "0 3 * * *", "timezone": "Mars/Olympus"}, "Mars/Olympus"),
        ({"every": -1}, "every"),
    ],
)
def test_a_beat_with_a_schedule_that_cannot_be_is_one_line_and_ends_with_2(
    beats: Beats, entry: dict[str, Any], said: str
) -> None:
    beats.schedule(wrong=entry)
    beat = beats.beat(ready=False)
    assert beat.wait(20) == 2
    assert said in beat.log
    assert len(beat.log.strip().splitlines()) == 1, beat.log


class Listening(Beats):
    APP = "listening:app"


def test_beats_tell_handlers_that_they_begin(vhost: VirtualHost, tmp_path: Path) -> None:
    (tmp_path / "listening.py").write_text(
        "from amqptasks.signals import beat_embedded_init, beat_init\n"
        "from amqptasks.testing.ledger import record\n"
        "from integration.apps.jobs import app\n"
        "beat_init.connect(lambda **_: record('beat', 'init'), weak=False)\n"
        "beat_embedded_init.connect(lambda **_: record('beat', 'embedded'), weak=False)\n"
    )
    beats = Listening(vhost, tmp_path)
    beats.schedule(rare={"every": 8_640_000})
    beats.environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    try:
        beats.beat()
        assert [one.event for one in beats.ledger.entries()] == ["init"]
        beats.worker("default", "-B", path=tmp_path)
        wait_until(lambda: [one.event for one in beats.ledger.entries()] == ["init", "embedded"], 20, "both are told")
    finally:
        beats.close()

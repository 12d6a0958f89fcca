"""Threads that run tasks; with gevent, its greenlets in their place."""

from __future__ import annotations

import socket
import threading
import time
from queue import SimpleQueue

from amqptasks.execution.interrupts import Interrupts, Terminated
from amqptasks.execution.job import Job
from amqptasks.execution.runner import Runner
from amqptasks.worker.outbox import Outbox
from amqptasks.worker.wire import FrameReader, report_of, returned, terminated, unpack_order

__all__ = ["Crew", "run_crew"]

_READ = 1 << 18


class Crew:
    """As many threads as there are jobs at once. A thread is made when all others have work, and stays."""

    def __init__(self, runner: Runner, interrupts: Interrupts, outbox: Outbox) -> None:
        self._runner = runner
        self._interrupts = interrupts
        self._outbox = outbox
        self._jobs: SimpleQueue[tuple[float, Job]] = SimpleQueue()
        self._threads = 0
        #: Jobs that are queued or run.
        self._load = 0
        self._lock = threading.Lock()
        self._running: dict[int, object] = {}
        self._asked: set[int] = set()

    def put(self, lease: float, jobs: list[Job]) -> None:
        """Run jobs, those that begin before their lease ends."""
        with self._lock:
            self._load += len(jobs)
            missing = self._load - self._threads
            self._threads += max(0, missing)
        for job in jobs:
            self._jobs.put((lease, job))
        for _ in range(missing):
            threading.Thread(target=self._work, name="amqptasks-task", daemon=True).start()

    def end(self, tag: int) -> None:
        """End a task: now, or when it would begin."""
        with self._lock:
            who = self._running.get(tag)
            self._asked.add(tag)
            if who is not None:
                self._interrupts.end(who)

    def _work(self) -> None:
        me = self._interrupts.me()
        while True:
            lease, job = self._jobs.get()
            slot = self._outbox.begin(job.tag, time.monotonic())
            # Marked first, then looked: the leader takes back what is not marked when the lease has ended.
            if time.monotonic() > lease:
                self._outbox.add(returned(job.tag), slot)
            else:
                report = terminated(job.tag)
                try:
                    if self._may_begin(job.tag, me):
                        outcome, runtime = self._runner.run(job)
                        report = report_of(job.tag, outcome, runtime)
                except Terminated:
                    report = terminated(job.tag)
                self._ended(job.tag, me)
                self._outbox.add(report, slot)
            with self._lock:
                self._load -= 1
            self._outbox.flush()

    def _may_begin(self, tag: int, me: object) -> bool:
        with self._lock:
            self._running[tag] = me
            return tag not in self._asked

    def _ended(self, tag: int, me: object) -> None:
        """From here on nothing is raised in this thread; what was on its way is caught here."""
        while True:
            try:
                with self._lock:
                    self._running.pop(tag, None)
                    if tag in self._asked:
                        self._asked.discard(tag)
                        self._interrupts.calm(me)
            except Terminated:
                continue
            return


def run_crew(channel: socket.socket, crew: Crew) -> None:
    """The main thread of an executor: reads jobs for the others, until the leader closes the socket."""
    frames = FrameReader()
    while data := channel.recv(_READ):
        for frame in frames.feed(data):
            lease, jobs, condemned = unpack_order(frame)
            if condemned is not None:
                crew.end(condemned)
            elif jobs:
                crew.put(lease, jobs)

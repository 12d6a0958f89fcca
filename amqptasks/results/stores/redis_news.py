"""News of results in Redis: what is published on their channels, told to those who wait.

One thread per process has the connection that is subscribed, while somebody waits. Nobody else touches it: of two
threads that find it lost, each would connect it anew and break what the other has made. Callers say what they want to
hear, wake the thread, and go on when Redis has confirmed.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any

import redis

from amqptasks.errors import StoreUnavailable
from amqptasks.results.store import StoredCallback

__all__ = ["News"]

#: Seconds in which Redis has to answer; after so many without a word it is asked for one.
_ANSWER_SECONDS = _QUIET_SECONDS = 5.0
#: The thread ends when nobody has waited for so long.
_IDLE_SECONDS = 30.0
_PAUSE_FIRST, _PAUSE_MAX = 0.05, 2.0
#: Who asks to be subscribed is refused when so many connections were tried for it, and lost or refused.
_TRIES = 5
_BATCH = 500

logger = logging.getLogger(__name__)


class _Topic:
    """One result that somebody waits for."""

    __slots__ = ("callbacks", "error", "settled", "tries")

    def __init__(self) -> None:
        self.callbacks: list[StoredCallback] = []
        #: Set when what is published from now on is heard, or when it cannot be.
        self.settled = threading.Event()
        self.error: Exception | None = None
        self.tries = 0


class News:
    """The subscriptions of one process.

    Args:
        prefix: of a result's channel, before the task's id.
        connect: makes a client that tries nothing twice; the thread's own.
        look: the results that stand, of these tasks.
        unavailable: the error of the store.
    """

    def __init__(
        self,
        prefix: str,
        *,
        connect: Callable[[], redis.Redis],
        look: Callable[[Sequence[str]], dict[str, bytes]],
        unavailable: Callable[[Exception], StoreUnavailable],
    ) -> None:
        self._prefix = prefix
        self._connect = connect
        self._look = look
        self._unavailable = unavailable
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        # A signal handler may wait for a result while its thread begins to.
        self._lock = threading.RLock()
        self._topics: dict[str, _Topic] = {}
        #: Those that came or went since the thread looked.
        self._changed: set[str] = set()
        self._thread: threading.Thread | None = None
        self._bell: socket.socket | None = None
        self._idle_since = time.monotonic()

    def listen(self, ids: list[str], callback: StoredCallback) -> Callable[[], None]:
        """Have `callback` called for what is published from now on; until the returned function is called."""
        if self._pid != os.getpid():
            self._hang_up()
            self._reset()  # the parent's connection and thread are not ours
        pid, topics = self._pid, []

        def stop() -> None:
            if pid == os.getpid():
                self._forget(ids, callback)

        try:
            with self._lock:
                for one in ids:
                    if (topic := self._topics.get(one)) is None:
                        topic = self._topics[one] = _Topic()
                        self._changed.add(one)
                    topic.callbacks.append(callback)
                    topics.append(topic)
                self._call_thread()
            until = time.monotonic() + _ANSWER_SECONDS
            for topic in topics:
                in_time = topic.settled.wait(max(0.0, until - time.monotonic()))
                if topic.error is not None or not in_time:
                    error = topic.error or redis.TimeoutError("no answer to SUBSCRIBE")
                    raise self._unavailable(error) from error
        except BaseException:
            stop()
            raise
        return stop

    def _forget(self, ids: list[str], callback: StoredCallback) -> None:
        """The thread unsubscribes when it is woken next: that is for nobody to wait for."""
        with self._lock:
            for one in ids:
                topic = self._topics.get(one)
                if topic is None or callback not in topic.callbacks:
                    continue
                topic.callbacks.remove(callback)
                if not topic.callbacks:
                    del self._topics[one]
                    self._changed.add(one)
            self._idle_since = time.monotonic()

    def _call_thread(self) -> None:
        """Under the lock: have a thread look at what has changed."""
        if self._bell is not None and self._thread is not None and self._thread.is_alive():
            if self._changed:
                with suppress(BlockingIOError):  # it has been called often, and will see this too
                    self._bell.send(b"\0")
            return
        self._hang_up()
        self._bell, ear = socket.socketpair()
        self._bell.setblocking(False)
        ear.setblocking(False)
        self._thread = threading.Thread(target=self._run, args=(ear,), name="amqptasks-results", daemon=True)
        self._thread.start()

    def _hang_up(self) -> None:
        """The thread hears that too."""
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.close()

    def close(self) -> None:
        """End the thread. The next use starts another."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._thread = None
            self._hang_up()
            self._fail(list(self._topics.values()), redis.ConnectionError("the store was closed"), tries=_TRIES)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self, ear: socket.socket) -> None:
        pause = _PAUSE_FIRST
        with closing(ear):
            while self._is_current() and not self._is_idle():
                with self._lock:
                    self._changed.clear()
                    topics = dict(self._topics)
                if not topics:
                    _hear(ear, 1.0)
                    continue
                # What is published while nobody is subscribed is looked up, when the subscription stands again.
                missed = [one for one, topic in topics.items() if topic.settled.is_set()]
                session = _Session(self._prefix, self._connect())
                try:
                    with closing(session):
                        self._attend(session, ear, list(topics), missed)
                    continue
                except (redis.RedisError, StoreUnavailable, OSError) as error:
                    problem: Exception = error
                except Exception as error:
                    logger.exception("The news of results cannot be heard")
                    problem = error
                self._fail(topics.values(), problem)
                pause = _PAUSE_FIRST if session.stood else min(pause * 2, _PAUSE_MAX)
                time.sleep(_PAUSE_FIRST)
                if _hear(ear, pause - _PAUSE_FIRST):
                    pause = _PAUSE_FIRST  # somebody asks anew

    def _is_current(self) -> bool:
        return self._thread is threading.current_thread()

    def _fail(self, topics: Iterable[_Topic], error: Exception, tries: int = 1) -> None:
        """So many tries to subscribe to these were for nothing. Tell those who have waited for enough of them."""
        with self._lock:
            for topic in topics:
                if topic.settled.is_set():
                    continue
                topic.tries += tries
                if topic.tries >= _TRIES:
                    topic.error = error
                    topic.settled.set()
            for one in [one for one, topic in self._topics.items() if topic.error is not None]:
                del self._topics[one]  # who asks next has tries of his own

    def _attend(self, session: _Session, ear: socket.socket, ids: list[str], missed: list[str]) -> None:
        """Tell what comes, until nobody has waited for long. Raises when the connection is lost."""
        session.subscribe(ids)
        with selectors.DefaultSelector() as selector:
            selector.register(session.connection, selectors.EVENT_READ)
            selector.register(ear, selectors.EVENT_READ)
            while self._is_current() and not self._is_idle():
                self._follow(session)
                ready = {key.fileobj for key, _ in selector.select(1.0)}
                if ear in ready:
                    _hear(ear, 0.0)
                    self._follow(session)
                if session.connection in ready:
                    for message in session.messages():
                        self._handle(session, message)
                    if missed and session.stood:
                        self._look_up(missed)
                        missed = []
                session.check()

    def _follow(self, session: _Session) -> None:
        """Subscribe to what is waited for now, and no longer to what is not."""
        with self._lock:
            if not self._changed:
                return
            wanted = [one for one in self._changed if one in self._topics]
            unwanted = [one for one in self._changed if one not in self._topics]
            self._changed.clear()
        session.subscribe(wanted)
        session.unsubscribe(unwanted)
        self._settle(one for one in wanted if session.stands(one))

    def _settle(self, ids: Iterable[str]) -> None:
        with self._lock:
            for one in ids:
                if (topic := self._topics.get(one)) is not None:
                    topic.settled.set()

    def _handle(self, session: _Session, message: dict[str, Any]) -> None:
        task_id = message["channel"].decode().removeprefix(self._prefix)
        if message["type"] == "message":
            self._tell(task_id, message["data"])
        elif message["type"] == "subscribe" and session.stands(task_id):
            self._settle((task_id,))

    def _look_up(self, ids: list[str]) -> None:
        with self._lock:
            ids = [one for one in ids if one in self._topics]
        for task_id, encoded in self._look(ids).items():
            self._tell(task_id, encoded)

    def _tell(self, task_id: str, encoded: bytes) -> None:
        with self._lock:
            topic = self._topics.get(task_id)
            callbacks = [] if topic is None else list(topic.callbacks)
        for callback in callbacks:
            try:
                callback(task_id, encoded)
            except Exception:  # of one listener: the others wait on
                logger.exception("The news of a result cannot be told")

    def _is_idle(self) -> bool:
        """Whether nobody has waited for long; then the thread is no longer the one to call."""
        if self._topics or time.monotonic() - self._idle_since <= _IDLE_SECONDS:
            return False
        with self._lock:
            idle = not self._topics
            if idle and self._is_current():
                self._thread = None
                self._hang_up()
            return idle


class _Session:
    """One connection that is subscribed, from its beginning until it is lost. For one thread.

    redis-py would connect it anew by itself, and what was published meanwhile would be missed without a word. So that
    is an end of the session too.
    """

    def __init__(self, prefix: str, client: redis.Redis) -> None:
        self._prefix = prefix
        self._client = client
        # redis-py has no types there.
        self._pubsub: Any = client.pubsub()  # type: ignore[no-untyped-call]  # redis-py's
        self._socket: socket.socket | None = None
        self._sent: set[str] = set()
        #: SUBSCRIBEs that are not confirmed, and how many words Redis owes in all.
        self._asked: Counter[str] = Counter()
        self._owed = 0
        #: When it owed nothing, or was heard.
        self._heard = time.monotonic()
        #: How many of the first SUBSCRIBEs are not confirmed (answers come in order), and whether all of them are.
        self._first: int | None = None
        self.stood = False

    @property
    def connection(self) -> socket.socket:
        """The connection's, after the first `subscribe`. Raises `redis.ConnectionError` when it is another by now."""
        # redis-py offers no other way to wait for a connection and for something else.
        found: socket.socket | None = self._pubsub.connection._sock
        if self._socket is None:
            self._socket = found
        if found is None or found is not self._socket:
            raise redis.ConnectionError("the connection was lost")
        return found

    def stands(self, task_id: str) -> bool:
        """Whether what is published of this task from now on is heard."""
        return task_id in self._sent and not self._asked[task_id]

    def subscribe(self, ids: Iterable[str]) -> None:
        """To those that it is not subscribed to. The first time it connects."""
        new = [one for one in ids if one not in self._sent]
        self._sent.update(new)
        self._asked.update(new)
        if self._first is None:
            self._first = len(new)
        self._send(self._pubsub.subscribe, new)

    def unsubscribe(self, ids: Iterable[str]) -> None:
        """From those that it is subscribed to."""
        old = [one for one in ids if one in self._sent]
        self._sent.difference_update(old)
        self._send(self._pubsub.unsubscribe, old)

    def _send(self, command: Callable[..., object], ids: list[str]) -> None:
        for start in range(0, len(ids), _BATCH):
            some = ids[start : start + _BATCH]
            self._owes(len(some))
            command(*(self._prefix + one for one in some))

    def _owes(self, words: int) -> None:
        if not self._owed:
            self._heard = time.monotonic()
        self._owed += words

    def messages(self) -> Iterator[dict[str, Any]]:
        """What has come: news, and confirmed subscriptions."""
        while self._pubsub.connection.can_read(timeout=0):
            if not self._pubsub.subscribed:
                raise redis.ConnectionError("an answer that nobody has asked for")
            # What has begun to come has some time to come in full.
            message = self._pubsub.get_message(timeout=_ANSWER_SECONDS)
            self._heard = time.monotonic()
            if message is not None:
                self._count(message)
                if message["type"] in ("message", "subscribe"):
                    yield message

    def _count(self, message: dict[str, Any]) -> None:
        if message["type"] == "message":
            return
        self._owed -= 1
        if message["type"] == "subscribe":
            task_id = message["channel"].decode().removeprefix(self._prefix)
            self._asked[task_id] -= 1
            if self._asked[task_id] <= 0:
                del self._asked[task_id]
            assert self._first is not None
            self._first -= 1
            self.stood = self._first <= 0

    def check(self) -> None:
        """Ask for a word after a long silence. Raises `redis.RedisError` when none comes, or the connection is lost."""
        silence = time.monotonic() - self._heard
        if self._owed and silence > _ANSWER_SECONDS:
            raise redis.TimeoutError(f"no answer for {_ANSWER_SECONDS:.0f} s")
        if not self._owed and self._sent and silence > _QUIET_SECONDS:
            self._owes(1)
            self._pubsub.ping()

    def close(self) -> None:
        """Close the connection."""
        self._pubsub.close()
        self._client.close()


def _hear(ear: socket.socket, seconds: float) -> bool:
    """Wait to be called for so long; a call is used up. Whether there was one."""
    if seconds > 0:
        with selectors.DefaultSelector() as selector:
            selector.register(ear, selectors.EVENT_READ)
            selector.select(seconds)
    try:
        return bool(ear.recv(4096))
    except BlockingIOError:
        return False

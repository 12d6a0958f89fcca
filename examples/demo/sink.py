"""An SMTP server that keeps what it gets and refuses some recipients, as mail servers do."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from email import message_from_bytes
from typing import Any

from aiosmtpd.smtp import SMTP

__all__ = ["MailSink"]


class MailSink:
    """A mail server on a free port of 127.0.0.1. What it does with a recipient depends on the domain:

    ``gone.example``: refused for good (550). ``full.example``: refused for now (452), each time. ``busy.example``:
    refused for now (451) the first time. Any other is taken.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deliveries: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        # aiosmtpd's own controller wants the port beforehand; here the system chooses a free one.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mail-sink", daemon=True)
        self._server: asyncio.Server | None = None

    def __enter__(self) -> MailSink:
        listen = self._loop.create_server(lambda: SMTP(self, hostname="mail.example", loop=self._loop), "127.0.0.1", 0)
        self._server = self._loop.run_until_complete(listen)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _close(self) -> None:
        assert self._server is not None, "the sink is not started"
        self._server.close()
        sessions = asyncio.all_tasks() - {asyncio.current_task()}
        for session in sessions:
            session.cancel()
        await asyncio.gather(*sessions, return_exceptions=True)

    @property
    def address(self) -> str:
        """``host:port``."""
        assert self._server is not None, "the sink is not started"
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    @property
    def delivered(self) -> int:
        """Different mails that arrived, by Message-ID."""
        with self._lock:
            return len(self._deliveries)

    @property
    def repeated(self) -> int:
        """Mails that arrived again: the price of "at least once"."""
        with self._lock:
            return self._deliveries.total() - len(self._deliveries)

    def recipients_refused(self) -> dict[str, int]:
        """Address -> how often it was refused."""
        with self._lock:
            return dict(self._refusals)

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        """Answer ``RCPT TO``."""
        answer = self._answer(address)
        if answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        """Keep a mail."""
        message_id = message_from_bytes(envelope.content)["Message-ID"]
        with self._lock:
            self._deliveries[message_id] += 1
        return "250 kept"

    def _answer(self, address: str) -> str:
        domain = address.rpartition("@")[2]
        with self._lock:
            seen = address in self._refusals
            refused = {
                "gone.example": "550 5.1.1 no such user",
                "full.example": "452 4.2.2 mailbox full",
                "busy.example": None if seen else "451 4.3.2 try again later",
            }.get(domain)
            if refused is None:
                return "250 ok"
            self._refusals[address] += 1
            return refused

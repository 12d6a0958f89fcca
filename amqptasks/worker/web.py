"""The HTTP server of probes and metrics: the standard library's, bounded. It serves what it is told to, no files."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import structlog

from amqptasks.worker.health import Verdict

__all__ = ["Page", "Pages", "json_page", "serve", "verdict_page"]

#: Requests at once; further ones wait in the backlog of the socket.
_MAX_REQUESTS = 64
#: A client gets so many seconds to say and hear something.
_PATIENCE = 5.0

_log = structlog.get_logger("amqptasks.worker")


class Page(NamedTuple):
    """One answer."""

    status: int
    content_type: str
    body: bytes


Pages = Mapping[str, Callable[[], Page]]


def json_page(status: int, content: Mapping[str, Any]) -> Page:
    """A page of JSON."""
    return Page(status, "application/json", json.dumps(content).encode() + b"\n")


def verdict_page(verdict: Callable[[], Verdict]) -> Callable[[], Page]:
    """200 for what is well, 503 for what is not."""

    def page() -> Page:
        well, content = verdict()
        return json_page(200 if well else 503, content)

    return page


class _Handler(BaseHTTPRequestHandler):
    timeout = _PATIENCE
    server_version, sys_version = "amqptasks", ""
    server: _Server

    def do_GET(self) -> None:
        page = self._page()
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page.body)

    do_HEAD = do_GET

    def _page(self) -> Page:
        path = self.path.partition("?")[0]
        make = self.server.pages.get(path)
        if make is None:
            return json_page(404, {"error": f"nothing is here; there are {', '.join(self.server.pages)}"})
        try:
            return make()
        except Exception as error:  # a page must not end the desk
            _log.exception("Cannot answer an HTTP request", path=path)
            return json_page(500, {"error": repr(error)})

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: not a line of log for each."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listening: socket.socket, pages: Pages) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.pages = pages
        self._places = threading.BoundedSemaphore(_MAX_REQUESTS)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._places.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of ours."""


def serve(listening: socket.socket, pages: Pages) -> None:
    """Serve these pages, for ever."""
    _Server(listening, pages).serve_forever(poll_interval=60.0)

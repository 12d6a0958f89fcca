"""The proxy's delay: everything comes, later and in order."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from amqptasks.testing.proxy import TcpProxy
from amqptasks.testing.waiting import wait_until


def _echo(listener: socket.socket, heard: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # the proxy resets connections, the test closes the listener
        one, _ = listener.accept()
        with one:
            while data := one.recv(1 << 16):
                heard.append(data)
                one.sendall(data)


@pytest.fixture
def heard() -> list[bytes]:
    """What the server has heard."""
    return []


@pytest.fixture
def proxy(heard: list[bytes]) -> Iterator[TcpProxy]:
    """Before a server that answers with what it hears."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_echo, args=(listener, heard), daemon=True).start()
        with TcpProxy("127.0.0.1", listener.getsockname()[1]) as made:
            yield made


@pytest.fixture
def client(proxy: TcpProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as made:
        wait_until(lambda: proxy.connections == 1, 10, "it is through")
        yield made


def _heard(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = client.recv(1 << 16)
        assert part, "it was closed"
        data += part
    return data


def test_both_ways_take_longer_until_the_delay_ends(proxy: TcpProxy, client: socket.socket) -> None:
    proxy.delay(0.3)
    started = time.monotonic()
    client.sendall(b"hello")
    assert _heard(client, 5) == b"hello"
    assert time.monotonic() - started >= 0.6
    proxy.delay(0)
    # It takes long enough to tell from the delay on any machine.
    quickest = 1.0
    for _ in range(10):
        started = time.monotonic()
        client.sendall(b"hello")
        assert _heard(client, 5) == b"hello"
        quickest = min(quickest, time.monotonic() - started)
    assert quickest < 0.3


def test_nothing_overtakes_what_is_late_when_the_delay_ends(proxy: TcpProxy, client: socket.socket) -> None:
    proxy.delay(0.4)
    client.sendall(b"1" * 1000)
    time.sleep(0.1)
    proxy.delay(0)
    client.sendall(b"2" * 1000)
    assert _heard(client, 2000) == b"1" * 1000 + b"2" * 1000


def test_an_end_comes_late_and_after_what_was_sent_before(
    proxy: TcpProxy, client: socket.socket, heard: list[bytes]
) -> None:
    proxy.delay(0.2)
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    started = time.monotonic()
    wait_until(lambda: proxy.connections == 0, 10, "it has ended")
    assert time.monotonic() - started > 0.1
    wait_until(lambda: b"".join(heard) == b"last words", 10, lambda: f"what was heard: {heard}")

"""A link's attempts, where the system says no in an odd moment."""

from __future__ import annotations

import socket

from amqptasks.broker.link import _Services, new_loop


def test_a_connection_that_is_reset_before_it_is_used_is_told_on_the_loop() -> None:
    loop = new_loop()
    told: list[object] = []
    gone = socket.socket()  # as after a reset: nobody is at its other end
    gone.setblocking(False)

    def done(result: object) -> None:
        told.append(result)
        loop.stop()

    _Services(loop).create_streaming_connection(protocol_factory=lambda: None, sock=gone, on_done=done)
    assert told == [], "not from within the call"
    loop.start()
    loop.close()
    (error,) = told
    assert isinstance(error, ConnectionResetError)
    assert gone.fileno() == -1

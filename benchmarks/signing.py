#!/usr/bin/env python3
"""Signs and verifies task messages; prints microseconds a message, the best of five rounds.

python -m benchmarks.signing
"""

from __future__ import annotations

import timeit
import uuid

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from amqptasks.message import Envelope
from amqptasks.protocol.serializers import serializer
from amqptasks.protocol.signing import Keyring
from amqptasks.protocol.task import TaskHeaders, task_envelope

ROUNDS = 5
SIZES = {100: 5000, 10_000: 2000, 1_000_000: 50}


def envelope(size: int) -> Envelope:
    """A task message as `delay` makes it, with one argument of so many characters."""
    headers = TaskHeaders(task="shop.charge", id=str(uuid.uuid4()), ignore_result=True)
    return task_envelope(headers, ("x" * size,), {}, serializer=serializer("json"), exchange="", routing_key="default")


def microseconds(ring: Keyring, one: Envelope, number: int) -> tuple[float, float]:
    """For signing, for verifying."""

    def verify() -> None:
        problem = ring.problem(one.headers, one.content_type, one.correlation_id, one.reply_to, one.body)
        assert problem is None

    signing = min(timeit.repeat(lambda: ring.sign(one), number=number, repeat=ROUNDS))
    return signing / number * 1e6, min(timeit.repeat(verify, number=number, repeat=ROUNDS)) / number * 1e6


def main() -> None:
    private = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    print(f"{'':<12} {'argument':>10} {'sign, µs':>10} {'verify, µs':>10}")
    for name, key in (("HMAC-SHA256", "x" * 44), ("Ed25519", private.decode())):
        ring = Keyring.read(key, (), accept_unsigned=False)
        assert ring is not None
        for size, number in SIZES.items():
            sign, verify = microseconds(ring, envelope(size), number)
            print(f"{name:<12} {size:>10} {sign:>10.1f} {verify:>10.1f}")


if __name__ == "__main__":
    main()

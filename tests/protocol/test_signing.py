"""Signatures: whatever is covered cannot be changed, whatever changes on the way is not covered."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pika import BasicProperties

from amqptasks.broker.wire import decode_properties, encode_properties
from amqptasks.errors import ConfigError, SerializationError
from amqptasks.message import Envelope
from amqptasks.protocol.keys import signing_key, verification_key
from amqptasks.protocol.serializers import serializer
from amqptasks.protocol.signing import KEY_HEADER, SIGNATURE_HEADER, Keyring
from amqptasks.protocol.task import PUBLISHED_HEADER, TaskHeaders, task_envelope
from amqptasks.worker.delivery import CRASHES_HEADER, HOME_HEADER, PASSED_HEADER, TURN_HEADER, VERDICT_HEADER

OLD, NEW = "old-secret-" * 4, "new-secret-" * 4


def private_pem(key: Any, password: bytes | None = None) -> str:
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how).decode()


def public_pem(key: Any) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


PAIR = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PRIVATE, PUBLIC = private_pem(PAIR), public_pem(PAIR)


def ring(signs: str | None = OLD, *verify: str, accept_unsigned: bool = False) -> Keyring:
    made = Keyring.read(signs, verify, accept_unsigned=accept_unsigned)
    assert made is not None
    return made


def message(body: bytes | None = None, **headers: Any) -> Envelope:
    made = task_envelope(
        TaskHeaders(task="shop.charge", id="9f", time_limit=2.5, extra=headers),
        (1, "ü"),
        {"to": "me"},
        serializer=serializer("json"),
        exchange="amqptasks",
        routing_key="default",
        reply_to="mine",
    )
    made.body = made.body if body is None else body
    return made


def arrived(one: Envelope) -> BasicProperties:
    """The properties as a worker decodes them."""
    properties = BasicProperties()
    decode_properties(properties, encode_properties(one).encode()[0])
    return properties


def problem(keys: Keyring, one: Envelope | BasicProperties, body: bytes | None = None) -> str | None:
    content = one.body if isinstance(one, Envelope) else body
    assert content is not None
    return keys.problem(one.headers or {}, one.content_type, one.correlation_id, one.reply_to, content)


BOTH = pytest.mark.parametrize("keys", [ring(), ring(PRIVATE)], ids=["hmac", "ed25519"])
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@BOTH
@given(extra=st.dictionaries(TEXT, VALUES, max_size=4), body=st.binary(max_size=100))
@settings(deadline=None, max_examples=50)
def test_a_signed_message_is_believed_after_its_way_over_the_wire(
    keys: Keyring, extra: dict[str, Any], body: bytes
) -> None:
    one = message(body)
    one.headers.update(extra)
    keys.sign(one)
    assert problem(keys, arrived(one), body) is None


#: Headers that change on a message's way; everything else must not.
FREE = ("eta", "retries", PUBLISHED_HEADER)


def covered(properties: BasicProperties) -> Any:
    kept = {name: value for name, value in (properties.headers or {}).items() if name not in FREE}
    return properties.content_type, properties.correlation_id, properties.reply_to, repr(sorted(kept.items(), key=str))


@given(data=st.data())
@settings(deadline=None, max_examples=400)
def test_no_bit_of_what_is_covered_can_be_flipped(data: st.DataObject) -> None:
    one = message(tenant="a", limits={"deep": [1, 2.5, None, True]})
    ring().sign(one)
    encoded, before = bytearray(encode_properties(one).encode()[0]), covered(arrived(one))
    whole = len(encoded) + len(one.body)
    bit = data.draw(st.integers(0, whole * 8 - 1))
    body = bytearray(one.body)
    if bit // 8 < len(encoded):
        encoded[bit // 8] ^= 1 << bit % 8
    else:
        body[bit // 8 - len(encoded)] ^= 1 << bit % 8
    properties = BasicProperties()
    try:
        decode_properties(properties, bytes(encoded))
    except Exception:
        return  # no message at all
    untouched = covered(properties) == before and bytes(body) == one.body
    assert (problem(ring(), properties, bytes(body)) is None) == untouched


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", "shop.refund"),
        ("id", "a0"),
        ("compression", "application/x-gzip"),
        ("root_id", "x"),
        ("parent_id", "x"),
        ("group", "x"),
        ("group_index", 1),
        ("expires", "2030-01-01T00:00:00+00:00"),
        ("timelimit", [None, None]),
        ("ignore_result", True),
        ("tenant", "b"),
        ("x-tenant", "b"),
        (VERDICT_HEADER, ["ChordError", "says who?"]),
        ("x-amqptasks-something-new", 1),
        (7, 7),
        (b"\xff", 7),
    ],
)
def test_a_header_that_means_something_can_be_neither_changed_nor_added_nor_removed(
    keys: Keyring, name: Any, value: Any
) -> None:
    one = message()
    keys.sign(one)
    assert problem(keys, one) is None
    one.headers[name] = value
    assert problem(keys, one) is not None
    del one.headers[name]
    assert (problem(keys, one) is None) == (name not in message().headers)


def test_a_header_of_the_users_own_cannot_be_removed() -> None:
    one = message(**{"x-tenant": "a"})
    ring().sign(one)
    del one.headers["x-tenant"]
    assert "is not of this message" in str(problem(ring(), one))


@BOTH
@pytest.mark.parametrize("name", ["content_type", "correlation_id", "reply_to", "body"])
def test_a_property_and_the_body_cannot_be_changed(keys: Keyring, name: str) -> None:
    one = message()
    keys.sign(one)
    setattr(one, name, b"x" if name == "body" else "x")
    assert "is not of this message" in str(problem(keys, one))


def test_a_signature_cannot_be_moved_to_another_message() -> None:
    one, other = message(), message(b'[["other"],{},{}]')
    other.headers["id"] = other.correlation_id = "a0"
    ring().sign(one)
    other.headers |= {name: one.headers[name] for name in (SIGNATURE_HEADER, KEY_HEADER)}
    assert "is not of this message" in str(problem(ring(), other))


def test_head_and_body_cannot_trade_bytes() -> None:
    one = message(b"\n\nbody")
    ring().sign(one)
    one.body = b"\nbody"
    assert problem(ring(), one) is not None


@BOTH
def test_what_workers_and_brokers_change_on_the_way_leaves_the_signature_valid(keys: Keyring) -> None:
    one = message()
    keys.sign(one)
    one.headers |= {
        "retries": 3,
        "eta": "2026-01-01T00:00:00+00:00",
        CRASHES_HEADER: 2,
        HOME_HEADER: "email",
        TURN_HEADER: "t",
        PASSED_HEADER: True,
        PUBLISHED_HEADER: 5,
        "x-task-reason": "failed",
        "x-task-traceback": "…",
        "x-death": [{"count": 1, "queue": "amqptasks.delay.03", "reason": "expired"}],
        "x-first-death-queue": "q",
        "x-last-death-reason": "expired",
        "x-delivery-count": 2,
        "x-acquired-count": 2,
        "x-opt-rabbitmq-received-time": 1,
        "timestamp_in_ms": 1,
        "CC": ["elsewhere"],
    }
    one.exchange, one.routing_key, one.priority, one.expiration, one.message_id = "other", "key", 9, "5", "m"
    assert problem(keys, one) is None


# --- keys ------------------------------------------------------------------------------------------------------------


def test_rotation_the_old_key_verifies_until_it_is_taken_away() -> None:
    old, new = message(), message()
    ring(OLD).sign(old)
    during, after = ring(NEW, OLD), ring(NEW)
    during.sign(new)
    assert problem(during, old) is None
    assert problem(during, new) is None
    assert problem(after, new) is None
    refused = str(problem(after, old))
    assert old.headers[KEY_HEADER] in refused
    assert "which this worker does not have" in refused
    assert new.headers[KEY_HEADER] in refused, "and it says which it has"


def test_from_a_secret_to_a_key_pair_without_a_gap() -> None:
    one = message()
    ring(OLD).sign(one)
    assert problem(ring(PRIVATE, OLD), one) is None


def test_who_has_only_a_public_key_verifies_and_cannot_sign() -> None:
    one = message()
    ring(PRIVATE).sign(one)
    reader = ring(None, PUBLIC)
    assert problem(reader, one) is None
    assert not reader.can_sign
    with pytest.raises(ConfigError, match=r"set security\.signing_key"):
        reader.sign(message())


def test_a_public_key_is_not_taken_for_a_secret() -> None:
    """The oldest trick: sign by HMAC with what everybody knows."""
    reader, forged = ring(None, PUBLIC), message()
    for text in (PUBLIC, PUBLIC.strip(), "".join(PUBLIC.splitlines()[1:-1])):
        with pytest.raises(ValueError, match=r"PEM|private"):
            signing_key(text)
    forger = ring("x" * 40)
    forger.sign(forged)
    forged.headers[KEY_HEADER] = verification_key(PUBLIC).id
    assert problem(reader, forged) is not None


def test_the_key_s_own_id_is_signed() -> None:
    one = message()
    ring(OLD).sign(one)
    one.headers[KEY_HEADER] = signing_key(NEW).id
    assert problem(ring(NEW, OLD), one) is not None


def test_unsigned_messages_are_taken_only_where_that_is_said_and_only_without_any_signature() -> None:
    one = message()
    assert "is not signed" in str(problem(ring(), one))
    lenient = ring(accept_unsigned=True)
    assert problem(lenient, one) is None
    lenient.sign(one)
    one.body = b"changed"
    assert problem(lenient, one) is not None


@pytest.mark.parametrize(
    ("signature", "key"),
    [
        *[(signature, "id") for signature in (None, "", "AAAA", "ü", 5, b"x", {"a": 1})],
        *[("AAAA", key) for key in (None, ["id"], "someone's", b"\xff")],
    ],
)
def test_whatever_stands_in_the_signature_s_headers_is_refused_in_words(signature: Any, key: Any) -> None:
    for keys in (ring(), ring(PRIVATE)):
        one = message()
        keys.sign(one)
        own = one.headers[KEY_HEADER]
        one.headers[SIGNATURE_HEADER], one.headers[KEY_HEADER] = signature, own if key == "id" else key
        assert len(str(problem(keys, one))) > 30


def test_a_deep_header_is_refused_and_not_followed() -> None:
    one = message()
    ring().sign(one)
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    one.headers["deep"] = deep
    assert problem(ring(), one) is not None


def test_a_header_that_has_no_one_form_on_the_wire_is_named_at_the_call() -> None:
    with pytest.raises(SerializationError, match=r"header 'when' is a bytes"):
        ring().sign(message(when=b"x"))


def test_the_signature_is_of_the_documented_bytes() -> None:
    """What another program has to do that wants to sign."""
    import hashlib
    import hmac

    one = message()
    ring().sign(one)
    signed = copy.deepcopy(one.headers)
    key, signature = signed.pop(KEY_HEADER), signed.pop(SIGNATURE_HEADER)
    assert key == hashlib.sha256(b"amqptasks key HMAC-SHA256\n" + OLD.encode()).hexdigest()[:16]
    for name in FREE:
        del signed[name]
    head = json.dumps(
        [key, one.content_type, one.correlation_id, one.reply_to, signed],
        sort_keys=True, separators=(",", ":"), ensure_ascii=False,
    )  # fmt: skip
    data = b"amqptasks message 1\n" + head.encode() + b"\n" + one.body
    assert base64.b64encode(hmac.digest(OLD.encode(), data, "sha256")).decode() == signature


def test_neither_text_nor_repr_of_keys_shows_them() -> None:
    for one in (ring(OLD, NEW), ring(PRIVATE), signing_key(OLD), signing_key(PRIVATE)):
        for text in (str(one), repr(one)):
            assert "secret" not in text
            assert "BEGIN" not in text
    assert str(ring(PRIVATE, OLD)).count(" verifies") == 1


RSA = rsa.generate_private_key(65537, 1024)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "too short"),
        ("x" * 31, "32 characters at least, this one 31"),
        (PUBLIC, "a key that signs is private"),
        (private_pem(RSA), "the algorithm RSA is not known"),
        (private_pem(ec.generate_private_key(ec.SECP256R1())), "is not known here"),
        (private_pem(PAIR, b"word"), "encrypted"),
        (PRIVATE.replace("M", "N", 1), "not a private key in PEM"),
        ("-----BEGIN PRIVATE KEY-----", "not a private key in PEM"),
        ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKSbrqE2d0ElOO2FPBUfM3TBlHQOIdTnYaGd0wqyLeXe me", "given as PEM"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_with_the_reason_and_without_the_key(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        signing_key(text)
    assert text[40:60] not in str(caught.value) or not text[40:60]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x" * 31, "too short"),
        (PRIVATE, "openssl pkey"),
        (public_pem(RSA), "the algorithm RSA is not known"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "not a public key in PEM"),
    ],
)
def test_a_key_that_cannot_verify_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        verification_key(text)


def test_line_ends_of_a_pem_may_be_written_as_in_environment_files() -> None:
    assert signing_key(PRIVATE.replace("\n", "\\n")).id == signing_key(PRIVATE).id

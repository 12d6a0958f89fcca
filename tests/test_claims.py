"""Large bodies in a store: what a claim says, and what is never read or deleted for one."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from amqptasks import AmqpTasks, ConfigError
from amqptasks.claims import CLAIM_TYPE, Claim, Claims, read_body
from amqptasks.doctor.findings import Level
from amqptasks.doctor.settings import check_claims
from amqptasks.errors import DecodeError, MessageTooLarge, SoftTimeLimitExceeded, StoreUnavailable
from amqptasks.message import Envelope
from amqptasks.worker.group import plan_groups

BODY = b'[["' + b"x" * 5000 + b'"],{},{}]'
SOUND = {"key": f"2026-01-31/{'0f' * 16}", "size": 3, "sha256": "ab" * 32, "content_type": "application/json"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "bodies"
    made.mkdir()
    return made


@pytest.fixture
def claims(folder: Path) -> Claims:
    return Claims(f"file://{folder}", above=4096, limit=1_000_000, keep=60.0)


def files(folder: Path) -> list[Path]:
    return [one for one in folder.rglob("*") if one.is_file()]


def test_a_large_body_is_kept_and_a_small_one_travels(claims: Claims, folder: Path) -> None:
    small = Envelope("e", "k", b"[[],{},{}]")
    claims.check_in(small)
    assert (small.body, small.content_type, files(folder)) == (b"[[],{},{}]", "application/json", [])
    large = Envelope("e", "k", BODY, content_type="application/x-msgpack", content_encoding="binary")
    claims.check_in(large)
    assert large.content_type == CLAIM_TYPE
    assert len(large.body) < 300
    assert [one.read_bytes() for one in files(folder)] == [BODY]
    body, content_type, claim = read_body(claims, large.body, large.content_type)
    assert (body, content_type) == (BODY, "application/x-msgpack")
    assert claim is not None
    claims.forget(claim.key)
    claims.forget(claim.key)  # as when the broker gives the call that deletes it out again
    assert files(folder) == []
    with pytest.raises(DecodeError, match=f"its body {claim.key} is not in file://{folder}"):
        claims.read(claim)


def test_any_file_system_of_fsspec_will_do() -> None:
    claims = Claims("memory://bodies", above=0, limit=1_000_000, keep=60.0)
    claim = Claim.of(claims.written(BODY, "application/json"))
    assert claims.read(claim) == BODY
    claims.forget(claim.key)
    with pytest.raises(DecodeError, match="is not in memory://bodies"):
        claims.read(claim)
    claims.check()


@pytest.mark.parametrize(
    "changed",
    [
        {"key": "../../etc/passwd"},
        {"key": "2026-01-31/../../../etc/passwd0000000000000"},
        {"key": f"/2026-01-31/{'0f' * 16}"},
        {"key": f"2026-01-31/{'0f' * 16}\n"},
        {"key": f"2026-01-31/{'0f' * 16}/../{'0f' * 16}"},
        {"key": f"２026-01-31/{'0f' * 16}"},
        {"key": 7},
        {"size": "3"},
        {"size": True},
        {"size": None},
        {"size": -1},
        {"sha256": "AB" * 32},
        {"sha256": ""},
        {"content_type": None},
        {"content_type": ["application/json"]},
        {"more": 1},
    ],
)
def test_a_claim_that_is_not_ours_is_refused(changed: dict[str, Any], claims: Claims) -> None:
    with pytest.raises(DecodeError):
        Claim.of(json.dumps({**SOUND, **changed}).encode())
    key = changed.get("key")
    if isinstance(key, str):
        with pytest.raises(DecodeError, match="no key of a body"):
            claims.forget(key)


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 5000, json.dumps(SOUND).encode() + b" " * 1024]
)
def test_what_is_no_claim_is_refused(body: bytes) -> None:
    with pytest.raises(DecodeError, match="kept elsewhere"):
        Claim.of(body)


def test_a_body_that_is_another_or_too_large_is_not_taken(claims: Claims, folder: Path) -> None:
    claim = Claim.of(claims.written(BODY, "application/json"))
    (file,) = files(folder)
    for other in (BODY.replace(b"x", b"y"), BODY[:-1], BODY + b" ", b""):
        file.write_bytes(other)
        with pytest.raises(DecodeError, match="not the one that was sent"):
            claims.read(claim)
    huge = Claim.of(json.dumps({**asdict(claim), "size": 1_000_001}).encode())
    with pytest.raises(DecodeError, match="1000001 bytes; the limit is 1000000"):
        claims.read(huge)
    with pytest.raises(MessageTooLarge, match="max_body"):
        claims.written(b"x" * 1_000_001, "application/json")


def test_a_directory_that_is_not_there_is_away_and_not_empty(claims: Claims, folder: Path) -> None:
    """As when it is not mounted: a body in it is not gone, and is not written beside it."""
    claim = Claim.of(claims.written(BODY, "application/json"))
    folder.rename(folder.with_name("elsewhere"))
    for work in (
        lambda: claims.read(claim),
        lambda: claims.forget(claim.key),
        lambda: claims.written(BODY, "application/json"),
        claims.check,
    ):
        with pytest.raises(StoreUnavailable, match=f"there is no directory {folder}"):
            work()
    assert not folder.exists()
    folder.with_name("elsewhere").rename(folder)
    assert claims.read(claim) == BODY


def test_half_a_body_is_not_left(claims: Claims, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable, match="No space left on device"):
        claims.written(BODY, "application/json")
    assert files(folder) == []


def test_the_soft_limit_of_the_task_that_calls_is_not_taken_for_the_stores_trouble(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(_handle: int) -> None:
        raise SoftTimeLimitExceeded

    monkeypatch.setattr(os, "fsync", ended)
    with pytest.raises(SoftTimeLimitExceeded):
        claims.written(BODY, "application/json")


def test_a_child_of_a_fork_opens_the_store_for_itself(claims: Claims, folder: Path) -> None:
    claims.check()
    before = claims._files
    child = os.fork()
    if child == 0:
        code = 1
        try:
            claims.written(BODY, "application/json")
            code = 0 if claims._files is not before else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [one.read_bytes() for one in files(folder)] == [BODY]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("/mnt/tasks", "SCHEME://PATH, such as file:///mnt/tasks"),
        ("file://mnt/tasks", "three slashes"),
        ("local:///mnt/tasks", "such as file:///"),
        ("file:///", "three slashes"),
        ("s3://bucket/tasks", "s3:// needs another package: Install s3fs"),
        ("nope://user:word@host/x", "Protocol not known: nope"),
    ],
)
def test_a_wrong_url_is_told(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        _ = AmqpTasks("x", config={"claim_check": {"url": url}}).calls
    assert "word" not in str(error.value)


def test_a_server_that_is_away_is_told_when_the_store_is_used_and_not_before() -> None:
    claims = Claims("ftp://127.0.0.1:1/tasks", above=0, limit=1000, keep=60.0)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="Connection refused"):
            claims.check()


def test_a_gevent_pool_takes_a_directory_only() -> None:
    for url, fits in (("file:///mnt/bodies", True), ("memory://bodies", False)):
        settings = AmqpTasks("x", config={"claim_check": {"url": url}}).settings
        if fits:
            assert plan_groups(settings, ["default"], pool="gevent")
            continue
        with pytest.raises(ConfigError, match="file:// only"):
            plan_groups(settings, ["default"], pool="gevent")
        assert plan_groups(settings, ["default"], pool="asyncio")


def test_doctor_warns_of_a_mount_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = AmqpTasks("x", config={"claim_check": {"url": f"file://{folder}"}}).settings
    assert [one.level for one in check_claims(settings)] == [Level.OK]
    monkeypatch.setattr(Path, "is_mount", lambda self: self == folder)
    (warned,) = check_claims(settings)
    assert (warned.level, warned.mend) == (Level.WARNING, f"claim_check: {{url: 'file://{folder}/bodies'}}")


def test_only_users_of_the_group_read_bodies(claims: Claims, folder: Path) -> None:
    claims.written(BODY, "application/json")
    (file,) = files(folder)
    assert file.stat().st_mode & 0o777 == 0o660
    assert file.parent.stat().st_mode & 0o777 == 0o770


def test_nothing_is_kept_elsewhere_unless_asked_for() -> None:
    assert AmqpTasks("x", config={}).calls.claims is None
    eager = {"claim_check": {"url": "file:///nowhere", "above": 1}, "testing": {"always_eager": True}}
    app = AmqpTasks("x", config=eager)

    @app.task
    def double(text: str) -> str:
        return text * 2

    assert double.delay("x" * 5000).get() == "x" * 10_000
    with pytest.raises(DecodeError, match=r"claim_check\.url is not set here"):
        read_body(None, json.dumps(SOUND).encode(), CLAIM_TYPE)

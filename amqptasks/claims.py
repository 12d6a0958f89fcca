"""Large bodies outside the broker: a store keeps them, and a claim travels in their place (the claim check pattern).

The body of such a message is a few lines of JSON that say where the body lies, how long it is, and its SHA-256. So what
signs a message signs its body too, and a message can be delayed, tried again, dead-lettered, moved and replayed without
touching what it stands for.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from amqptasks.config import Settings
from amqptasks.config.masking import mask_url
from amqptasks.errors import ConfigError, DecodeError, MessageTooLarge, SoftTimeLimitExceeded, StoreUnavailable
from amqptasks.message import Envelope

__all__ = ["CLAIM_TYPE", "FORGET", "Claim", "Claims", "claims_of", "read_body"]

#: The content type of a claim. Who does not know it refuses the message, and does not take the claim for the arguments.
CLAIM_TYPE = "application/vnd.amqptasks.claim+json"
#: The task that deletes a body.
FORGET = "amqptasks.forget_body"
#: What a key looks like. Nothing else is read or deleted, whatever a message says.
_KEY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}/[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST = 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Claim:
    """What stands for a body: its key in the store, its bytes, their SHA-256, and its content type."""

    key: str
    size: int
    sha256: str
    content_type: str

    @classmethod
    def of(cls, body: bytes) -> Claim:
        """The claim that a message carries. Raises `DecodeError`."""
        try:
            table: Any = json.loads(body) if len(body) <= _LONGEST else None
            made = cls(**table)
        except (ValueError, TypeError, RecursionError):
            raise DecodeError("the message says that its body is kept elsewhere, and not where") from None
        texts = (made.key, made.sha256, made.content_type)
        fits = all(isinstance(one, str) for one in texts) and type(made.size) is int and made.size >= 0
        if not fits or not _KEY.fullmatch(made.key) or not _SHA256.fullmatch(made.sha256):
            raise DecodeError("the message says that its body is kept where no body is: its claim is not amqptasks's")
        return made


class Claims:
    """The store of large bodies, opened at its first use in each process. Raises `ConfigError` for what is none.

    Args:
        url: a directory that every process sees (``file:///mnt/tasks/bodies``), or another file system of fsspec.
        above: larger bodies go there, in bytes.
        limit: the largest body that a worker takes, in bytes.
        keep: seconds for which a body is kept when its task has succeeded.

    Its methods raise `StoreUnavailable` when the store cannot be used.
    """

    def __init__(self, url: str, *, above: int, limit: int, keep: float) -> None:
        self._url = url
        self._above = above
        self._limit = limit
        self.keep = keep
        scheme = url.partition(":")[0]
        #: Whether it is a directory of this machine, or one that is mounted like one.
        self.is_local = scheme == "file"
        try:
            # Only who asks for it needs the package.
            self._fsspec: Any = importlib.import_module("fsspec.core")
            self._fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            needs = "pip install 'amqptasks[claim-check]'" if error.name == "fsspec" else str(error)
            raise ConfigError(f"claim_check.url: {scheme}:// needs another package: {needs}") from None
        except ValueError as error:
            raise ConfigError(f"claim_check.url: {mask_url(str(error))}") from None
        self._pid = 0

    def __str__(self) -> str:
        return mask_url(self._url)

    def _open(self) -> None:
        """Each process its own: a connection does not outlive a fork."""
        if self._pid != os.getpid():
            self._files, root = self._fsspec.url_to_fs(self._url, skip_instance_cache=True)
            self.root = root.rstrip("/")
            self._pid = os.getpid()

    # -- out ------------------------------------------------------------------------------------------------------

    def takes(self, envelope: Envelope) -> bool:
        """Whether the envelope's body goes to the store."""
        return len(envelope.body) > self._above

    def check_in(self, envelope: Envelope) -> None:
        """Have a claim travel in the place of a large body. Raises `MessageTooLarge`."""
        if self.takes(envelope):
            envelope.body, envelope.content_type = self.packed(envelope.body, envelope.content_type)
            envelope.content_encoding = "utf-8"

    def packed(self, body: bytes, content_type: str) -> tuple[bytes, str]:
        """What travels for a body, and its content type: a claim where it is large. Raises `MessageTooLarge`."""
        return (self.written(body, content_type), CLAIM_TYPE) if len(body) > self._above else (body, content_type)

    def written(self, body: bytes, content_type: str) -> bytes:
        """Keep a body; returns the claim, as a message carries it. Raises `MessageTooLarge`."""
        if len(body) > self._limit:
            raise MessageTooLarge(
                f"the body has {len(body)} bytes; no worker takes more than {self._limit} (serialization.max_body)"
            )
        key = f"{datetime.now(UTC).date()}/{uuid4().hex}"
        self._use(lambda: self._write(key, body))
        return json.dumps(asdict(Claim(key, len(body), hashlib.sha256(body).hexdigest(), content_type))).encode()

    def _write(self, key: str, body: bytes) -> None:
        if self.is_local:
            # Durable before the message is: else a machine that goes down keeps the claim and loses the body.
            _write_local(Path(self.root), Path(self.root, key), body)
        else:
            self._files.pipe_file(f"{self.root}/{key}", body)

    # -- in -------------------------------------------------------------------------------------------------------

    def read(self, claim: Claim) -> bytes:
        """The body. Raises `DecodeError` when it is gone, or is another."""
        if claim.size > self._limit:
            raise DecodeError(f"the body has {claim.size} bytes; the limit is {self._limit} (serialization.max_body)")
        body = self._use(lambda: self._read(claim.key, claim.size + 1))
        if body is None:
            raise DecodeError(
                f"its body {claim.key} is not in {self}: it was deleted, or its task has succeeded and ran once more"
            )
        if len(body) != claim.size or hashlib.sha256(body).hexdigest() != claim.sha256:
            raise DecodeError(f"its body {claim.key} in {self} is not the one that was sent")
        return bytes(body)

    def _read(self, key: str, most: int) -> bytes | None:
        try:
            body: bytes = self._files.cat_file(f"{self.root}/{key}", start=0, end=most)
        except FileNotFoundError:
            self._must_stand()
            return None
        return body

    def forget(self, key: str) -> None:
        """Delete a body. One that is gone already is no error; `DecodeError` for what is no key."""
        if not _KEY.fullmatch(key):
            raise DecodeError(f"{key!r:.80} is no key of a body")
        self._use(lambda: self._delete(key))

    def _delete(self, key: str) -> None:
        try:
            self._files.rm_file(f"{self.root}/{key}")
        except FileNotFoundError:
            self._must_stand()

    def check(self) -> None:
        """Write a body, read it and delete it."""
        claim = Claim.of(self.written(b"amqptasks", "text/plain"))
        try:
            self.read(claim)
        except DecodeError as error:
            raise StoreUnavailable(f"{self} does not give back what was written: {error}") from None
        self.forget(claim.key)

    def _must_stand(self) -> None:
        """A directory that is not mounted has no bodies, which must not be taken for bodies that are gone."""
        if self.is_local and not Path(self.root).is_dir():
            raise FileNotFoundError(f"there is no directory {self.root}")

    def _use(self, work: Callable[[], T]) -> T:
        try:
            self._open()
            return work()
        except SoftTimeLimitExceeded:  # of the task that calls another
            raise
        except Exception as error:  # whatever a file system raises
            self._pid = 0  # the next use connects anew
            why = mask_url(str(error)) or type(error).__name__
            raise StoreUnavailable(f"the store of large bodies {self} cannot be used: {why}") from error


def _write_local(root: Path, path: Path, body: bytes) -> None:
    """The root is not made: where nothing is mounted, nobody else would see it."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no directory {root}")
    with suppress(FileExistsError):
        path.parent.mkdir()
        _share(path.parent, 0o2770)
    try:
        with path.open("xb") as file:
            _share(path, 0o660)
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a disk that is full, a task that is ended: half a body is nobody's
        path.unlink(missing_ok=True)
        raise
    for directory in (path.parent, root):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _share(path: Path, mode: int) -> None:
    """Callers and workers may be users of one group, which the root hands on; nobody else reads arguments."""
    with suppress(PermissionError):  # the modes are those of the mount
        path.chmod(mode)


def claims_of(settings: Settings) -> Claims | None:
    """The store of these settings; None where bodies are never kept elsewhere. Raises `ConfigError`."""
    section = settings.claim_check
    if section.url is None or settings.testing.always_eager:
        return None
    return Claims(section.url, above=section.above, limit=settings.serialization.max_body, keep=section.keep)


def read_body(claims: Claims | None, body: bytes, content_type: Any) -> tuple[bytes, str | None, Claim | None]:
    """The body that a message stands for, its content type, and the claim, if there is one.

    Raises `DecodeError`, `StoreUnavailable`.
    """
    if content_type != CLAIM_TYPE:
        return body, content_type, None
    claim = Claim.of(body)
    if claims is None:
        raise DecodeError(f"its body {claim.key} is kept in a store, and claim_check.url is not set here")
    return claims.read(claim), claim.content_type, claim

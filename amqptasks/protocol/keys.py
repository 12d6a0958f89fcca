"""Keys that sign messages and verify them: HMAC-SHA256 with a secret, Ed25519 with a PEM key.

The form of a key says what it is for, and nothing in a message does: a message only names the key, by its id.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
from typing import Any, Protocol

__all__ = ["SHORTEST_SECRET", "SigningKey", "VerificationKey", "signing_key", "verification_key"]

#: Characters. 32 random ones in base64 or more are beyond guessing.
SHORTEST_SECRET = 32
#: What an Ed25519 key looks like without its PEM frame. Taken for a secret, a public key would sign for everybody.
_UNFRAMED = ("MCowBQYDK2Vw", "MC4CAQAwBQYDK2Vw", "MFECAQEwBQYDK2Vw", "ssh-", "AAAAC3NzaC1")
_BEGIN = "-----BEGIN "


class VerificationKey(Protocol):
    """A key that verifies."""

    #: 16 hexadecimal digits of the key's own SHA-256: what messages call it.
    id: str
    algorithm: str

    def verify(self, data: bytes, signature: bytes) -> bool:
        """Whether this signature was made for this data with this key, or with its private half."""


class SigningKey(VerificationKey, Protocol):
    """A key that signs too."""

    def sign(self, data: bytes) -> bytes:
        """The signature of this data."""


def _fingerprint(algorithm: str, key: bytes) -> str:
    return hashlib.sha256(f"amqptasks key {algorithm}\n".encode() + key).hexdigest()[:16]


class _Secret:
    """HMAC-SHA256 (RFC 2104): who can verify can sign."""

    __slots__ = ("_secret", "id")
    algorithm = "HMAC-SHA256"

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.id = _fingerprint(self.algorithm, secret)

    def sign(self, data: bytes) -> bytes:
        return hmac.digest(self._secret, data, "sha256")

    def verify(self, data: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(hmac.digest(self._secret, data, "sha256"), signature)


class _PublicKey:
    """Ed25519 (RFC 8032): verifies, and cannot sign."""

    __slots__ = ("_public", "id")
    algorithm = "Ed25519"

    def __init__(self, public: Any) -> None:
        self._public = public
        self.id = _fingerprint(self.algorithm, public.public_bytes_raw())

    def verify(self, data: bytes, signature: bytes) -> bool:
        try:
            self._public.verify(signature, data)
        except Exception:  # InvalidSignature; whatever else is wrong with it, it is no signature
            return False
        return True


class _PrivateKey(_PublicKey):
    __slots__ = ("_private",)

    def __init__(self, private: Any) -> None:
        super().__init__(private.public_key())
        self._private = private

    def sign(self, data: bytes) -> bytes:
        signature: bytes = self._private.sign(data)
        return signature


def signing_key(text: str) -> SigningKey:
    """The key in this text: a secret, or a private key in PEM. Raises `ValueError`, without the key."""
    text = text.strip()
    if _BEGIN not in text:
        return _Secret(_checked(text))
    if "PRIVATE KEY" not in text:
        raise ValueError("a key that signs is private: this is a public key or a certificate")
    return _PrivateKey(_loaded(text, "private"))


def verification_key(text: str) -> VerificationKey:
    """The key in this text: a secret, or a public key in PEM. Raises `ValueError`, without the key."""
    text = text.strip()
    if _BEGIN not in text:
        return _Secret(_checked(text))
    if "PRIVATE KEY" in text:
        raise ValueError("give the public key to who only verifies: openssl pkey -in private.pem -pubout")
    return _PublicKey(_loaded(text, "public"))


def _checked(text: str) -> bytes:
    if text.startswith(_UNFRAMED):
        raise ValueError("an Ed25519 key is given as PEM, with its lines -----BEGIN … KEY----- and -----END …")
    if len(text) < SHORTEST_SECRET:
        raise ValueError(
            f"too short: a secret has {SHORTEST_SECRET} characters at least, this one {len(text)}; "
            "make one with: openssl rand -base64 32"
        )
    return text.encode("utf-8", "surrogatepass")


def _loaded(text: str, kind: str) -> Any:
    """The key of a PEM text, whose line ends may be written as ``\\n`` (as in environment files)."""
    try:
        serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
        ed25519 = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
    except ImportError:
        raise ValueError("Ed25519 needs the package cryptography: pip install 'amqptasks[ed25519]'") from None
    data = text.replace("\\n", "\n").encode("utf-8", "surrogatepass")
    try:
        if kind == "private":
            key = serialization.load_pem_private_key(data, password=None)
        else:
            key = serialization.load_pem_public_key(data)
    except TypeError:
        raise ValueError("the key is encrypted: give it without a password, from a secret store") from None
    except Exception:  # the library's own texts may quote the key
        raise ValueError(f"not a {kind} key in PEM that can be read") from None
    wanted = ed25519.Ed25519PrivateKey if kind == "private" else ed25519.Ed25519PublicKey
    if not isinstance(key, wanted):
        name = type(key).__name__.lstrip("_").removesuffix("PrivateKey").removesuffix("PublicKey")
        raise ValueError(f"the algorithm {name} is not known here; use an Ed25519 key, or a secret for HMAC-SHA256")
    return key

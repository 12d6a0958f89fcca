"""The section `security`: keys of messages' signatures."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from amqptasks.protocol.keys import signing_key, verification_key
from amqptasks.protocol.signing import Keyring

__all__ = ["SecuritySettings"]


def _signs(value: SecretStr) -> SecretStr:
    signing_key(value.get_secret_value())
    return value


def _verifies(value: SecretStr) -> SecretStr:
    verification_key(value.get_secret_value())
    return value


class SecuritySettings(BaseModel):
    """Signatures of messages. Off without keys. With them a worker takes only messages that they signed, and
    dead-letters others (reason `rejected`). See [security](security.md)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    signing_key: Annotated[SecretStr, AfterValidator(_signs)] | None = Field(
        None,
        description="Signs what this process sends, and verifies: a secret of 32 characters or more (HMAC-SHA256), or "
        "an Ed25519 private key in PEM.",
    )
    verification_keys: tuple[Annotated[SecretStr, AfterValidator(_verifies)], ...] = Field(
        (), description="Further keys that verify: secrets, or Ed25519 public keys in PEM."
    )
    accept_unsigned: bool | None = Field(
        None,
        description="True takes messages without a signature too, for the time until every sender signs. False says "
        "what is the default, and makes it an error when the keys are missing.",
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.accept_unsigned is not None and self.keyring() is None:
            raise ValueError("accept_unsigned stands without a key, so nothing would be signed: set signing_key")
        return self

    def keyring(self) -> Keyring | None:
        """The keys; None where signing is off."""
        return Keyring.read(
            None if self.signing_key is None else self.signing_key.get_secret_value(),
            [one.get_secret_value() for one in self.verification_keys],
            accept_unsigned=bool(self.accept_unsigned),
        )

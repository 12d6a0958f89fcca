"""The section `security`: keys from file, environment and mounted secrets; problems in one line, without the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amqptasks.config import masked_dump

SECRET, OTHER = "hidden-" * 6, "covert-" * 6
BOTH = f"security: {{signing_key: '{SECRET}', verification_keys: ['{OTHER}']}}"


def test_without_keys_nothing_is_signed(load):
    assert load("").security.keyring() is None
    assert load("security:").security.keyring() is None


def test_keys_come_from_the_file_the_environment_and_mounted_secrets(load, tmp_path: Path):
    file = tmp_path / "key"
    file.write_text(SECRET + "\n")
    wanted = str(load(BOTH).security.keyring())
    assert "signs" in wanted
    assert "verifies" in wanted
    environ = {"AMQPTASKS_SECURITY__SIGNING_KEY": SECRET, "AMQPTASKS_SECURITY__VERIFICATION_KEYS": OTHER}
    assert str(load("", environ).security.keyring()) == wanted
    environ = {
        "AMQPTASKS_SECURITY__SIGNING_KEY_FILE": str(file),
        "AMQPTASKS_SECURITY__VERIFICATION_KEYS__0": OTHER,
    }
    assert str(load("", environ).security.keyring()) == wanted
    assert str(load("security: {signing_key: '${KEY}', verification_keys: ['${OLD}']}", {"KEY": SECRET, "OLD": OTHER})
               .security.keyring()) == wanted  # fmt: skip


def test_keys_are_masked(load):
    settings = load(BOTH)
    text = json.dumps(masked_dump(settings)) + repr(settings) + str(settings.security)
    assert "hidden" not in text
    assert "covert" not in text
    assert masked_dump(settings)["security"]["verification_keys"] == ["***"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("security:\n  signing_key: hidden", "app.yaml:2: security.signing_key: too short: a secret has 32 characters"),
        ("security:\n  verification_keys: [hidden]", "app.yaml:2: security.verification_keys[0]: too short"),
        ("security:\n  signing_key: 5", "app.yaml:2: security.signing_key: must be a valid string"),
        ("security:\n  signing_keys: x", "unknown key; did you mean 'signing_key'?"),
        ("security:\n  accept_unsigned: false", "accept_unsigned stands without a key"),
        (f"security:\n  signing_key: {SECRET}\n  accept_unsigned: perhaps", "accept_unsigned: must be a valid boolean"),
        ("security:\n  signing_key: ''", "too short"),
        ("security:\n  signing_key: |\n    -----BEGIN PRIVATE KEY-----\n    hidden\n    -----END PRIVATE KEY-----\n",
         "not a private key in PEM that can be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line_without_the_key(problems, text, line):
    found = problems(text)
    assert len(found) == 1
    assert line in found[0]
    assert "hidden" not in found[0]


def test_a_key_file_that_cannot_be_read_is_named(problems, tmp_path: Path):
    (found,) = problems("", {"AMQPTASKS_SECURITY__SIGNING_KEY_FILE": str(tmp_path / "none")})
    assert found.startswith("AMQPTASKS_SECURITY__SIGNING_KEY_FILE: ")
    assert "cannot be read: No such file" in found


def test_an_empty_key_file_does_not_switch_signing_off(problems, tmp_path: Path):
    (tmp_path / "key").write_text("\n")
    (found,) = problems("", {"AMQPTASKS_SECURITY__SIGNING_KEY_FILE": str(tmp_path / "key")})
    assert "too short" in found

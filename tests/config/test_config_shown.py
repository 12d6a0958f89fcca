"""What is shown of the settings: masked values, the schema, the reference, and what importing costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from amqptasks.config import Settings, load_settings, mask_url, masked_dump, settings_schema

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("amqp://shop:secret@h:5672/v", "amqp://shop:***@h:5672/v"),
        ("amqps://shop:p@ss/w:rd@h/v", "amqps://shop:***@h/v"),
        ("redis://:secret@h/0", "redis://:***@h/0"),
        ("postgresql+psycopg://u:secret@h/db", "postgresql+psycopg://u:***@h/db"),
        ("amqp://a:b@h/,amqp://c:d@i/", "amqp://a:***@h/,amqp://c:***@i/"),
        ("cannot reach amqp://a:b@h/ now", "cannot reach amqp://a:***@h/ now"),
        ("redis://h/0?password=secret&db=1", "redis://h/0?password=***&db=1"),
        ("amqp://guest@h/", "amqp://guest@h/"),
        ("amqp://h:5672/", "amqp://h:5672/"),
        ("rpc://", "rpc://"),
        ("no url", "no url"),
    ],
)
def test_a_password_in_a_url_is_masked(url, masked):
    assert mask_url(url) == masked


def test_a_masked_dump_has_no_secret_and_is_plain():
    settings = load_settings(
        environ={},
        data={
            "broker": {"url": ["amqp://u:hidden@h/"], "management_url": "http://u:hidden@h"},
            "result": {"backend": "redis://:hidden@h"},
            "sentry": {"dsn": "https://hidden@sentry.example/1"},
            "schedule": {"a": {"task": "t", "every": 5, "kwargs": {"api_key": "hidden", "n": [1, "redis://:hidden@h"]}}},
        },
    )  # fmt: skip
    text = json.dumps(masked_dump(settings))
    assert "hidden" not in text
    assert yaml.safe_load(yaml.safe_dump(masked_dump(settings)))["sentry"]["dsn"] == "***"
    assert masked_dump(load_settings(environ={}, data={}))["sentry"]["dsn"] is None


def test_what_is_shown_can_be_loaded_again():
    settings = load_settings(ROOT / "config/amqptasks.yaml", environ={})
    again = load_settings(environ={}, data=masked_dump(settings))
    assert again.model_dump(exclude={"broker"}) == settings.model_dump(exclude={"broker"})


def test_settings_are_frozen():
    settings = load_settings(environ={}, data={})
    with pytest.raises(ValidationError):
        settings.app = "x"


def test_the_schema_knows_every_key_and_takes_what_people_write():
    schema = json.loads(json.dumps(settings_schema()))
    assert set(schema["properties"]) == set(Settings.model_fields)
    assert schema["additionalProperties"] is False
    definitions = schema["$defs"]

    def kinds(section: str, key: str) -> set[str]:
        field, found = definitions[section]["properties"][key], set()
        stack = [field]
        while stack:
            node = stack.pop()
            stack += node.get("anyOf", [])
            found |= {node["type"]} if "type" in node else set()
        assert field["description"]
        return found

    assert kinds("BrokerSettings", "url") == {"string", "array"}
    assert kinds("BrokerSettings", "heartbeat") >= {"number", "string"}
    assert kinds("QueueSettings", "message_ttl") == {"number", "string", "null"}
    assert kinds("QueueSettings", "concurrency") == {"integer", "string", "null"}
    assert kinds("WorkerSettings", "max_memory_per_child") == {"integer", "string", "null"}
    assert kinds("TaskSettings", "rate_limit") == {"number", "string", "null"}


def test_every_setting_has_a_description():
    for name, section in settings_schema()["$defs"].items():
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}.{key}"


def test_the_reference_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "scripts/config-reference", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_configuration_imports_no_client_no_screen_and_no_loop():
    code = "import sys, amqptasks.config; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    imported = set(done.stdout.split())
    assert "amqptasks.config" in imported
    assert not imported & {"click", "rich", "pika", "aio_pika", "asyncio", "pydantic_settings", "structlog"}

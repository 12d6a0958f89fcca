"""`amqptasks report`."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from amqptasks import __version__
from amqptasks.cli import cli

CONFIG = """
broker: {url: "amqp://shop:s3cret@rabbit/shop", management_url: "http://shop:s3cret@rabbit:15672"}
security: {signing_key: "a very long and secret sentence of words"}
sentry: {dsn: "https://hidden@sentry.example/1"}
queues: {email: {concurrency: 2}}
"""


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_it_tells_versions_and_settings_and_no_secret(tmp_path: Path, options: list[str]) -> None:
    file = tmp_path / "amqptasks.yaml"
    file.write_text(CONFIG)
    done = CliRunner().invoke(cli, ["--config", str(file), "report", *options], catch_exceptions=False)
    assert done.exit_code == 0
    for secret in ("s3cret", "secret sentence", "hidden"):
        assert secret not in done.output
    told = json.loads(done.output) if options else yaml.safe_load(done.output)
    assert told["packages"]["amqptasks"] == __version__
    assert told["packages"].keys() >= {"pika", "aio-pika", "pydantic", "structlog"}
    assert platform.python_version() in told["python"]
    assert told["settings"]["queues"]["email"] == {"concurrency": 2}
    assert told["settings"]["broker"]["url"] == ["amqp://shop:***@rabbit/shop"]

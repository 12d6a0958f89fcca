"""Loading a file from text, without the process's environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from amqptasks.config import Settings, load_settings
from amqptasks.errors import ConfigError

Load = Callable[..., Settings]
Problems = Callable[..., list[str]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Settings of YAML text, environment and overrides. The file is ``app.yaml``."""
    monkeypatch.chdir(tmp_path)

    def make(text: str = "", environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        Path("app.yaml").write_text(dedent(text), encoding="utf-8")
        return load_settings("app.yaml", environ=environ or {}, overrides=overrides)

    return make


@pytest.fixture
def problems(load: Load) -> Problems:
    """The problems of YAML text, environment and overrides."""

    def make(text: str = "", environ: Mapping[str, str] | None = None, **overrides: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, environ, **overrides)
        return str(caught.value).splitlines()

    return make

"""Alert rules, dashboard and the page about them: what they name exists, and the alerts fire when they should.

Prometheus's own `promtool` runs the rules; it is installed where it is missing.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from amqptasks.testing.servers import PrometheusServer
from amqptasks.worker.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "helm" / "amqptasks" / "files" / "alerts.yaml"
DASHBOARD = ROOT / "helm" / "amqptasks" / "files" / "dashboard.json"
TESTS = ROOT / "tests" / "alerts.test.yaml"
PAGE = ROOT / "docs" / "monitoring.md"


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def named(expression: str) -> set[str]:
    """The metric families that an expression names."""
    names = set(re.findall(r"\b(?:celery|amqptasks)_\w+", expression))
    return {re.sub(r"_(bucket|sum|count)$", "", name) if name not in CATALOGUE else name for name in names}


@pytest.fixture(scope="module")
def promtool() -> str:
    PrometheusServer.install()
    return PrometheusServer.find("promtool")


@pytest.mark.parametrize("command", [("check", "rules", RULES), ("test", "rules", TESTS)], ids=["check", "test"])
def test_promtool_finds_the_rules_sound_and_each_fires_when_it_should(
    promtool: str, command: tuple[str | Path, ...]
) -> None:
    done = subprocess.run([promtool, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_is_tested_quiet_and_firing() -> None:
    cases = [one for test in yaml.safe_load(TESTS.read_text())["tests"] for one in test["alert_rule_test"]]
    for rule in rules():
        outcomes = {bool(one["exp_alerts"]) for one in cases if one["alertname"] == rule["alert"]}
        assert outcomes == {True, False}, rule["alert"]


def test_rules_and_dashboard_name_metrics_that_a_worker_has() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    expressions += [rule["expr"] for rule in rules()]
    for expression in expressions:
        assert named(expression) <= set(CATALOGUE), expression


def test_the_page_says_of_every_metric_and_alert_what_the_code_says() -> None:
    text = PAGE.read_text()
    for metric in CATALOGUE.values():
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
        assert f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |" in text, metric.name
    shown = set(re.findall(r"^\| `((?:celery|amqptasks)_\w+)` \|", text, re.MULTILINE))
    assert shown == set(CATALOGUE)
    assert set(re.findall(r"^\| `(Amqptasks\w+)` \|", text, re.MULTILINE)) == {rule["alert"] for rule in rules()}

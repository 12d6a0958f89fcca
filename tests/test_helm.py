"""The Helm chart: its values and their schema, and what the real Helm makes of them.

Rendering needs `helm`, or npm to fetch it (scripts/helm). Where neither is, the chart's own files are checked, and the
run says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from amqptasks.config import load_settings
from amqptasks.config.quantities import parse_seconds
from amqptasks.testing.rabbitmq import free_port

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "amqptasks"
MINIMAL, RICH = (CHART / "ci" / f"{name}-values.yaml" for name in ("minimal", "rich"))
OPERATOR = {"monitoring.coreos.com/v1"}
CAN_RENDER = shutil.which("helm") is not None or shutil.which("npm") is not None
WORKERS = {MINIMAL: {"default"}, RICH: {"default", "payments", "mail", "media", "beat"}}


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    return content


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """As Helm does it: tables are merged, null takes a key away, everything else is replaced."""
    result = deepcopy(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def values_of(*files: Path) -> dict[str, Any]:
    result = read(CHART / "values.yaml")
    for file in files:
        result = merged(result, read(file))
    return result


def schema() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return content


# -- without Helm -------------------------------------------------------------------------------------------------


def test_the_run_says_how_the_chart_is_checked(capsys):
    how = "values and schema only: neither helm nor npm is here"
    if CAN_RENDER:
        done = helm("version", "--short")
        assert done.returncode == 0, done.stderr
        how = f"values, schema, and rendered by Helm {done.stdout.strip()}"
    with capsys.disabled():
        print(f"\nchart: {how}")


@pytest.mark.parametrize("files", [(), (MINIMAL,), (RICH,)], ids=["default", "minimal", "rich"])
def test_values_fit_their_schema_and_their_settings_load(files):
    jsonschema.Draft7Validator.check_schema(schema())
    values = values_of(*files)
    jsonschema.validate(values, schema(), jsonschema.Draft7Validator)
    settings = load_settings(data=values["config"], environ={})
    for worker in values["workers"].values():
        assert set(worker["queues"]) <= set(settings.queues)
        patience = worker.get("terminationGracePeriodSeconds", values["terminationGracePeriodSeconds"])
        assert patience > settings.worker.grace_period + 5


def test_every_value_is_in_the_schema_and_every_key_of_the_schema_in_the_values():
    def keys(table: dict[str, Any], node: dict[str, Any], path: str = "") -> None:
        assert set(table) == set(node["properties"]) - {"global", "minAvailable", "maxUnavailable"}, path
        for key, below in node["properties"].items():
            if "properties" in below:
                keys(table[key], below, f"{path}.{key}")

    keys(read(CHART / "values.yaml"), schema())


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"worker": {}}, []),
        ({"livenessProbe": {"exec": {}}}, ["livenessProbe"]),
        ({"http": {"port": 80}}, ["http", "port"]),
        ({"podMonitor": {"interval": "often"}}, ["podMonitor", "interval"]),
        ({"prometheusRule": {"disabled": "AmqptasksTaskSlow"}}, ["prometheusRule", "disabled"]),
        ({"image": {"tag": 1.4}}, ["image", "tag"]),
        ({"broker": {"url": "redis://h"}}, ["broker", "url"]),
        ({"config": {"app": "shop:app"}}, ["config"]),
        ({"workers": {"high_priority": {"queues": ["default"]}}}, ["workers"]),
        ({"workers": {"mail": {}}}, ["workers", "mail"]),
        ({"workers": {"mail": {"queues": "default"}}}, ["workers", "mail", "queues"]),
        ({"workers": {"mail": {"queues": ["default"], "concurency": 1}}}, ["workers", "mail"]),
        ({"workers": {"mail": {"queues": ["default"], "concurrency": "4"}}}, ["workers", "mail", "concurrency"]),
        ({"workers": {"mail": {"queues": ["default"], "pool": "eventlet"}}}, ["workers", "mail", "pool"]),
        ({"workers": {"default": None}}, ["workers"]),
        ({"podDisruptionBudget": {"minAvailable": 1, "maxUnavailable": 1}}, ["podDisruptionBudget"]),
        ({"extraEnv": {"NAME": "value"}}, ["extraEnv"]),
    ],
)
def test_the_schema_refuses_what_would_be_ignored_or_break(values, where):
    (error,) = jsonschema.Draft7Validator(schema()).iter_errors(merged(values_of(MINIMAL), values))
    assert list(error.absolute_path) == where


# -- with Helm ----------------------------------------------------------------------------------------------------


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "helm"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def template(*arguments: str) -> subprocess.CompletedProcess[str]:
    return helm("template", "shop", str(CHART), "--namespace", "shop", "--kube-version", "1.30", *arguments)


@cache
def manifests(*arguments: str) -> list[dict[str, Any]]:
    done = template(*arguments)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def of_kind(kind: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """The manifests of a kind by their worker, or by name."""
    found = [one for one in manifests(*arguments) if one["kind"] == kind]
    labels = "app.kubernetes.io/component"
    return {one["metadata"]["labels"].get(labels, one["metadata"]["name"]): one for one in found}


def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (one,) = pod(deployment)["containers"]
    return dict(one)


def settings_text(*arguments: str) -> str:
    (text,) = [
        one["data"]["amqptasks.yaml"] for one in manifests(*arguments) if "amqptasks.yaml" in one.get("data", {})
    ]
    return str(text)


class TestRendered:
    __test__ = CAN_RENDER

    @pytest.mark.parametrize("file", [None, MINIMAL, RICH], ids=["default", "minimal", "rich"])
    def test_lint_finds_nothing(self, file):
        done = helm("lint", "--strict", str(CHART), *(["-f", str(file)] if file else []))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[WARNING]" not in done.stdout + done.stderr
        if file is not None:
            assert done.stderr == ""

    @pytest.mark.parametrize("version", ["1.25", "1.30", kubernetes_validate.latest_version()])
    @pytest.mark.parametrize("file", [MINIMAL, RICH], ids=["minimal", "rich"])
    def test_every_manifest_is_valid_for_kubernetes(self, file, version):
        for manifest in manifests("-f", str(file)):
            if manifest["apiVersion"] in OPERATOR:
                continue  # kubernetes-validate knows no types but Kubernetes' own
            kubernetes_validate.validate(manifest, version, strict=True)

    @pytest.mark.parametrize("file", [MINIMAL, RICH], ids=["minimal", "rich"])
    def test_there_is_a_deployment_per_worker_that_selects_its_own_pods(self, file):
        deployments = of_kind("Deployment", "-f", str(file))
        assert set(deployments) == WORKERS[file]
        selectors = []
        for one in deployments.values():
            selectors.append(one["spec"]["selector"]["matchLabels"])
            assert selectors[-1].items() <= one["spec"]["template"]["metadata"]["labels"].items()
        assert len({json.dumps(one) for one in selectors}) == len(selectors)

    @pytest.mark.parametrize("file", [MINIMAL, RICH], ids=["minimal", "rich"])
    def test_pods_have_no_rights(self, file):
        for deployment in of_kind("Deployment", "-f", str(file)).values():
            spec, worker = pod(deployment), container(deployment)
            assert spec["automountServiceAccountToken"] is False
            assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
            assert worker["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }

    @pytest.mark.parametrize(("file", "port"), [(MINIMAL, 9808), (RICH, 9900)], ids=["minimal", "rich"])
    def test_pods_are_probed_and_scraped_where_the_worker_listens(self, file, port):
        values = values_of(file)
        for deployment in of_kind("Deployment", "-f", str(file)).values():
            worker = container(deployment)
            assert worker["ports"] == [{"name": "http", "containerPort": port}]
            assert worker["args"][worker["args"].index("--http") + 1] == f":{port}"
            for probe, path in (
                ("startupProbe", "/startupz"),
                ("livenessProbe", "/livez"),
                ("readinessProbe", "/readyz"),
            ):
                assert worker[probe] == {"httpGet": {"path": path, "port": "http"}, **values[probe]}
            assert worker.get("lifecycle", {}) == values["lifecycle"]

    def test_monitoring_is_made_on_demand(self):
        assert not any(of_kind(kind, "-f", str(MINIMAL)) for kind in ("PodMonitor", "PrometheusRule"))
        (monitor,) = of_kind("PodMonitor", "-f", str(RICH)).values()
        assert monitor["metadata"]["labels"]["release"] == "monitoring"
        assert monitor["spec"]["podMetricsEndpoints"] == [{"port": "http", "path": "/metrics", "interval": "15s"}]
        for deployment in of_kind("Deployment", "-f", str(RICH)).values():
            labels = deployment["spec"]["template"]["metadata"]["labels"]
            assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
        dashboards = [one for one in manifests("-f", str(RICH)) if "amqptasks.json" in one.get("data", {})]
        assert [one["metadata"]["labels"]["grafana_dashboard"] for one in dashboards] == ["1"]
        shown = json.loads(dashboards[0]["data"]["amqptasks.json"])
        assert shown == json.loads((CHART / "files" / "dashboard.json").read_text())

    def test_the_rules_are_those_of_the_file_but_the_disabled_ones_and_the_users_own(self):
        (made,) = of_kind("PrometheusRule", "-f", str(RICH)).values()
        (group,) = made["spec"]["groups"]
        ours = {one["alert"]: one for one in read(CHART / "files" / "alerts.yaml")["groups"][0]["rules"]}
        shown = {one["alert"]: one for one in group["rules"]}
        assert set(shown) == set(ours) - {"AmqptasksTaskSlow"} | {"MediaSlow"}
        assert all(shown[name] == ours[name] for name in shown if name in ours)

    def test_a_worker_has_its_own_size_and_patience(self):
        deployments = of_kind("Deployment", "-f", str(RICH))
        assert [deployments[one]["spec"].get("replicas") for one in ("payments", "mail", "media", "beat")] == [
            3, None, 0, 3,
        ]  # fmt: skip
        patience = {name: pod(one)["terminationGracePeriodSeconds"] for name, one in deployments.items()}
        assert patience == {"default": 120, "payments": 120, "mail": 120, "media": 660, "beat": 120}
        assert container(deployments["payments"])["resources"]["limits"] == {"memory": "512Mi"}
        assert container(deployments["mail"])["args"][5:] == [
            "-Q",
            "email,legacy",
            "--http",
            ":9900",
            "-c",
            "200",
            "-P",
            "asyncio",
        ]

    def test_the_config_map_holds_the_settings_as_they_were_given(self):
        as_read = load_settings(data=yaml.safe_load(settings_text("-f", str(RICH))), environ={})
        assert as_read == load_settings(data=values_of(RICH)["config"], environ={})
        assert as_read.queues["email"].max_length == 100_000_000

    @pytest.mark.parametrize(
        ("file", "name"), [(file, name) for file, names in WORKERS.items() for name in sorted(names)]
    )
    def test_the_command_of_each_worker_starts_and_looks_for_its_broker(self, tmp_path, file, name):
        """The container's command with its files under `tmp_path`. No broker listens on port 1."""
        worker = container(of_kind("Deployment", "-f", str(file))[name])
        for mount, text in {
            "amqptasks/amqptasks.yaml": settings_text("-f", str(file)),
            "amqptasks-broker/url": "amqp://guest:guest@127.0.0.1:1/\n",
            "sentry/dsn": "",
        }.items():
            (tmp_path / mount).parent.mkdir()
            (tmp_path / mount).write_text(text)
        given = {one["name"]: one["value"] for one in worker["env"] if "__TLS__" not in one["name"]}
        given = {key: value.replace("/etc/", f"{tmp_path}/") for key, value in given.items()}
        arguments = [one.replace("/etc/", f"{tmp_path}/") for one in worker["args"]]
        arguments[arguments.index("--http") + 1] = f"127.0.0.1:{free_port()}"
        own = {key: value for key, value in os.environ.items() if not key.startswith("AMQPTASKS_")}
        done = subprocess.run(
            [sys.executable, "-m", *worker["command"], *arguments],
            cwd=tmp_path,
            env={**own, **given, "PYTHONPATH": str(ROOT), "AMQPTASKS_BROKER__CONNECTION_RETRY_ON_STARTUP": "no"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert "127.0.0.1:1" in done.stderr.splitlines()[-1]
        assert "broker  amqp://guest:***@127.0.0.1:1/" in done.stderr
        if name == "beat":
            assert "  . nightly-report " in done.stderr
            return
        for queue in values_of(file)["workers"][name]["queues"]:
            assert f"  . {queue} " in done.stderr

    def test_the_url_is_in_a_secret_and_nowhere_else(self):
        (secret,) = of_kind("Secret", "-f", str(RICH)).values()
        assert secret["stringData"]["url"].startswith("amqps://shop:s3cret@")
        others = [one for one in manifests("-f", str(RICH)) if one is not secret and one["kind"] != "Secret"]
        assert "s3cret" not in json.dumps(others)
        for file, name, key in ((RICH, secret["metadata"]["name"], "url"), (MINIMAL, "shop-broker", "amqp")):
            arguments = ("-f", str(file), "--set", f"broker.existingSecretKey={key}")
            for deployment in of_kind("Deployment", *arguments).values():
                volumes = {one["name"]: one for one in pod(deployment)["volumes"]}
                mounts = {one["name"]: one["mountPath"] for one in container(deployment)["volumeMounts"]}
                url = {one["name"]: one["value"] for one in container(deployment)["env"]}["AMQPTASKS_BROKER__URL_FILE"]
                assert volumes["broker"]["secret"]["secretName"] == name
                assert url == f"{mounts['broker']}/{key}"
                assert set(mounts) == set(volumes)

    def test_pods_are_replaced_when_settings_or_url_change_and_only_then(self):
        def sums(*arguments: str) -> dict[str, str]:
            deployment = of_kind("Deployment", "-f", str(RICH), *arguments)["mail"]
            annotations: dict[str, str] = deployment["spec"]["template"]["metadata"]["annotations"]
            return {key: value for key, value in annotations.items() if key.startswith("checksum/")}

        before = sums()
        assert set(before) == {"checksum/config", "checksum/broker"}
        assert sums("--set", "workers.mail.replicas=7") == before
        assert sums("--set", "config.queues.media.concurrency=3")["checksum/config"] != before["checksum/config"]
        assert sums("--set", "broker.url=amqp://h/")["checksum/broker"] != before["checksum/broker"]

    def test_disruption_budgets_are_per_worker_and_only_on_demand(self):
        assert of_kind("PodDisruptionBudget", "-f", str(MINIMAL)) == {}
        budgets = of_kind("PodDisruptionBudget", "-f", str(RICH))
        for name, deployment in of_kind("Deployment", "-f", str(RICH)).items():
            assert budgets[name]["spec"] == {"minAvailable": "50%", "selector": deployment["spec"]["selector"]}
        enabled = ("-f", str(MINIMAL), "--set", "podDisruptionBudget.enabled=true")
        for more, expected in (((), 1), (("--set", "podDisruptionBudget.maxUnavailable=0"), 0)):
            (budget,) = of_kind("PodDisruptionBudget", *enabled, *more).values()
            assert budget["spec"]["maxUnavailable"] == expected

    def test_null_takes_the_default_worker_away(self):
        arguments = ("-f", str(RICH), "--set", "workers.default=null")
        assert set(of_kind("Deployment", *arguments)) == {"payments", "mail", "media", "beat"}

    @pytest.mark.parametrize(
        ("file", "arguments", "sentence"),
        [
            (None, [], "set image.repository"),
            (MINIMAL, ["image.tag="], "set image.tag"),
            (MINIMAL, ["app="], "set app, as `amqptasks -A` names it"),
            (MINIMAL, ["broker.existingSecret="], "set broker.existingSecret to the name of a Secret"),
            (MINIMAL, ["broker.url=amqp://h/"], "set either broker.url or broker.existingSecret, not both"),
            (MINIMAL, ["workers.default.queues={email}"], 'workers.default: queue "email" is not in config.queues'),
            (MINIMAL, ["terminationGracePeriodSeconds=35"], "workers.default: terminationGracePeriodSeconds (35) must"),
            (MINIMAL, ["workers.default.terminationGracePeriodSeconds=5"], "terminationGracePeriodSeconds (5) must be"),
            (RICH, ["workers.beat.queues={default}"], "workers.beat: this is the name of the scheduler's Deployment"),
            (MINIMAL, ["probes.enabled=true"], "Additional property probes is not allowed"),
            (MINIMAL, ["workers.default.concurrency=0"], "workers.default.concurrency: Must be greater than or equal"),
        ],
    )  # fmt: skip
    def test_what_cannot_work_is_refused_with_a_sentence(self, file, arguments, sentence):
        files = ["-f", str(file)] if file else []
        done = template(*files, *(part for one in arguments for part in ("--set", one)))
        assert done.returncode == 1
        assert sentence in done.stderr

    def test_the_default_queue_needs_no_entry(self):
        arguments = ("--set", "config.queues=null", "--set", "workers.default.queues={default}")
        assert set(of_kind("Deployment", "-f", str(MINIMAL), *arguments)) == {"default"}
        arguments = ("--set", "config.topology.default_queue=mail", "--set", "workers.default.queues={mail}")
        assert set(of_kind("Deployment", "-f", str(MINIMAL), *arguments)) == {"default"}

    @pytest.mark.parametrize("grace", ["0", "30", "90s", "1m30s", "1.5 h", "2500ms"])
    def test_the_kubelet_waits_longer_than_the_worker_however_the_duration_is_written(self, grace):
        limit = int(parse_seconds(grace) + 5)

        def exit_code(seconds: int) -> int:
            settings = ("--set-string", f"config.worker.grace_period={grace}")
            return template(
                "-f", str(MINIMAL), *settings, "--set", f"terminationGracePeriodSeconds={seconds}"
            ).returncode

        assert (exit_code(limit), exit_code(limit + 1)) == (1, 0)

    def test_the_package_holds_the_chart_and_not_the_tests_values(self, tmp_path):
        done = helm("package", str(CHART), "--destination", str(tmp_path))
        assert done.returncode == 0, done.stderr
        (archive,) = tmp_path.iterdir()
        with tarfile.open(archive) as package:
            names = {name.removeprefix("amqptasks/") for name in package.getnames()}
        assert names >= {"Chart.yaml", "values.yaml", "values.schema.json", "templates/NOTES.txt"}
        assert not any(name.startswith("ci/") for name in names)

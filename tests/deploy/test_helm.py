"""The Helm chart: it renders for each example, its manifests are valid, and Cairn reads the configuration in them.

helm, kubectl and the schemas are in .build/charts, where `make test` installs them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config.load import load

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".build" / "charts"
CHART = ROOT / "deploy" / "helm" / "cairn"
EXAMPLES = ["defaults", *sorted(path.stem for path in (ROOT / "deploy" / "helm" / "examples").glob("*.yaml"))]
KUBERNETES = "1.37"
OPERATORS = {"ServiceMonitor", "PrometheusRule"}  # kinds of the Prometheus operator, of which there is no schema here

pytestmark = pytest.mark.skipif(not (TOOLS / ".done").exists(), reason="`make test` installs helm and the schemas")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm to its end."""
    command = [str(TOOLS / "bin" / "helm"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def rendered(example: str, release: str = "release") -> list[dict[str, Any]]:
    """Return the manifests of the chart with the values of `example`."""
    values = [] if example == "defaults" else ["-f", str(CHART.parent / "examples" / f"{example}.yaml")]
    run = helm("template", release, str(CHART), *values)
    assert run.returncode == 0, run.stderr
    return [manifest for manifest in yaml.safe_load_all(run.stdout) if manifest]


def of_kind(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the manifests of one kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def is_valid(manifest: dict[str, Any]) -> str | None:
    """Return what is wrong with `manifest` by Kubernetes' own schema, or None."""
    check = "import json, sys, kubernetes_validate as k; k.validate(json.load(sys.stdin), sys.argv[1], strict=True)"
    run = subprocess.run(
        [sys.executable, "-c", check, KUBERNETES],
        input=json.dumps(manifest),
        env={"PYTHONPATH": str(TOOLS)},
        capture_output=True,
        text=True,
        check=False,
    )
    return None if run.returncode == 0 else run.stderr[-2000:]


def test_helm_lint_finds_nothing() -> None:
    """The chart has no error and no warning."""
    run = helm("lint", "--strict", str(CHART))
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_manifest_fits_the_schema_of_kubernetes(example: str) -> None:
    """No unknown field and no wrong type, in strict mode."""
    wrong = {m["kind"]: is_valid(m) for m in rendered(example) if m["kind"] not in OPERATORS}
    assert wrong
    assert {kind: problem for kind, problem in wrong.items() if problem} == {}


@pytest.mark.parametrize("example", EXAMPLES)
def test_cairn_reads_the_configuration_that_the_chart_writes(example: str, tmp_path: Path) -> None:
    """With the secrets where the Deployment mounts them; nothing in it needs a warning."""
    manifests = rendered(example)
    text = next(m for m in of_kind(manifests, "ConfigMap") if "cairn.yaml" in m["data"])["data"]["cairn.yaml"]
    projected = next(
        volume["projected"]["sources"]
        for volume in of_kind(manifests, "Deployment")[0]["spec"]["template"]["spec"]["volumes"]
        if volume["name"] == "secrets"
    )
    for source in projected:
        for item in source["secret"]["items"]:
            (tmp_path / item["path"]).write_text("redis://:password@redis:6379" if "redis" in item["path"] else "key")
    file = tmp_path / "cairn.yaml"
    file.write_text(text.replace("/run/secrets/cairn", str(tmp_path)))
    loaded = load(file, {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "XDG_DATA_HOME": "/var/lib"})  # as in the image
    assert loaded.warnings == ()
    assert loaded.config.admin.token is not None
    assert loaded.config.server.port == 8080


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_pod_may_take_as_long_to_stop_as_cairn_takes_to_drain(example: str) -> None:
    """Kubernetes kills a pod after its grace period."""
    manifests = rendered(example)
    text = next(m for m in of_kind(manifests, "ConfigMap") if "cairn.yaml" in m["data"])["data"]["cairn.yaml"]
    server = yaml.safe_load(text)["server"]
    grace = of_kind(manifests, "Deployment")[0]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= server["drain_accept_seconds"] + server["drain_seconds"] + 5


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_pod_is_restricted(example: str) -> None:
    """Pods pass Kubernetes' restricted standard: no root, no capabilities, a read-only root.

    A pod gets the token of the API only if it follows Services there.
    """
    manifests = rendered(example)
    workloads = of_kind(manifests, "Deployment") + of_kind(manifests, "StatefulSet")
    for pod in (workload["spec"]["template"]["spec"] for workload in workloads):
        asks_the_api = example == "discovery" and pod["containers"][0]["name"] == "cairn"
        assert pod["automountServiceAccountToken"] is asks_the_api
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("example", EXAMPLES)
def test_selectors_find_the_pods_that_they_mean(example: str) -> None:
    """Each Service, PodDisruptionBudget and NetworkPolicy selects the pods of exactly one workload."""
    manifests = rendered(example)
    pods = [
        workload["spec"]["template"]["metadata"]["labels"]
        for workload in of_kind(manifests, "Deployment") + of_kind(manifests, "StatefulSet")
    ]
    selectors = [m["spec"]["selector"] for m in of_kind(manifests, "Service")]
    selectors += [m["spec"]["selector"]["matchLabels"] for m in of_kind(manifests, "PodDisruptionBudget")]
    selectors += [m["spec"]["podSelector"]["matchLabels"] for m in of_kind(manifests, "NetworkPolicy")]
    assert selectors
    for selector in selectors:
        assert sum(selector.items() <= labels.items() for labels in pods) == 1


def test_the_operator_gets_a_monitor_that_finds_the_admin_port_and_the_rules_of_deploy() -> None:
    """The ServiceMonitor selects the admin Service; the PrometheusRule has the groups of alerts.yml."""
    manifests = rendered("monitoring")
    wanted = of_kind(manifests, "ServiceMonitor")[0]["spec"]["selector"]["matchLabels"]
    found = [m for m in of_kind(manifests, "Service") if wanted.items() <= m["metadata"]["labels"].items()]
    assert [m["metadata"]["name"] for m in found] == ["release-cairn-admin"]
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    assert of_kind(manifests, "PrometheusRule")[0]["spec"] == rules
    found_maps = [m["data"] for m in of_kind(manifests, "ConfigMap") if m["metadata"]["name"].endswith("-dashboard")]
    shipped = {
        path.name: json.loads(path.read_text()) for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")
    }
    assert [{name: json.loads(text) for name, text in data.items()} for data in found_maps] == [shipped]


def test_the_links_in_alerts_begin_where_the_operator_keeps_the_documentation() -> None:
    """Grafana and Alertmanager show them, and need whole URLs."""
    values = str(CHART.parent / "examples" / "monitoring.yaml")
    flag = "metrics.prometheusRule.runbookBase=https://git.example.com/cairn/"
    run = helm("template", "release", str(CHART), "-f", values, "--set", flag)
    links = re.findall(r"runbook_url: (\S+)", run.stdout)
    assert links
    assert all(link.startswith("https://git.example.com/cairn/docs/operations.md#cairn") for link in links)


def test_discovery_may_list_and_watch_endpoints_in_its_namespaces_and_nothing_else() -> None:
    """A Role and its binding to the pod's account in each namespace; none without discovery."""
    manifests = rendered("discovery")
    roles, bindings = of_kind(manifests, "Role"), of_kind(manifests, "RoleBinding")
    assert [role["metadata"]["namespace"] for role in roles] == ["models", "default"]
    for role, binding in zip(roles, bindings, strict=True):
        (rule,) = role["rules"]
        assert rule == {
            "apiGroups": ["discovery.k8s.io"],
            "resources": ["endpointslices"],
            "verbs": ["list", "watch"],
        }
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        assert binding["metadata"]["namespace"] == role["metadata"]["namespace"]
        account = of_kind(manifests, "Deployment")[0]["spec"]["template"]["spec"]["serviceAccountName"]
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "default"}]
    assert {"Role", "RoleBinding", "ClusterRole"}.isdisjoint(m["kind"] for m in rendered("defaults"))


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("replicacount=3", "replicacount"),
        ("replicaCount=many", "replicaCount"),
        ("config.server.port=9000", "port"),
        ("image.digest=abc", "digest"),
        ("config.redis.url=redis://mine", "valkey.enabled"),
        ("valkey.enabled=false", "shared Redis"),
        ("config.pools[0].name=a,config.pools[0].replicas[0].url=kubernetes+http://a.b:80", "discovery.enabled"),
        ("discovery.namespaces[0]=Not_One", "namespaces"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(flag: str, problem: str) -> None:
    """A misspelt key, a wrong type, what the chart decides itself, and values that contradict each other."""
    run = helm("template", "release", str(CHART), "--set", flag)
    assert run.returncode != 0
    assert problem in run.stderr


def test_the_kustomization_is_what_the_chart_renders() -> None:
    """deploy/kubernetes is for those without Helm; kubectl builds it, and every manifest is valid."""
    command = [str(TOOLS / "bin" / "kubectl"), "kustomize", str(ROOT / "deploy" / "kubernetes")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    built = [manifest for manifest in yaml.safe_load_all(run.stdout) if manifest]
    assert [problem for manifest in built if (problem := is_valid(manifest))] == []
    assert [_without_helm(m) for m in _in_order(built)] == [
        _without_helm(m) for m in _in_order(rendered("defaults", "cairn"))
    ]


def _in_order(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(manifests, key=lambda manifest: (manifest["kind"], manifest["metadata"]["name"]))


def _without_helm(manifest: Any) -> Any:
    """Return `manifest` without the labels by which Helm finds what it manages."""
    if isinstance(manifest, dict):
        labels = {"helm.sh/chart", "app.kubernetes.io/managed-by"}
        return {key: _without_helm(value) for key, value in manifest.items() if key not in labels}
    return [_without_helm(value) for value in manifest] if isinstance(manifest, list) else manifest

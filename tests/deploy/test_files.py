"""Checks of compose.yaml, the Dockerfile and the provisioning that need neither a Docker engine nor Grafana."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config.load import load
from tests.deploy.queries import (
    DASHBOARDS,
    DEPLOY,
    METRICS,
    PROMETHEUS,
    names_in,
    panel_queries,
    panels,
    problems_of,
    rules,
)

ROOT = DEPLOY.parent
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
READERS = {"cairn-cache", "cairn-internals", "cairn-latency", "cairn-savings"}


def test_the_example_configuration_can_be_served(tmp_path: Path) -> None:
    """With a token where compose puts it; nothing in it needs a warning."""
    (tmp_path / "token").write_text("token")
    loaded = load(DEPLOY / "cairn.yaml", {}, {("admin", "token_file"): str(tmp_path / "token")})
    assert loaded.warnings == ()


def test_every_panel_asks_for_metrics_and_labels_that_exist() -> None:
    """A typo would leave an empty panel."""
    recorded = {name for name, _ in rules("record")}
    assert [(title, p) for title, query in panel_queries() for p in problems_of(query, recorded)] == []


def test_the_dashboards_show_every_metric_there_is() -> None:
    """A new metric gets a panel; of a histogram any part will do."""
    shown = {re.sub("_(bucket|sum|count)$", "", name) for _, query in panel_queries() for name, _ in names_in(query)}
    assert [name for name in METRICS if re.sub("_(bucket|sum|count)$", "", name) not in shown] == []


def test_there_is_a_dashboard_for_each_reader_and_no_panel_twice() -> None:
    """Each is named by its file, leads to the others, and begins with a row; panels do not lie over each other."""
    assert {json.loads(each.read_text())["uid"] for each in DASHBOARDS} == READERS == {d.stem for d in DASHBOARDS}
    titles = [panel["title"] for panel in panels() if panel["type"] != "row"]
    assert len(titles) == len(set(titles))
    for dashboard in DASHBOARDS:
        found = list(panels(dashboard))
        assert found[0]["type"] == "row"
        assert len({panel["id"] for panel in found}) == len(found)
        assert overlaps([panel["gridPos"] for panel in found]) == []
        assert json.loads(dashboard.read_text())["links"][0]["tags"] == ["cairn"]


def test_every_panel_says_what_it_shows() -> None:
    """Even an obvious one has a sentence: the reader may not know the word."""
    assert [panel["title"] for panel in panels() if panel["type"] != "row" and not panel.get("description")] == []


def test_every_alert_leads_to_its_heading_in_operations() -> None:
    """The runbook's link is relative to the documentation."""
    operations = (ROOT / "docs" / "operations.md").read_text()
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"]: rule["annotations"] for group in groups for rule in group["rules"] if "alert" in rule}
    assert {name: notes["runbook_url"] for name, notes in alerts.items()} == {
        name: f"docs/operations.md#{name.lower()}" for name in alerts
    }
    assert re.findall("^### (Cairn.*)$", operations, re.MULTILINE) == list(alerts)


def overlaps(places: list[dict[str, int]]) -> list[tuple[int, int]]:
    """Grid cells that are taken twice or lie outside of the 24 columns."""
    seen: set[tuple[int, int]] = set()
    twice = []
    for at in places:
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                twice += [(x, y)] if (x, y) in seen or x >= 24 else []
                seen.add((x, y))
    return twice


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_the_data_source_that_is_chosen(dashboard: Path) -> None:
    """No data source's own id is in it."""
    assert set(re.findall(r'"uid": "([^"]*)"', dashboard.read_text())) == {"${datasource}", dashboard.stem}
    assert {panel["datasource"]["type"] for panel in panels(dashboard) if "datasource" in panel} == {"prometheus"}


def test_grafana_is_given_the_folder_where_the_dashboard_is() -> None:
    """The provider's path is where compose mounts it, and the data source is compose's Prometheus."""
    provisioning = DEPLOY / "grafana" / "provisioning"
    provider = yaml.safe_load((provisioning / "dashboards" / "cairn.yml").read_text())["providers"][0]
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES["grafana"]["volumes"]}
    assert mounted[provider["options"]["path"]] == "./grafana/dashboards"
    assert mounted["/etc/grafana/provisioning"] == "./grafana/provisioning"
    assert source["url"] == "http://prometheus:9090"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/cairn-savings.json"


@pytest.mark.parametrize("service", SERVICES)
def test_compose_mounts_what_exists_and_publishes_to_loopback(service: str) -> None:
    """With an exact tag, without capabilities."""
    entry = SERVICES[service]
    sources = [volume.split(":")[0] for volume in entry.get("volumes", ())]
    assert all((DEPLOY / source).exists() for source in sources if source.startswith("."))
    assert all(port.startswith("127.0.0.1:") for port in entry.get("ports", ()))
    assert re.fullmatch(r"cairn:local|\S+:v?\d+\.\d+\.\d+(-\w+)?", entry["image"])
    assert entry["cap_drop"] == ["ALL"]


def test_compose_and_the_files_that_it_mounts_agree() -> None:
    """On the token's path, Valkey's name, ports, and the time that a drain may take."""
    config = yaml.safe_load((DEPLOY / "cairn.yaml").read_text())
    scrape = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"][0]
    token = "/run/secrets/" + SERVICES["cairn"]["secrets"][0]
    assert config["admin"]["token_file"] == scrape["authorization"]["credentials_file"] == token
    assert SERVICES["prometheus"]["secrets"] == SERVICES["cairn"]["secrets"]
    assert scrape["static_configs"][0]["targets"] == [f"cairn:{config['admin']['port']}"]
    assert config["redis"]["url"].startswith("redis://valkey:")
    published = {int(port.rsplit(":", 1)[1]) for port in SERVICES["cairn"]["ports"]}
    assert published == {config["server"]["port"], config["admin"]["port"]}


def test_the_image_copies_what_exists_and_does_not_run_as_root() -> None:
    """Every source of a COPY passes the ignore file; the base is an exact one, and not a part of the image."""
    sources = [
        source for line in re.findall(r"^COPY (?!--from).*", DOCKERFILE, re.M) for source in line.split()[1:-1]
    ]
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text()
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}\n" in allowed
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.M) == ["${PYTHON_IMAGE}", "base", "scratch"]
    assert re.search(r"^ARG PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.M)
    assert re.search(r"^USER (?!0)\d+:\d+$", DOCKERFILE, re.M)
    assert DOCKERFILE.index("\nUSER") < DOCKERFILE.index("\nENTRYPOINT")

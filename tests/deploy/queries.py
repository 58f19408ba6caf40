"""Reads the queries of deploy/'s rules and dashboards, and holds them against Cairn's real metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import yaml

from proxy.metrics.definitions import SPECS, Kind

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))

# labels that Prometheus adds, those of its own metrics, and the one of a heatmap's or histogram's buckets
_ADDED = frozenset({"job", "instance"})
_FOREIGN: dict[str, frozenset[str]] = {
    "up": _ADDED,
    "scrape_duration_seconds": _ADDED,
    "ALERTS": _ADDED | {"alertname", "alertstate", "severity"},
}
_SELECTOR = re.compile(r"(?<![\w:$])([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPING = re.compile(r"\b(by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_DURATION = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_WORDS = frozenset({"or", "and", "unless", "by", "on", "without", "ignoring", "bool", "group_left", "group_right"})


def _real_metrics() -> dict[str, frozenset[str]]:
    """Every series name that a scrape can have, with its labels."""
    found: dict[str, frozenset[str]] = {}
    for spec in SPECS:
        name, labels = spec.name, _ADDED | set(spec.labels)
        if spec.kind is Kind.HISTOGRAM:
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[f"{name}_total" if spec.kind is Kind.COUNTER else name] = labels
    return found


METRICS = _real_metrics()


def names_in(query: str) -> Iterator[tuple[str, str]]:
    """Return each metric's name in `query`, with its matchers."""
    bare = _GROUPING.sub(" ", _DURATION.sub(" ", query))
    for found in _SELECTOR.finditer(_without_matched_values(bare)):
        following = bare[found.end() :].lstrip()[:1]
        name, matchers = found[1], found[2] or ""
        if name not in _WORDS and (matchers or following != "("):
            yield name, matchers


def _without_matched_values(query: str) -> str:
    return _STRING.sub(lambda found: '"' + "_" * (len(found[0]) - 2) + '"', query)


def problems_of(query: str, recorded: Set[str] = frozenset()) -> Iterator[str]:
    """Return the names in `query` that no metric of Cairn, of Prometheus or of `recorded` has."""
    known: set[str] = set()
    for name, matchers in names_in(query):
        labels = _ADDED if name in recorded else METRICS.get(name, _FOREIGN.get(name))
        if labels is None:
            yield f"no metric {name}"
            continue
        known |= labels
        yield from (f"{name} has no label {label}" for label in _MATCHER.findall(matchers) if label not in labels)
    for _, labels_text in _GROUPING.findall(query):
        for label in filter(None, map(str.strip, labels_text.split(","))):
            if label not in known:
                yield f"nothing here has a label {label}"


def rules(*kinds: str) -> list[tuple[str, str]]:
    """(name, expression) of the rules of these kinds, of all without one."""
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    wanted = kinds or ("alert", "record")
    return [
        (rule[kind], rule["expr"]) for group in groups for rule in group["rules"] for kind in wanted if kind in rule
    ]


def panels(*dashboards: Path) -> Iterator[dict[str, Any]]:
    """The panels of these dashboards, or of all."""
    for dashboard in dashboards or DASHBOARDS:
        yield from json.loads(dashboard.read_text())["panels"]


def panel_queries() -> list[tuple[str, str]]:
    """(panel's title, query) of all dashboards."""
    return [(panel["title"], target["expr"]) for panel in panels() for target in panel.get("targets", [])]

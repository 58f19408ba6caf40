"""The scrape file and the alert rules, by promtool's own checks and tests."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.queries import PROMETHEUS, problems_of, rules

TESTS = sorted((PROMETHEUS / "tests").glob("*_test.yml"))
LIMIT_SECONDS = 60

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing: apt-get install prometheus"
)


def promtool(*arguments: str | Path) -> str:
    """Return what promtool prints; assert that it succeeds."""
    done = subprocess.run(
        ["promtool", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
        cwd=PROMETHEUS / "tests",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_promtool_accepts_the_scrape_file_and_the_rules() -> None:
    """Their syntax, and every expression in them."""
    promtool("check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", PROMETHEUS / "alerts.yml")


@needs_promtool
def test_every_alert_fires_when_it_should_and_not_otherwise() -> None:
    """Each file is a run of its own, and all run at once."""
    assert TESTS
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda file: promtool("test", "rules", file), TESTS))


def test_every_alert_has_a_test_that_fires_it_and_one_that_does_not() -> None:
    """A rule without either therefore cannot be added."""
    expected: dict[str, set[bool]] = {name: set() for name, _ in rules("alert")}
    for file in TESTS:
        for group in yaml.safe_load(file.read_text())["tests"]:
            for case in group["alert_rule_test"]:
                expected[case["alertname"]].add(bool(case["exp_alerts"]))
    lacking = {name: seen for name, seen in expected.items() if seen != {True, False}}
    assert not lacking


def test_every_rule_asks_for_metrics_and_labels_that_exist() -> None:
    """A typo would leave an alert that never fires."""
    recorded = {name for name, _ in rules("record")}
    found = [(name, problem) for name, expr in rules() for problem in problems_of(expr, recorded)]
    assert not found


def test_every_alert_says_how_urgent_it_is_and_what_to_do() -> None:
    """A summary in one line, a description, and a severity that exists."""
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert_told_well(rule)


def assert_told_well(rule: dict[str, Any]) -> None:
    """They have what a person needs who is woken by the alert."""
    assert rule["labels"]["severity"] in ("page", "ticket", "note")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert re.fullmatch(r"Cairn[A-Z]\w+", rule["alert"])
    assert all("\n" not in text for text in rule["annotations"].values())

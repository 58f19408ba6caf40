"""deploy/'s Prometheus files and dashboard before a real run of Cairn."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.live import LIMIT_SECONDS, Run, running
from tests.deploy.queries import DEPLOY, panel_queries, rules

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus or promtool is missing: apt-get install prometheus",
)

_WINDOW = "60s"  # all of the run
# metrics that have no series in this run, and why; a query may be empty only if it asks for one of them
EMPTY_HERE = {
    "cairn_routing_gain_tokens_total": "the baseline samples; so few requests may all be left out",
    "cairn_contexts": "no context is stored",
    "cairn_contexts_bytes": "no context is stored",
    "cairn_contexts_evictions_total": "no context is dropped",
    "cairn_context_uses_total": "no context is stored",
    "cairn_context_cached_tokens_total": "no context is stored",
    "cairn_contexts_damaged_total": "no context is stored",
    "cairn_usage_inconsistent_total": "the scripted upstreams count right",
    "cairn_upstream_hidden_errors_total": "the scripted upstreams answer errors with their status",
    "cairn_cached_implausible_total": "the scripted upstreams report what they can have cached",
    "cairn_redis_dropped_total": "nothing in Redis is damaged",
    "cairn_background_task_failures_total": "no task fails",
    "cairn_client_refused_total": "the clients stay within the limits",
    "cairn_client_errors_total": "the clients send valid HTTP",
    "cairn_journal_dropped_total": "nothing is lost",
    "cairn_redis_errors_total": "Valkey answers all it is asked",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One run for all tests here."""
    with running(tmp_path_factory.mktemp("live")) as started:
        yield started


def filled(query: str) -> str:
    """A panel's query as Grafana sends it with everything chosen."""
    for variable in ("$__rate_interval", "$__range"):
        query = query.replace(variable, _WINDOW)
    return re.sub(r"\$(job|model|upstream)\b", ".*", query)


def has_figures(rows: list[Any]) -> bool:
    """True where a row has a number."""
    return any(not math.isnan(float(row["value"][1])) for row in rows)


def test_every_query_of_the_dashboard_is_answered_with_data(run: Run) -> None:
    """Exceptions are queries whose metric has no series here, each with its reason."""
    without = [(title, query) for title, query in panel_queries() if not has_figures(run.query(filled(query)))]
    unexplained = [entry for entry in without if not any(re.search(rf"\b{name}\b", entry[1]) for name in EMPTY_HERE)]
    assert not unexplained


def test_every_rule_is_evaluated_without_an_error(run: Run) -> None:
    """And those that are recorded have a value."""
    loaded = [rule for group in run.api("rules")["groups"] for rule in group["rules"]]
    assert len(loaded) == len(rules())
    assert [rule for rule in loaded if rule["health"] != "ok" or rule.get("lastError")] == []
    ratios = [name for name, _ in rules("record") if "timestamp" not in name]  # no reload has failed
    assert [name for name in ratios if not has_figures(run.query(name))] == []


def test_nobody_is_woken_by_a_healthy_run(run: Run) -> None:
    """The target is up, replicas are up, Redis is there."""
    assert [alert["labels"]["alertname"] for alert in run.api("alerts")["alerts"] if alert["state"] == "firing"] == []


def test_both_targets_are_scraped_with_the_token(run: Run) -> None:
    """No scrape has failed."""
    targets = run.api("targets")["activeTargets"]
    assert {target["labels"]["job"]: target["health"] for target in targets} == {"cairn": "up", "prometheus": "up"}


def test_prometheus_counts_what_was_asked(run: Run) -> None:
    """To the request, over both workers, and money is among it."""
    assert run.counted() == run.asked
    assert float(run.query("sum(cairn_workers)")[0]["value"][1]) == 2
    assert float(run.query("sum(cairn_savings_usd_total)")[0]["value"][1]) > 0


def test_promtool_finds_nothing_to_say_about_a_real_scrape(run: Run) -> None:
    """Names, units and help texts are as Prometheus's own linter wants them."""
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=run.scrape,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_the_images_health_check_tells_a_live_proxy_from_a_dead_one(run: Run) -> None:
    """The Dockerfile's own command, with this run's port."""
    found = re.search(r"HEALTHCHECK [^\[]*(\[.*\])", (DEPLOY / "Dockerfile").read_text())
    assert found is not None
    code = re.findall(r'"([^"]*)"', found[1])[2]
    assert "127.0.0.1:8090" in code
    assert health(code.replace("127.0.0.1:8090", run.admin.removeprefix("http://"))) == 0
    assert health(code.replace("127.0.0.1:8090", "127.0.0.1:9")) != 0


def health(code: str) -> int:
    """The exit code of the check."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=LIMIT_SECONDS, check=False
    ).returncode

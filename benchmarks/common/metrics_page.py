"""Read a metrics page in Prometheus' text format. Pure."""

from __future__ import annotations

from collections.abc import Mapping


def parse(page: str) -> dict[str, float]:
    """Return the values by series: name and labels, as on the page."""
    found = {}
    for line in page.splitlines():
        if not line or line.startswith("#"):
            continue
        series, _, rest = line.rpartition("} ") if "{" in line else line.partition(" ")
        value = rest.split()[0]
        found[series + "}" if "{" in line else series] = float(value)
    return found


def gauges_named(series: Mapping[str, float], *names: str) -> dict[str, float]:
    """Return the series of these metrics, with any labels."""
    return {key: value for key, value in series.items() if key.partition("{")[0] in names}


def longest_observed(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float | None:
    """Return the upper bound of the highest bucket of a histogram that grew in between; None if none did.

    All label sets are added up; the bound is infinity if a value was above the last one.
    """
    grown: dict[float, float] = {}
    for key, value in after.items():
        if key.startswith(f"{name}_bucket{{"):
            bound = float(key.partition('le="')[2].partition('"')[0])
            grown[bound] = grown.get(bound, 0.0) + value - before.get(key, 0.0)
    total = grown.get(max(grown, default=0.0), 0.0)
    if total <= 0:
        return None
    return min(bound for bound, count in grown.items() if count >= total)

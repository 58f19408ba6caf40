"""Make tables and a JSON file of samples. Pure except for the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from benchmarks.datapath.contestants import BARE, CAIRN, SGLANG
from benchmarks.datapath.measure import Sample

# Cairn's targets as ratios to other proxies in the same run, by the name of the column.
TARGETS = {
    BARE: {"1 KB": 0.6, "64 KB": 1.0, "512 KB": 1.0, "2 MB": 1.0},
    SGLANG: {"1 KB": 0.5, "64 KB": 0.6, "512 KB": 0.4, "2 MB": 0.33, "chunk": 0.9},
}


class Best(msgspec.Struct, frozen=True):
    """The best of one proxy's rounds in one cell: the least of each figure."""

    proxy: str
    cell: str
    cpu_microseconds: float
    cpu_all_rounds: tuple[float, ...]
    beside_microseconds: dict[str, float]  # supervisor and Valkey, in the round of the least CPU
    p50_milliseconds: float
    p99_milliseconds: float
    per_second: float
    units_per_read: float


def best(samples: Sequence[Sample]) -> Best:
    """Return the best of all rounds of one proxy in one cell."""
    figures = [sample.microseconds("proxy") for sample in samples]
    least = samples[figures.index(min(figures))]
    return Best(
        proxy=least.proxy,
        cell=least.cell,
        cpu_microseconds=min(figures),
        cpu_all_rounds=tuple(round(figure, 1) for figure in figures),
        beside_microseconds={role: least.microseconds(role) for role in least.cpu_seconds if role != "proxy"},
        p50_milliseconds=min(sample.result.p50_seconds for sample in samples) * 1e3,
        p99_milliseconds=min(sample.result.p99_seconds for sample in samples) * 1e3,
        per_second=max(sample.units / sample.result.seconds for sample in samples),
        units_per_read=min(sample.units / max(1, sample.result.reads) for sample in samples),
    )


def summary(samples: Sequence[Sample]) -> dict[tuple[str, str], Best]:
    """Return the best of each proxy in each cell."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.proxy, sample.cell), []).append(sample)
    return {key: best(group) for key, group in groups.items()}


def ratio(bests: Mapping[tuple[str, str], Best], proxy: str, to: str, cell: str) -> float:
    """Return the ratio of two proxies' CPU in the same cell; NaN if one is missing."""
    over, under = bests.get((proxy, cell)), bests.get((to, cell))
    return over.cpu_microseconds / under.cpu_microseconds if over and under else math.nan


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def cpu_table(bests: Mapping[tuple[str, str], Best], proxies: Sequence[str], columns: Sequence[str]) -> Table:
    """Return a table of CPU microseconds per request and per chunk, with Cairn's ratios to the others below."""
    table = Table(title="CPU, microseconds per request (chunk: per streamed chunk), best of the rounds")
    table.add_column("proxy")
    for column in columns:
        table.add_column(column, justify="right")
    for proxy in proxies:
        cells = [bests.get((proxy, column)) for column in columns]
        table.add_row(proxy, *(_number(cell.cpu_microseconds) if cell else "-" for cell in cells))
        for role in ("supervisor", "valkey"):
            beside = [cell.beside_microseconds.get(role) if cell else None for cell in cells]
            if any(value is not None for value in beside):
                table.add_row(f"  its {role}", *("-" if value is None else _number(value) for value in beside))
    table.add_section()
    for to in (other for other in proxies if other != CAIRN and CAIRN in proxies):
        table.add_row(f"{CAIRN} / {to}", *(_ratio(bests, CAIRN, to, column) for column in columns))
    for proxy in (other for other in proxies if other not in (BARE, CAIRN) and BARE in proxies):
        table.add_row(f"{proxy} / {BARE}", *(_ratio(bests, proxy, BARE, column) for column in columns))
    for to, targets in TARGETS.items():
        if CAIRN in proxies and to in proxies:
            wanted = (f"{targets[column]:.2f}" if column in targets else "-" for column in columns)
            table.add_row(f"target, {CAIRN} / {to}", *wanted)
    return table


def _ratio(bests: Mapping[tuple[str, str], Best], proxy: str, to: str, column: str) -> str:
    value = ratio(bests, proxy, to, column)
    if math.isnan(value):
        return "-"
    missed = proxy == CAIRN and value > TARGETS.get(to, {}).get(column, math.inf)
    return f"[red]{value:.2f}[/red]" if missed else f"{value:.2f}"


def latency_table(bests: Mapping[tuple[str, str], Best], proxies: Sequence[str], columns: Sequence[str]) -> Table:
    """Return a table of the p50 and p99 of whole answers, and requests (chunks) per second."""
    table = Table(title="Latency, ms p50 / p99, and requests (chunks) per second, at full load of one machine")
    table.add_column("proxy")
    for column in columns:
        table.add_column(column, justify="right")
    for proxy in proxies:
        texts = []
        for column in columns:
            cell = bests.get((proxy, column))
            texts.append(
                f"{cell.p50_milliseconds:.1f} / {cell.p99_milliseconds:.1f}\n{_number(cell.per_second)}/s"
                if cell
                else "-"
            )
        table.add_row(proxy, *texts)
    return table


def store(path: Path, settings: Mapping[str, object], samples: Sequence[Sample]) -> None:
    """Write settings, the bests and every sample as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "best": list(summary(samples).values()), "samples": samples}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))

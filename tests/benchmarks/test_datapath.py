"""The data path benchmark's own sums: who is who among processes, the best of the rounds, the ratios."""

from __future__ import annotations

import math

import pytest

from benchmarks.common.cpu import Process
from benchmarks.common.load import Result
from benchmarks.datapath.__main__ import parse_arguments
from benchmarks.datapath.contestants import assign_roles
from benchmarks.datapath.measure import Sample, cells, order
from benchmarks.datapath.report import cpu_table, latency_table, ratio, summary


def _sample(proxy: str, round_: int, cpu: float, p99: float = 0.01, units: int = 1000, cell: str = "1 KB") -> Sample:
    result = Result(units, 1.0, 0.001, p99, p99, 0.001, 1000, units, {100: units}, {})
    return Sample(proxy, cell, round_, {"proxy": cpu, "supervisor": 0.001}, units, result)


def test_a_lone_process_is_the_proxy_itself():
    assert assign_roles([Process(1, 0, "python")]) == {"proxy": [1]}


def test_a_supervisor_and_its_valkey_are_counted_beside_the_workers():
    family = [Process(1, 0, "cairn"), Process(2, 1, "valkey-server"), Process(3, 1, "cairn"), Process(4, 1, "cairn")]
    assert assign_roles(family) == {"proxy": [3, 4], "supervisor": [1], "valkey": [2]}
    rewriting = [*family, Process(5, 2, "valkey-server")]
    assert assign_roles(rewriting) == assign_roles(family), "a Valkey's own child is gone before it can be asked"


def test_each_figure_is_the_least_of_the_rounds():
    samples = [_sample("cairn", 0, 0.2, p99=0.005), _sample("cairn", 1, 0.1, p99=0.02)]
    best = summary(samples)["cairn", "1 KB"]
    assert best.cpu_microseconds == pytest.approx(100)
    assert best.cpu_all_rounds == (200.0, 100.0)
    assert best.p99_milliseconds == pytest.approx(5)
    assert best.beside_microseconds == {"supervisor": pytest.approx(1.0)}


def test_ratios_compare_the_same_cell_and_are_nan_without_one():
    bests = summary([_sample("cairn", 0, 0.1), _sample("sglang-router", 0, 0.2)])
    assert ratio(bests, "cairn", "sglang-router", "1 KB") == pytest.approx(0.5)
    assert math.isnan(ratio(bests, "cairn", "vllm-router", "1 KB"))


def test_tables_have_a_row_for_each_proxy_its_companions_and_each_ratio():
    samples = [_sample(name, 0, 0.1) for name in ("bare aiohttp", "cairn", "sglang-router")]
    names = ["bare aiohttp", "cairn", "sglang-router"]
    table = cpu_table(summary(samples), names, ["1 KB"])
    assert list(table.columns[0].cells) == [
        "bare aiohttp",
        "  its supervisor",
        "cairn",
        "  its supervisor",
        "sglang-router",
        "  its supervisor",
        "cairn / bare aiohttp",
        "cairn / sglang-router",
        "sglang-router / bare aiohttp",
        "target, cairn / bare aiohttp",
        "target, cairn / sglang-router",
    ]
    assert latency_table(summary(samples), names, ["1 KB"]).row_count == 3


def test_every_round_begins_with_another_proxy():
    names = ["a", "b", "c"]
    assert [list(order(names, round_)) for round_ in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_large_bodies_are_bounded_in_number_and_streams_have_a_column():
    columns = cells([1024, 2 << 20], chunks=200, seconds=2, connections=16, requests=0, shared_share=0.5)
    assert [column.name for column in columns] == ["1 KB", "2 MB", "chunk"]
    assert columns[1].job.max_requests == 256
    assert columns[2].units_per_request == 200
    assert columns[2].job.stream


def test_sizes_on_the_command_line_are_parsed_and_checked():
    assert parse_arguments(["--sizes", "1k,2m"]).sizes == [1024, 2 << 20]
    with pytest.raises(SystemExit):
        parse_arguments(["--sizes", "1x"])

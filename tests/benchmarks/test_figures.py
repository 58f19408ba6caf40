"""The small sums under the benchmarks' tables."""

from __future__ import annotations

import math

import pytest

from benchmarks.common.cpu import parse_ps_time
from benchmarks.common.figures import parse_size, percentile, size_label
from benchmarks.common.processes import unchunk


def test_percentiles_are_nearest_rank():
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50, 99, 100)
    assert percentile([3.0], 0.99) == 3.0
    assert math.isnan(percentile([], 0.5))


def test_sizes_are_read_and_shown():
    assert [parse_size(text) for text in ("1k", "64K", "2m", "300")] == [1024, 65536, 2097152, 300]
    assert [size_label(size) for size in (1024, 524288, 2097152, 300)] == ["1 KB", "512 KB", "2 MB", "300 B"]


@pytest.mark.parametrize("text", ["", "k", "-1", "0", "1g"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:01.25", 1.25), ("  12:03.50", 723.5), ("01:02:03", 3723), ("2-01:00:00", 176_400)]
)
def test_the_times_of_ps_are_read_on_every_system(text, seconds):
    assert parse_ps_time(text) == seconds


def test_chunked_pages_are_joined():
    assert unchunk(b"3\r\nabc\r\n2;x=1\r\nde\r\n0\r\n\r\n") == b"abcde"

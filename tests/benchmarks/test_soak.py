"""The soak's verdicts: what must be zero, what must match, and how each visit may end."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.common.metrics_page import gauges_named, longest_observed, parse
from benchmarks.common.sockets import Socket, parse_table
from benchmarks.soak.leftovers import Moment, compare
from benchmarks.soak.visits import ALLOWED, SHARES, Visit, read_response, wrong

QUIET = Moment(
    resident_bytes=100 << 20,
    client_sockets=0,
    upstream_sockets=4,
    other_descriptors={"socket": 3, "file": 5},
    gauges={"cairn_in_flight_requests": 0.0},
    upstream_connections=4,
    upstream_streams=0,
)


def _failing(after: Moment) -> list[str]:
    return [finding.what for finding in compare(QUIET, after, 0.05) if not finding.right]


def test_a_proxy_that_came_to_rest_passes():
    assert _failing(QUIET) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"resident_bytes": 106 << 20}, "memory"),
        ({"client_sockets": 1}, "connections of clients"),
        ({"upstream_sockets": 5}, "connections to the upstream"),
        ({"other_descriptors": {"socket": 3, "file": 6}}, "other descriptors: file"),
        ({"other_descriptors": {"socket": 3, "file": 5, "pipe": 1}}, "other descriptors: pipe"),
        ({"gauges": {"cairn_in_flight_requests": 1.0}}, "cairn_in_flight_requests"),
        ({"upstream_streams": 1}, "streams open"),
    ],
)
def test_each_leftover_is_found(change, what):
    found = _failing(replace(QUIET, **change))
    assert len(found) == 1
    assert found[0].startswith(what)


def test_a_system_without_proc_is_judged_by_the_rest():
    unknown = replace(QUIET, client_sockets=None, upstream_sockets=None, other_descriptors=None)
    assert len(compare(unknown, unknown, 0.05)) == 3


def test_a_gauge_that_the_page_has_not_is_shown_and_not_judged():
    absent = replace(QUIET, gauges={"cairn_in_flight_requests": None})
    finding = next(one for one in compare(absent, absent, 0.05) if one.what == "cairn_in_flight_requests")
    assert finding.right
    assert finding.after == "not on the page"


def test_every_visit_has_a_share_and_its_right_endings():
    assert set(SHARES) == set(ALLOWED) == set(Visit)
    assert sum(SHARES.values()) == 100


def test_a_wrong_ending_is_told_and_a_small_share_of_refusals_is_not():
    tally = Counter({(Visit.PLAIN, "whole"): 990, (Visit.PLAIN, "status 503"): 10, (Visit.STREAM, "cut short"): 1})
    assert wrong(tally, refused_share=0.01) == {"stream: cut short": 1}
    assert wrong(tally, refused_share=0.005) == {"stream: cut short": 1, "refused with 503": 10}


def _reader(content: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(content)
    reader.feed_eof()
    return reader


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "stream", "word"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", False, ("whole", True)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", False, ("whole", False)),
        (b"HTTP/1.1 502 X\r\nContent-Length: 2\r\n\r\n{}", False, ("status 502", True)),
        (CHUNKED + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n", True, ("whole", True)),
        (CHUNKED + b"3\r\nabc\r\n0\r\n\r\n", True, ("cut short", True)),
    ],
)
async def test_an_answer_is_told_in_a_word(answer, stream, word):
    assert await read_response(_reader(answer), stream) == word


async def test_an_answer_that_breaks_off_is_no_answer():
    with pytest.raises(asyncio.IncompleteReadError):
        await read_response(_reader(CHUNKED + b"3\r\nab"), True)


def test_sockets_are_read_from_the_kernels_table():
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 4711 1\n"
    )
    assert parse_table(table) == {"4711": Socket(8080, 50_000, 1)}


PAGE = """# TYPE cairn_in_flight_requests gauge
cairn_in_flight_requests 2
cairn_upstream_in_flight{upstream="a b"} 1
lag_bucket{le="0.001"} %s
lag_bucket{le="0.01"} %s
lag_bucket{le="+Inf"} %s
"""


def test_gauges_are_found_by_name_whatever_their_labels():
    series = parse(PAGE % (0, 0, 0))
    assert gauges_named(series, "cairn_in_flight_requests", "cairn_upstream_in_flight") == {
        "cairn_in_flight_requests": 2.0,
        'cairn_upstream_in_flight{upstream="a b"}': 1.0,
    }


@pytest.mark.parametrize(
    ("after", "bound"),
    [((5, 7, 7), None), ((6, 8, 8), 0.001), ((5, 8, 8), 0.01), ((5, 7, 8), float("inf"))],
)
def test_the_longest_observation_in_between_is_the_bound_of_its_bucket(after, bound):
    assert longest_observed(parse(PAGE % (5, 7, 7)), parse(PAGE % after), "lag") == bound

"""The failover table: what it measures holds of a running Cairn, and what the documentation shows was measured so."""

from __future__ import annotations

import re
from pathlib import Path

import aiohttp
import msgspec

from benchmarks.failover import table
from benchmarks.failover.upstreams import Upstreams
from proxy.config.schema import Pool
from tests.support.cairn import config_for, running

REQUESTS = 60  # of fewer, the first failures would be more than the tenth that is tried again
REFUSED_REQUESTS = 6
PAGE = Path(__file__).parents[3] / "docs" / "operations.md"


PASSED_ON = {str(status) for status in table.PASSED_ON_STATUSES}


TRIED_STATUSES = ("408", "429", "500", "529")  # tests/scenarios/test_failover.py has all of them in one dialect
TRIED_SHAPES = (("responses", True), ("messages", True), ("embeddings", False))
CONNECTION_SHAPES = (*TRIED_SHAPES, ("chat/completions", False))


def is_tried(cell: table.Cell) -> bool:
    """Every failure of a connection, and statuses, in dialects that differ."""
    shape = (cell.path, cell.stream)
    if cell.failure.isdigit():
        return cell.failure in TRIED_STATUSES and shape in TRIED_SHAPES
    return shape in CONNECTION_SHAPES


async def test_what_another_replica_can_make_good_reaches_no_client_and_a_refusal_is_passed_on_once() -> None:
    """In every dialect, streamed and plain; with fewer requests than the benchmark sends."""
    tried = [cell for cell in table.cells() if is_tried(cell)]
    passed_on = [cell for cell in table.cells() if cell.failure in PASSED_ON]
    closing = table.ClosedLater()
    await closing.open()
    async with Upstreams() as upstreams, aiohttp.ClientSession() as http:
        pools = [msgspec.convert(pool, Pool) for pool in table.pools(upstreams, closing.port)]
        async with running(config_for([], pools=pools)) as cairn:
            await closing.close()
            results = await table.measure_all(http, cairn.url, upstreams, REQUESTS, tried)
            refused = await table.measure_all(http, cairn.url, upstreams, REFUSED_REQUESTS, passed_on)
    assert {cell: result.errors for cell, result in results.items() if result.errors} == {}
    assert all(0 < result.tried <= result.asked for cell, result in results.items() if cell.failure != table.REFUSES)
    for cell, result in refused.items():
        resent = cell.path == "chat/completions" and cell.stream and cell.failure in ("400", "422")
        assert result.asked == result.errors * (2 if resent else 1), cell  # without `stream_options`
        assert result.tried == 0


def test_the_documentation_shows_every_row_and_no_error_where_there_should_be_none() -> None:
    rows = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE))
    for failure, words in table.FAILURES.items():
        cells = [cell.strip() for cell in rows[words].split("|")]
        assert len(cells) == len(table.SHAPES)
        if failure not in PASSED_ON:
            assert {cell.split(" ")[0] for cell in cells if cell} == {"0"}, words

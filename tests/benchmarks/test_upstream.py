"""The static upstream and the load generator, against each other in one loop."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from benchmarks.common.load import Job, Run
from benchmarks.common.processes import get
from benchmarks.common.upstream import Manner, parse_wish, plain_answer, serve
from tests.support.valkey import free_port


@pytest.fixture
async def upstream():
    port = free_port()
    serving = asyncio.get_running_loop().create_task(serve([port], Manner(chunks=5, chunk_seconds=0)))
    for _ in range(100):
        try:
            await get(port, "/health")
            break
        except OSError:
            await asyncio.sleep(0)
    yield port
    serving.cancel()


async def _run(job: Job):
    run = Run(job, 0)
    await run.connect()
    seconds = await run.go(10, job.max_requests)
    run.close()
    return run.result(seconds)


async def test_plain_requests_are_counted_on_both_sides(upstream):
    result = await _run(Job(port=upstream, connections=3, max_requests=20))
    assert (result.requests, result.failures) == (20, {})
    page = json.loads((await get(upstream, "/bench/stats"))[1])
    assert (page["requests"], page["body_bytes"]) == (20, 20 * 1024)


async def test_the_answer_does_not_depend_on_the_stamp_and_digests_agree(upstream):
    job = Job(port=upstream, connections=1, max_requests=1, capture=True)
    first, second = await _run(job), await _run(msgspec.structs.replace(job, max_requests=2))
    assert first.answer_digest == second.answer_digest != ""
    page = json.loads((await get(upstream, "/bench/stats"))[1])
    assert page["digests"][0] == second.body_digest


async def test_usage_is_on_the_stream_only_where_it_was_asked(upstream):
    job = Job(port=upstream, connections=1, max_requests=1, stream=True)
    without = await _run(job)
    asked = await _run(msgspec.structs.replace(job, include_usage=True))
    assert asked.answer_bytes > without.answer_bytes > 0


@pytest.mark.parametrize("wish", ["reset-before", "reset-mid"])
async def test_resets_that_are_asked_for_happen_and_the_generator_goes_on(upstream, wish):
    result = await _run(Job(port=upstream, connections=1, max_requests=3, wish=wish))
    assert (result.requests, result.failures) == (0, {"connection lost": 3})


async def test_a_connection_that_closes_after_its_answer_loses_none_that_came(upstream):
    result = await _run(Job(port=upstream, connections=1, max_requests=3, wish="close-after"))
    assert result.requests + result.failures.get("connection lost", 0) == 3
    assert result.answer_sizes == {1029: result.requests}


def test_a_plain_answer_is_about_a_kilobyte_and_reports_half_of_the_prompt_as_cached():
    answer = plain_answer(65_536, 0.5)
    parsed = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert 900 < len(answer) < 1300
    assert parsed["usage"]["prompt_tokens"] == 16_384
    assert parsed["usage"]["prompt_tokens_details"]["cached_tokens"] == 8_192


def test_a_mark_states_wish_and_size():
    assert parse_wish(b"slow 2048", 5) == ("slow", 2048)
    assert parse_wish(b"", 5) == ("", 5)

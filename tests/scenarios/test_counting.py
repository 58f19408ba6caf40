"""Finished requests are counted some at a time, and none is forgotten."""

from __future__ import annotations

import aiohttp

from proxy.metrics import definitions as metrics
from proxy.pipeline.settlement import COUNTED_TOGETHER
from tests.support.cairn import config_for, running
from tests.support.openai_upstream import OpenAIUpstream


async def test_what_waits_to_be_counted_is_little_and_in_the_next_report(http: aiohttp.ClientSession) -> None:
    """Whether a report comes between two of them or not."""
    body = {"model": "test-model", "messages": [{"role": "user", "content": "hello"}]}
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        settlement = cairn.worker.accounting.settlement
        for number in range(1, 2 * COUNTED_TOGETHER + 8):
            async with http.post(f"{cairn.url}/chat/completions", json=body) as answer:
                await answer.read()
            assert len(settlement._uncounted) < COUNTED_TOGETHER  # noqa: SLF001 - internal state that no public name shows
            if number % 7 == 0:
                assert cairn.heard.exposition.total(metrics.REQUESTS, 0, "chat_completions") <= number
                assert cairn.tokens("output") == number * len(upstream.pieces)
                assert cairn.heard.exposition.total(metrics.REQUESTS, 0, "chat_completions") == number
                assert not settlement._uncounted  # noqa: SLF001 - internal state that no public name shows

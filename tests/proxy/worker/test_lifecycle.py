"""A worker's beginning and end."""

from __future__ import annotations

import aiohttp
import pytest

from proxy.metrics import definitions as metrics
from proxy.worker import reporting
from tests.support.cairn import config_for, running
from tests.support.openai_upstream import OpenAIUpstream


async def test_a_worker_that_ends_reports_what_it_counted_since_its_last_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The supervisor's counters outlive the worker, so they would lack it for ever."""
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 3_600)
    body = {"model": "test-model", "messages": [{"role": "user", "content": "hi"}]}
    async with OpenAIUpstream() as upstream, aiohttp.ClientSession() as http:
        async with running(config_for([upstream.url])) as cairn:
            async with http.post(f"{cairn.url}/chat/completions", json=body) as response:
                assert response.status == 200
            assert cairn.heard.exposition.total(metrics.TOKENS, 2, "output") == 0
        assert cairn.heard.exposition.total(metrics.TOKENS, 2, "output") > 0

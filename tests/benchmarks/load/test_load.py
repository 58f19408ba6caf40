"""The load test of one's own endpoint, against an upstream with a prefix cache."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.load import summary
from benchmarks.load.__main__ import _send
from benchmarks.load.asking import Answer
from benchmarks.load.workloads import conversations, of_trace
from tests.support.openai_upstream import Failure, OpenAIUpstream


async def test_what_is_cached_is_told_from_what_is_not_and_failures_are_counted(tmp_path: Path):
    """Conversations with a common prompt are cached but for the first; a 500 is an error with its text."""
    turns = list(conversations(2_000, 4, 13, 1_000.0, 8, seed=1))
    async with OpenAIUpstream(failures=[None, Failure(500)]) as upstream:
        answers, seconds = await _send(upstream.url, "test-model", turns, {"authorization": "Bearer k"})
    found = summary.summarize(answers, seconds, summary.Prices(2.0, 0.5))
    assert (found.requests, sum(found.errors.values())) == (13, 1)
    assert (found.all.requests, found.cached.requests + found.uncached.requests) == (12, 12)
    assert found.uncached.requests == 1
    assert found.cached_share is not None
    assert found.cached_share > 0.7
    assert found.savings.usd == pytest.approx(found.savings.cached_tokens * 1.5e-6)
    summary.store(tmp_path / "load.json", {}, found, answers)
    summary.draw(tmp_path / "load.svg", answers)
    assert json.loads((tmp_path / "load.json").read_text())["summary"]["requests"] == 13
    assert "<svg" in (tmp_path / "load.svg").read_text()
    assert len(summary.tables(found)) == 2


def test_conversations_grow_and_share_their_beginning():
    """Each turn begins with the one before, and all begin with one prompt."""
    turns = list(conversations(500, 2, 6, 5.0, 8, seed=3))
    assert turns[2].messages[:2] == turns[0].messages
    assert turns[4].messages[: len(turns[2].messages)] == turns[2].messages
    assert turns[0].messages[0] == turns[1].messages[0]
    assert turns[0].messages[1] != turns[1].messages[1]
    assert [turn.at_seconds for turn in turns] == sorted(turn.at_seconds for turn in turns)


def test_a_trace_goes_at_its_own_times_or_at_a_rate(tmp_path: Path):
    """With the output lengths that it names."""
    file = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": n * 1_000, "input_length": 600, "output_length": 7, "hash_ids": [1, n + 2]} for n in range(5)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    turns = list(of_trace(file, None, None))
    assert [turn.at_seconds for turn in turns] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert turns[0].output_tokens == 7
    assert turns[0].messages[0].content[:2_048] == turns[1].messages[0].content[:2_048]
    assert next(iter(reversed(list(of_trace(file, None, 10.0))))).at_seconds == pytest.approx(0.5)


def test_nothing_reported_is_no_zero():
    """The share is unknown then, and no saving is claimed."""
    found = summary.summarize([Answer(0.1, 0.2, 100, None, 5)], 1.0, None)
    assert found.cached_share is None
    assert (found.savings.cached_tokens, found.savings.usd) == (0, None)
    assert math.isnan(found.cached.mean_seconds)

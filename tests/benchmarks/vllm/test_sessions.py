"""The closed loop before real engines, tried on a fake one."""

from __future__ import annotations

import json

import pytest

from benchmarks.vllm import model
from benchmarks.vllm.sessions import Closed, Figures, Load, Turn, figures, words
from tests.support.openai_upstream import OpenAIUpstream


def turn(ended: float, ttft: float, prompt: int, cached: int, predicted: int | None = None) -> Turn:
    return Turn(
        ended=ended,
        ttft_seconds=ttft,
        seconds=ttft + 1,
        prompt_tokens=prompt,
        cached_tokens=cached,
        predicted_tokens=predicted,
    )


def test_figures_add_up_tokens_and_order_the_waits():
    found = figures([turn(1, 0.4, 100, 60, 70), turn(2, 0.2, 200, 40, 50)], failed=1)
    assert (found.turns, found.failed, found.prompt_tokens, found.cached_tokens) == (2, 1, 300, 100)
    assert found.predicted_tokens == 120
    assert found.cached_share == pytest.approx(1 / 3)
    assert found.computed_per_turn == 100
    assert found.ttft_seconds == pytest.approx((0.3, 0.2, 0.4, 0.4))


def test_without_cairn_nothing_was_predicted_and_no_turn_divides_by_nothing():
    assert figures([turn(1, 0.1, 9, 0)], 0).predicted_tokens is None
    assert figures([], 3).computed_per_turn == 0


async def looped(port: int, seconds: float) -> Figures:
    """Run two sessions of the closed loop on one engine."""
    load = Load(2, 50, 0.001, warm_up_seconds=0, seconds=seconds, arrival_seconds=0)
    return await Closed(load, lambda _: port, seed=1).run()


async def test_sessions_ask_again_with_all_that_went_before():
    """And a second session begins with other words."""
    for seconds in (0.5, 2.0, 8.0):  # a busy machine does too little in the first
        async with OpenAIUpstream() as engine:
            found = await looped(engine.port, seconds)
        if found.turns > 8:
            break
    asked = [json.loads(each.body)["messages"] for each in engine.generations]
    first = [messages for messages in asked if messages[0] == asked[0][0]]
    assert len(asked) > len(first) > 2
    assert first[1][:2] == first[0]
    assert len(first[1]) == 4
    assert found.turns > 2
    assert found.failed == 0


def test_the_vocabulary_has_each_word_of_the_sessions_as_one_token(tmp_path):
    """A text therefore has exactly the number of tokens asked for."""
    folder = model.make_model(tmp_path / "model")
    from tokenizers import Tokenizer  # here, since it takes half a second to load

    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(vocabulary.encode(words("seed", 500)).ids) == pytest.approx(500, rel=0.05)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == vocabulary.get_vocab_size()

"""Images before simulated engines: never taken for text, and known only together with what precedes them."""

from __future__ import annotations

from base64 import b64encode
from random import Random
from typing import Any

import pytest

from benchmarks.engines.caches import BlockCache
from benchmarks.engines.engine import SimulatedEngine
from benchmarks.engines.proxy import Answer, CairnProxy
from benchmarks.engines.sessions import Session, words
from benchmarks.engines.templates import IMAGE_TOKENS

SYSTEM = words("system", 600)
TOLERANCE_TOKENS = 128  # what a difference means nothing below


def image(seed: str, size_bytes: int = 60_000) -> dict[str, Any]:
    """A picture as clients send it: base64 in a data URL."""
    url = f"data:image/png;base64,{b64encode(Random(seed).randbytes(size_bytes)).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def text(seed: str, tokens: int) -> dict[str, Any]:
    return {"type": "text", "text": words(seed, tokens)}


def ask(proxy: CairnProxy, session: Session, *parts: dict[str, Any]) -> Answer:
    """One turn whose question has several parts."""
    session.messages.append({"role": "user", "content": list(parts)})
    answer = proxy.ask(session.body())
    session.answered(answer.usage.output_tokens)
    return answer


@pytest.fixture
def proxy() -> CairnProxy:
    return CairnProxy([SimulatedEngine(BlockCache(1_000_000)) for _ in range(2)], capacities=1_000_000)


def test_prompts_that_differ_in_an_image_share_what_precedes_it_and_nothing_beyond(proxy):
    """The same question about other pictures: no answer has less cached than was predicted."""
    answers = []
    for number in range(8):
        talk = Session(f"talk {number}", SYSTEM)
        answers.append(ask(proxy, talk, text("look", 300), image(f"picture {number}"), text("question", 400)))
    for answer in answers[1:]:
        assert answer.predicted_tokens <= answer.usage.cached_tokens + TOLERANCE_TOKENS
        assert 600 - TOLERANCE_TOKENS <= answer.usage.cached_tokens < 600 + 300 + TOLERANCE_TOKENS


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("shared_answer", [False, True])
def test_prompts_that_go_on_differently_behind_an_image_share_it_and_what_precedes_it(proxy, shared_answer, marked):
    """At once or after an answer, and whether or not the message has a cache mark, which is left out of the key."""
    answers = []
    mark = {"cache_control": {"type": "ephemeral"}} if marked else {}
    for number in range(6):
        talk = Session(f"talk {number}", SYSTEM)
        own = text(f"question {number}", 400)
        if shared_answer:
            parts = [text("look", 300), image("picture"), {**text("question", 400), **mark}]
            talk.messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": words("so", 200)}]
            answers.append(ask(proxy, talk, own))
        else:
            answers.append(ask(proxy, talk, text("look", 300), image("picture"), {**own, **mark}))
    shared = 600 + 300 + IMAGE_TOKENS + (600 if shared_answer else 0)
    for answer in answers[1:]:
        assert answer.usage.cached_tokens == pytest.approx(shared, abs=TOLERANCE_TOKENS)
        assert answer.predicted_tokens == pytest.approx(answer.usage.cached_tokens, abs=TOLERANCE_TOKENS // 2)


def test_a_prompt_with_an_image_does_not_hide_the_system_prompt_that_others_share(proxy):
    """The first prompt that is seen has a picture of eighty kilobytes: what precedes it counts in full."""
    ask(proxy, Session("first", SYSTEM), text("look", 300), image("picture"), text("question", 400))
    for number in range(3):
        answer = ask(proxy, Session(f"talk {number}", SYSTEM), text(f"other {number}", 500))
        assert answer.usage.cached_tokens > 500
        assert answer.predicted_tokens == pytest.approx(answer.usage.cached_tokens, abs=TOLERANCE_TOKENS // 2)


def test_an_image_in_the_history_is_found_again_and_counts_as_its_tokens(proxy):
    """Eighty kilobytes of base64 are 256 tokens: what is predicted of later turns is what is reported."""
    talk = Session("talk", SYSTEM)
    answers = [ask(proxy, talk, text("look", 300), image("picture"), text("question", 400))]
    for number in range(6):
        parts = [image(f"further {number}")] if number % 3 == 2 else []
        answers.append(ask(proxy, talk, *parts, text(f"turn {number}", 200)))
    assert {answer.replica for answer in answers} == {answers[0].replica}
    for answer in answers[1:]:
        predicted = min(answer.predicted_tokens, answer.usage.prompt_tokens)
        assert predicted <= answer.usage.cached_tokens + TOLERANCE_TOKENS
        assert predicted >= answer.usage.cached_tokens - TOLERANCE_TOKENS
    assert answers[1].usage.cached_tokens > 600 + 300 + IMAGE_TOKENS + 400 - TOLERANCE_TOKENS

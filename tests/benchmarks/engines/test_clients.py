"""Agents as they are, on every template: nothing more is computed than with perfect session affinity."""

from __future__ import annotations

from collections import defaultdict

import pytest

from benchmarks.engines.caches import BlockCache
from benchmarks.engines.clients import SHAPES
from benchmarks.engines.engine import SimulatedEngine
from benchmarks.engines.proxy import CairnProxy
from benchmarks.engines.templates import Template, decode_chat
from proxy.model import TemplateFacts, ToolOrder

SESSIONS = 6
TEMPLATES = {
    "tools first": (Template(drops_billing=True), TemplateFacts()),
    "system first": (
        Template(system_first=True, drops_billing=True),
        TemplateFacts(order=ToolOrder.SYSTEM_FIRST),
    ),
    "reasoning dropped": (
        Template(system_first=True, drops_reasoning=True, drops_billing=True),
        TemplateFacts(order=ToolOrder.SYSTEM_FIRST, drops_reasoning=True),
    ),
    "system moved": (Template(moves_system=True, drops_billing=True), TemplateFacts(moves_system=True)),
}


def engines(template: Template) -> list[SimulatedEngine]:
    return [SimulatedEngine(BlockCache(1_000_000), template) for _ in range(3)]


def computed_with_affinity(shape: str, template: Template, nonce: bool) -> int:
    """Each session on one engine, by turns."""
    fleet = engines(template)
    for number in range(SESSIONS):
        for body in SHAPES[shape](f"session {number}", nonce=nonce):
            fleet[number % 3].serve(decode_chat(body))
    return sum(engine.computed_tokens for engine in fleet)


@pytest.mark.parametrize("nonce", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_agents_sessions_compute_at_most_what_session_affinity_computes(shape, template, nonce):
    """And what is predicted is what is reported, to three percent."""
    rendered, facts = TEMPLATES[template]
    proxy = CairnProxy(engines(rendered), capacities=1_000_000, facts=facts)
    talks = [SHAPES[shape](f"session {number}", nonce=nonce) for number in range(SESSIONS)]
    predicted = reported = 0
    homes: dict[int, set[int]] = defaultdict(set)
    while talks:
        for number, talk in enumerate(list(talks)):
            body = next(talk, None)
            if body is None:
                talks.remove(talk)
                continue
            answer = proxy.ask(body)
            homes[number].add(answer.replica)
            predicted += answer.predicted_tokens
            reported += answer.usage.cached_tokens
    assert sum(engine.computed_tokens for engine in proxy.engines) <= computed_with_affinity(shape, rendered, nonce)
    assert predicted == pytest.approx(reported, rel=0.03)

"""What probes show of a template, on renderers that are true to life."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.engines.templates import Template, decode_chat, render
from proxy.fleet import template_probe
from proxy.model import TemplateFacts, ToolOrder


async def facts_of(render, dates=()) -> TemplateFacts:
    """The facts of an engine that answers."""
    facts = await template_probe.facts_of(render, dates)
    assert facts is not None
    return facts


ALL_HEADLESS = frozenset({"enable_thinking", "thinking"})


def renderer(template: Template, tokens: bool = False):
    """What an engine with `template` answers: text, or token ids of four characters each."""

    async def rendered(request):
        text = (
            render(decode_chat(msgspec.json.encode({"model": "m", **request})), template).decode() + "<|assistant|>"
        )
        return [hash(text[at : at + 1]) for at in range(len(text))] if tokens else text

    return rendered


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (Template(), TemplateFacts(none_drops_tools=False)),
        (Template(system_first=True), TemplateFacts(order=ToolOrder.SYSTEM_FIRST, none_drops_tools=False)),
        (Template(drops_reasoning=True), TemplateFacts(drops_reasoning=True, none_drops_tools=False)),
        (Template(moves_system=True), TemplateFacts(moves_system=True, none_drops_tools=False)),
        (Template(drops_tools_for_none=True), TemplateFacts(none_drops_tools=True)),
    ],
)
async def test_a_template_shows_its_order_and_what_it_leaves_out(template, expected, tokens):
    """Whether the engine renders text or token ids."""
    facts = await facts_of(renderer(template, tokens))
    assert facts == msgspec.structs.replace(expected, headless=ALL_HEADLESS)


async def test_a_date_in_the_text_is_found():
    template = Template(date="Today is 31 Jan 2026. ")
    assert (await facts_of(renderer(template), ["31 Jan 2026"])).dated
    assert not (await facts_of(renderer(template), ["01 Feb 2026"])).dated


async def test_an_argument_that_is_rendered_at_the_head_counts():
    facts = await facts_of(renderer(Template()))
    assert "reasoning_effort" not in facts.headless


async def test_an_engine_that_refuses_shows_nothing():
    async def refuse(request):
        return None

    assert await template_probe.facts_of(refuse) is None


async def test_an_engine_that_refuses_tools_shows_the_rest():
    whole = renderer(Template(drops_reasoning=True))

    async def without_tools(request):
        return None if "tools" in request else await whole(request)

    facts = await facts_of(without_tools)
    assert facts.drops_reasoning
    assert facts.order is ToolOrder.TOOLS_FIRST


async def test_tools_before_the_last_question_are_seen():
    async def rendered(request):
        parts = [f"[{message['role']}]{message['content']}" for message in request["messages"]]
        tools = str(request.get("tools", ""))
        return "".join([*parts[:-1], tools, parts[-1]])

    assert (await facts_of(rendered)).order is ToolOrder.TOOLS_LAST

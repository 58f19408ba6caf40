"""The key follows the rendering: order, what is left out, and what moves; the body is never touched."""

from __future__ import annotations

import json

import pytest

from cache.index.hashing import chain_root, cut
from proxy.model import Endpoint, TemplateFacts, ToolOrder
from proxy.wire.request import read
from proxy.wire.template import keyed_salt, keyed_spans

TOOLS = [{"type": "function", "function": {"name": "f", "description": "d" * 600}}]
SYSTEM = {"role": "system", "content": "s" * 600}
PLAIN = TemplateFacts()


def prompt_of(messages, endpoint=Endpoint.CHAT, **fields):
    return read(json.dumps({"model": "m", "messages": messages, **fields}).encode(), endpoint)


def texts(messages, facts=PLAIN, endpoint=Endpoint.CHAT, **fields):
    return [bytes(span).decode() for span in keyed_spans(prompt_of(messages, endpoint, **fields), facts)]


def hashes(messages, facts=PLAIN, endpoint=Endpoint.CHAT, **fields):
    prompt = prompt_of(messages, endpoint, **fields)
    return cut(chain_root(keyed_salt(prompt, facts, "2026-01-31")), keyed_spans(prompt, facts)).hashes


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (ToolOrder.TOOLS_FIRST, ["tools", "system", "q1", "a1", "q2"]),
        (ToolOrder.SYSTEM_FIRST, ["system", "tools", "q1", "a1", "q2"]),
        (ToolOrder.TOOLS_LAST, ["system", "q1", "a1", "tools", "q2"]),
    ],
)
def test_tools_stand_where_the_template_puts_them(order, expected):
    messages = [SYSTEM, user("q1"), assistant("a1"), user("q2")]
    parts = texts(messages, TemplateFacts(order=order), tools=TOOLS)
    names = {json.dumps(TOOLS): "tools", json.dumps(SYSTEM): "system"}
    assert [names.get(part) or json.loads(part)["content"] for part in parts] == expected


def test_the_system_prompt_of_other_dialects_is_put_before_the_tools_too():
    first = TemplateFacts(order=ToolOrder.SYSTEM_FIRST)
    parts = texts([user("q")], first, Endpoint.MESSAGES, system="be kind", tools=TOOLS, max_tokens=5)
    assert parts[0] == '"be kind"'
    body = json.dumps({"model": "m", "instructions": "be kind", "tools": TOOLS, "input": "q"}).encode()
    prompt = read(body, Endpoint.RESPONSES)
    assert bytes(keyed_spans(prompt, first)[0]) == b'"be kind"'


def test_agents_with_the_same_tools_and_other_system_prompts_share_only_what_the_engine_shares():
    one, two = [SYSTEM, user("q")], [{"role": "system", "content": "t" * 600}, user("q")]
    assert hashes(one, tools=TOOLS)[0] == hashes(two, tools=TOOLS)[0]
    first = TemplateFacts(order=ToolOrder.SYSTEM_FIRST)
    assert hashes(one, first, tools=TOOLS)[0] != hashes(two, first, tools=TOOLS)[0]


def test_old_reasoning_is_no_part_of_a_key_if_the_template_drops_it():
    drops = TemplateFacts(drops_reasoning=True)
    before = [SYSTEM, user("q1"), assistant("a1", reasoning_content="r" * 2_000)]
    loop = texts(before, drops)
    assert "rrr" in loop[-1]
    then = texts([*before, user("q2")], drops)
    assert "rrr" not in "".join(then)
    assert then[:2] == loop[:2]
    assert "rrr" in "".join(texts([*before, user("q2")]))


def test_late_system_messages_go_to_the_front_if_the_template_moves_them():
    late = {"role": "system", "content": "late"}
    parts = texts([SYSTEM, user("q1"), late, user("q2")], TemplateFacts(moves_system=True))
    assert [json.loads(part)["content"][:4] for part in parts] == ["ssss", "late", "q1", "q2"]


def test_a_date_at_the_head_makes_another_key_each_day():
    dated, prompt = TemplateFacts(dated=True), prompt_of([user("q")])
    assert keyed_salt(prompt, dated, "2026-01-31") != keyed_salt(prompt, dated, "2026-02-01")
    assert keyed_salt(prompt, PLAIN, "2026-01-31") == keyed_salt(prompt, PLAIN, "2026-02-01")


def test_arguments_that_change_no_head_and_names_of_one_model_share_a_chain():
    facts = TemplateFacts(headless=frozenset({"enable_thinking"}), root="/models/m")
    with_it, without = prompt_of([user("q")], enable_thinking=False), prompt_of([user("q")])
    assert keyed_salt(with_it, facts, "") == keyed_salt(without, facts, "") == (b"/models/m",)
    effort = prompt_of([user("q")], reasoning_effort="low", enable_thinking=True)
    assert keyed_salt(effort, facts, "") == (b"/models/m", b"reasoning_effort", b'"low"')


def test_tool_choice_none_leaves_the_tools_out_or_changes_nothing():
    messages = [SYSTEM, user("q")]
    assert len(texts(messages, tools=TOOLS, tool_choice="none")) == 2
    ignored = TemplateFacts(none_drops_tools=False)
    assert hashes(messages, ignored, tools=TOOLS, tool_choice="none") == hashes(messages, ignored, tools=TOOLS)


def test_cache_marks_that_move_with_each_turn_are_no_part_of_the_key():
    """Clients mark the last messages, in whatever place of the part the mark is written."""
    mark = {"cache_control": {"type": "ephemeral"}}

    def turns(*marked):
        return [
            {
                "role": "user",
                "content": [{"type": "text", "text": f"question {n}" * 99, **(mark if n in marked else {})}],
            }
            for n in range(4)
        ]

    assert hashes(turns(2, 3), endpoint=Endpoint.MESSAGES) == hashes(turns(), endpoint=Endpoint.MESSAGES)
    assert hashes(turns(1, 2)) == hashes(turns(3))


def test_text_that_speaks_of_cache_marks_stays():
    messages = [user('write "cache_control": {"type": "ephemeral"} there')]
    assert texts(messages) == [json.dumps(messages[0])]


def test_the_billing_block_of_a_client_is_no_part_of_the_key_unless_it_is_rendered():
    def system(nonce):
        billing = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={nonce};"}
        return [billing, {"type": "text", "text": "you are an agent " * 60}]

    def key(nonce, facts=PLAIN):
        return hashes([user("q")], facts, Endpoint.MESSAGES, system=system(nonce), tools=TOOLS)

    assert key("abc") == key("def")
    keeps = TemplateFacts(keeps_billing=True)
    assert key("abc", keeps)[-1] != key("def", keeps)[-1]
    chat = [{"role": "system", "content": system("abc")}, user("q")]
    other = [{"role": "system", "content": system("def")}, user("q")]
    for facts in (PLAIN, TemplateFacts(order=ToolOrder.SYSTEM_FIRST), TemplateFacts(drops_reasoning=True)):
        assert hashes(chat, facts, tools=TOOLS) == hashes(other, facts, tools=TOOLS)


def test_messages_that_cannot_be_read_keep_their_place():
    body = b'{"model": "m", "messages": [{"role": 5}, "text", {"role": "user"}], "tools": [{"type": "function"}]}'
    spans = keyed_spans(read(body, Endpoint.CHAT), TemplateFacts(ToolOrder.SYSTEM_FIRST, drops_reasoning=True))
    assert [bytes(span)[:8] for span in spans] == [b'[{"type"', b'{"role":', b'"text"', b'{"role":']

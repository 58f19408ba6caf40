"""The key follows the rendering: order, what is left out, and what moves; the body is never touched."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.index.hashing import chain_root, cut
from proxy.model import Endpoint, TemplateFacts, ToolOrder
from proxy.wire.request import read
from proxy.wire.template import keyed_salt, keyed_spans, keyed_stored, stored_first

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


def contents(messages, facts, **fields):
    parts = [json.loads(part) for part in texts(messages, facts, tools=TOOLS, **fields)]
    return ["tools" if isinstance(part, list) else part["content"] for part in parts]


def test_of_several_system_messages_only_the_first_precedes_the_tools_if_the_template_renders_the_others_in_place():
    """As nearly all templates do that put the system message first."""
    messages = [{"role": "system", "content": text} for text in ("first", "second")] + [user("q")]
    first = TemplateFacts(order=ToolOrder.SYSTEM_FIRST)
    assert contents(messages, first) == ["first", "second", "tools", "q"]
    split = msgspec.structs.replace(first, splits_systems=True)
    assert contents(messages, split) == ["first", "tools", "second", "q"]
    of_another_dialect = texts(
        [user("q")], split, Endpoint.MESSAGES, system="be kind", tools=TOOLS, tool_choice={"type": "any"}
    )
    assert of_another_dialect.index(json.dumps(TOOLS)) == 2, "after the system prompt and the choice of a tool"


def test_a_system_message_that_moves_with_the_last_user_message_is_keyed_there():
    """With the tools, as by Mistral's older templates: the turns before it are what prompts share."""
    moving = TemplateFacts(order=ToolOrder.TOOLS_LAST, system_last=True)
    messages = [{"role": "system", "content": "rules"}, user("q1"), assistant("a1"), user("q2")]
    assert contents(messages, moving) == ["q1", "a1", "tools", "rules", "q2"]
    assert contents([*messages, assistant("a2")], moving) == ["q1", "a1", "tools", "rules", "q2", "a2"]
    assert contents(messages, TemplateFacts(system_last=True)) == ["tools", "q1", "a1", "rules", "q2"]


def test_a_developers_message_precedes_the_tools_unless_it_is_rendered_in_its_place():
    messages = [{"role": "developer", "content": "rules"}, user("q")]
    first = TemplateFacts(order=ToolOrder.SYSTEM_FIRST)
    assert contents(messages, first) == ["rules", "tools", "q"]
    in_place = msgspec.structs.replace(first, developer_in_place=True)
    assert contents(messages, in_place) == ["tools", "rules", "q"]


def test_a_system_message_among_the_items_of_a_response_is_put_before_the_tools():
    first = TemplateFacts(order=ToolOrder.SYSTEM_FIRST)
    items = [{"role": "system", "content": "rules"}, user("q")]
    prompt = read(json.dumps({"model": "m", "tools": TOOLS, "input": items}).encode(), Endpoint.RESPONSES)
    assert bytes(keyed_spans(prompt, first)[0]) == json.dumps(items[0]).encode()


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


@pytest.mark.parametrize("order", [ToolOrder.TOOLS_FIRST, ToolOrder.TOOLS_LAST])
def test_with_a_joint_head_prompts_share_tools_and_system_prompt_or_nothing(order):
    """As they do before engines of which some put the tools first and others the system prompt."""
    joint = TemplateFacts(order=order, joins_head=True)
    one = hashes([SYSTEM, user("q")], joint, tools=TOOLS)
    same = hashes([SYSTEM, user("another")], joint, tools=TOOLS)
    assert one[: len(one) - 1] == same[: len(one) - 1]
    other_system = hashes([{**SYSTEM, "content": "s" * 599 + "t"}, user("q")], joint, tools=TOOLS)
    other_tools = hashes([SYSTEM, user("q")], joint, tools=[*TOOLS, *TOOLS])
    assert one[0] not in (other_system[0], other_tools[0])
    talks = [[SYSTEM, user(first), {"role": "assistant", "content": "a"}, user("q")] for first in ("p", "r")]
    one_talk, other_talk = [hashes(talk, joint, tools=TOOLS) for talk in talks]
    assert one_talk[0] == other_talk[0] == one[0], "what was said since is no part of the head"


def test_a_joint_head_leaves_out_what_changes_with_each_request():
    """Billing lines, and tools that are not rendered."""
    joint = TemplateFacts(joins_head=True)

    def billed(nonce):
        line = f"x-anthropic-billing-header: cc_version=1; cch={nonce};"
        parts = [{"type": "text", "text": line}, {"type": "text", "text": "s" * 600}]
        return hashes([{"role": "system", "content": parts}, user("q")], joint)

    assert billed("a1b2c") == billed("d3e4f")
    without = [hashes([SYSTEM, user("q")], joint, tools=some, tool_choice="none") for some in (TOOLS, TOOLS * 2)]
    assert without[0] == without[1]


def test_old_reasoning_is_no_part_of_a_key_if_the_template_drops_it():
    drops = TemplateFacts(drops_reasoning=True)
    before = [SYSTEM, user("q1"), assistant("a1", reasoning_content="r" * 2_000)]
    loop = texts(before, drops)
    assert "rrr" in loop[-1]
    then = texts([*before, user("q2")], drops)
    assert "rrr" not in "".join(then)
    assert then[:2] == loop[:2]
    assert "rrr" in "".join(texts([*before, user("q2")]))


def test_an_answer_has_another_key_before_a_users_message_if_the_template_renders_it_otherwise_there():
    """Both prompts share the key of everything before the first such answer, as the engine does."""
    rewrites = TemplateFacts(rewrites_turns=True)
    loop = [SYSTEM, user("q1"), assistant("a1"), {"role": "tool", "content": "r"}, assistant("a2")]
    within, after = texts(loop, rewrites), texts([*loop, user("q2")], rewrites)
    assert texts([*loop, {"role": "tool", "content": "r2"}], rewrites)[:5] == within
    shared = [one == other for one, other in zip(within, after, strict=False)]
    assert shared == [True, True, False, True, False]
    assert texts(loop) == texts([*loop, user("q2")])[:5]


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


@pytest.mark.parametrize(
    "fields",
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": {"enable_thinking": True}}),
        ({"enable_thinking": False}, {"enable_thinking": True}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning": {"effort": "high"}}),
        ({"reasoning_effort": "low"}, {}),
    ],
)
@pytest.mark.parametrize("order", list(ToolOrder))
@pytest.mark.parametrize("more", [{}, {"drops_reasoning": True}, {"rewrites_turns": True}])
def test_an_argument_that_changes_turns_leaves_tools_and_system_messages_shared(fields, order, more):
    """Nothing else is shared, and without the argument's effect everything is."""
    names = frozenset({"enable_thinking", "reasoning_effort"})
    messages = [SYSTEM, user("q"), {"role": "assistant", "content": "a"}, user("r")]
    late = TemplateFacts(order=order, late_arguments=names, **more)
    one, two = [prompt_of(messages, tools=TOOLS, **each) for each in fields]
    assert keyed_salt(one, late, "") == keyed_salt(two, late, "")
    mine, theirs = [list(map(bytes, keyed_spans(each, late))) for each in (one, two)]
    shared = next(place for place, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1])
    assert shared == (1 if order is ToolOrder.TOOLS_LAST else 2)
    plain = msgspec.structs.replace(late, late_arguments=frozenset(), headless=names)
    expected = list(map(bytes, keyed_spans(one, plain)))
    assert [*mine[:shared], *mine[shared + 1 :]] == expected == list(map(bytes, keyed_spans(two, plain)))


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, ()),
        ({"chat_template_kwargs": {"enable_thinking": False, "tone": 1}}, (b"chat_template_kwargs", b'"tone":1')),
        ({"chat_template_kwargs": {}}, ()),
        ({"chat_template_kwargs": "odd"}, (b"chat_template_kwargs", b'"odd"')),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, ()),
        ({"reasoning": {"effort": "low", "enabled": True}}, (b"reasoning", b'"enabled":true')),
    ],
)
def test_a_switch_that_changes_no_head_is_no_part_of_the_key_wherever_it_is_written(fields, kept):
    facts = TemplateFacts(headless=frozenset({"enable_thinking", "reasoning_effort"}))
    salt = keyed_salt(prompt_of([user("q")], **fields), facts, "")
    assert tuple(part.replace(b" ", b"") for part in salt[1:]) == kept


def test_a_change_of_thinking_leaves_tools_and_system_prompt_known_in_anthropics_dialect():
    """As at the provider; before an engine whose template does not know it, it changes nothing at all."""

    def keys(facts, **fields):
        return hashes([user("q" * 600)], facts, Endpoint.MESSAGES, system="s" * 600, tools=TOOLS, **fields)

    for facts in (PLAIN, TemplateFacts(order=ToolOrder.SYSTEM_FIRST)):
        budgets = [{"type": "enabled", "budget_tokens": tokens} for tokens in (4_000, 31_999)]
        one, two = [keys(facts, thinking=budget) for budget in budgets]
        shared = [mine == theirs for mine, theirs in zip(one, two, strict=True)]
        assert shared.index(False) >= 2
        assert not shared[-1]
        assert keys(facts)[: shared.index(False)] == one[: shared.index(False)]
    ignored = TemplateFacts(headless=frozenset({"thinking"}))
    assert keys(ignored, thinking=budgets[0]) == keys(ignored, thinking=budgets[1]) == keys(ignored)


def test_an_effort_that_is_rendered_at_the_head_counts_in_every_dialect():
    facts = TemplateFacts(headless=frozenset({"enable_thinking"}))
    prompt = prompt_of([user("q")], reasoning={"effort": "low"})
    assert keyed_salt(prompt, facts, "")[1:] == (b"reasoning", b'{"effort": "low"}')


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


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
@pytest.mark.parametrize("text", ["q", 'a "quoted" one', 'a brace "}', "a backslash \\", 'both \\"}', 'parts "}, {"'])
def test_a_list_of_one_text_has_the_key_of_the_string(text, separators):
    """A client writes a message as a list while it is marked, and as a string once the mark has moved on."""
    marked = {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}
    keys = [
        [bytes(span) for span in keyed_spans(read(body, Endpoint.MESSAGES), PLAIN)]
        for content in ([marked], [{"type": "text", "text": text}], text)
        if (body := json.dumps({"model": "m", "messages": [user(content)] * 9}, separators=separators).encode())
    ]
    assert keys[0][-6:] == keys[1][-6:] == keys[2][-6:]
    assert json.loads(keys[1][0]) == user(text)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        [{"type": "text", "text": "a", "citations": None}],
        [{"type": "tool_result", "tool_use_id": "t", "content": "a"}],
        [{"type": "text", "text": "a"}, {"type": "image", "source": {"type": "url", "url": "http://x/y"}}],
        [],
    ],
)
def test_other_lists_keep_their_own_key(content):
    assert [json.loads(part) for part in texts([user(content)])] == [user(content)]


@pytest.mark.parametrize("endpoint", [Endpoint.MESSAGES, Endpoint.CHAT])
def test_marked_tools_and_system_prompts_keep_their_key_as_the_conversation_grows(endpoint):
    """Their marks do not move, so they count alike within and beyond the reach of those that do."""
    mark = {"cache_control": {"type": "ephemeral"}}
    system = [{"type": "text", "text": "be kind", **mark}]
    fields = {"tools": [{"name": "f", "description": "d", **mark}]}
    if endpoint is Endpoint.MESSAGES:
        first, fields = [], {**fields, "system": system}
    else:
        first = [{"role": "system", "content": system}]
    grown = [[*first, *[user("q")] * count] for count in (1, 9)]
    short, long = (texts(messages, endpoint=endpoint, **fields) for messages in grown)
    assert short == long[: len(short)]


_PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "QUJD" * 99}}
_CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "' + "b" * 99 + '"}'}}]
_AGENT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": [{"type": "text", "text": "look"}, _PICTURE]},
    *[message for n in range(9) for message in ({"role": "assistant", "content": f"a{n}", "tool_calls": _CALLS},
                                                {"role": "tool", "tool_call_id": "c", "content": f"r{n}"})],
    {"role": "user", "content": "and now"},
    {"role": "assistant", "content": "done"},
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
]  # fmt: skip


def _marked(messages: list[Any], places: Sequence[int], mark: dict[str, Any], *, first: bool) -> list[Any]:
    """Return messages with a mark in the last text of some of them, as its first or its last member."""
    marked = copy.deepcopy(messages)
    for place in places:
        content = marked[place]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        at = max(n for n, part in enumerate(parts) if part["type"] == "text")
        parts[at] = {**mark, **parts[at]} if first else {**parts[at], **mark}
        marked[place]["content"] = parts
    return marked


@pytest.mark.parametrize("padding", [0, 9000])
@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
@pytest.mark.parametrize(
    "mark",
    [
        {"cache_control": {"type": "ephemeral"}},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"cache_control": None},
        {"prompt_cache_breakpoint": {"mode": "explicit"}},
    ],
)
def test_a_mark_is_no_part_of_the_key_wherever_it_is(mark, separators, padding):
    """In any message of a long conversation, and before a picture or the calls of tools in the same message."""

    def key(messages: list[Any]) -> list[bytes]:
        system = {"role": "system", "content": "be kind" + "." * padding}
        body = json.dumps({"model": "m", "messages": [system, *messages[1:]]}, separators=separators).encode()
        return [bytes(span) for span in keyed_spans(read(body, Endpoint.CHAT), PLAIN)]

    last = len(_AGENT) - 1
    for places in [(1, last), (2, last), (3, last), (1, 19), (19, 20, last), (18, 20, 21), (5, 21), (last,)]:
        assert key(_marked(_AGENT, places, mark, first=False)) == key(_AGENT), places
    first = key(_marked(_AGENT, (1, last), mark, first=True))
    assert (first[1], first[last]) == (key(_AGENT)[1], key(_AGENT)[last])


@pytest.mark.parametrize("members", ["{m}, {m}, {t}", "{t} , {m} , {m}", "{m},{t},{m}", "{m} ,\n{m} ,{b}, {t}"])
def test_marks_beside_each_other_are_left_out_with_one_comma_each(members):
    mark, other = '"cache_control": {"type": "ephemeral"}', '"prompt_cache_breakpoint": {"mode": "explicit"}'
    part = "{" + members.replace("{m}", mark).replace("{b}", other).replace("{t}", '"text": "a"') + "}"
    body = '{"model": "m", "messages": [{"role": "user", "content": [' + part + ', {"text": "b"}]}]}'
    [span] = keyed_spans(read(body.encode(), Endpoint.CHAT), PLAIN)
    assert json.loads(bytes(span)) == user([{"text": "a"}, {"text": "b"}])


@pytest.mark.parametrize("white", ["", " ", "  ", "\n\t "])
def test_a_mark_is_left_out_with_the_white_space_on_both_sides_of_its_comma(white: str) -> None:
    """So that a client which writes JSON otherwise has the same key with and without the mark."""
    mark = f'"cache_control"{white}:{white}null'
    for members in (f'"text":"a"{white},{white}{mark}', f'{mark}{white},{white}"text":"a"'):
        body = b'{"model":"m","messages":[{"role":"user","content":[{%b}]}]}' % members.encode()
        [span] = keyed_spans(read(body, Endpoint.CHAT), PLAIN)
        assert bytes(span) == b'{"role":"user","content":[{"text":"a"}]}'


MARK, BREAKPOINT = '"cache_control":null', '"prompt_cache_breakpoint":null'


@pytest.mark.parametrize("after", ["", "x" * 200])
@pytest.mark.parametrize(
    ("marks", "spans", "left"),
    [
        ([MARK] * 300, 3, 900 - 512),
        ([BREAKPOINT] * 300, 3, 900 - 512),
        ([MARK] * 512, 1, 0),
        ([MARK] * 513, 1, 1),
        ([MARK] * 200 + [BREAKPOINT] * 200, 2, 800 - 400 - 2 * 112),
    ],
)
def test_so_many_marks_are_left_out_and_no_more(marks: list[str], spans: int, left: int, after: str) -> None:
    """Over all messages, whether they are near the end of a message or not."""
    span = b'{"content":[{%b,"text":"%b"}]}' % (",".join(marks).encode(), after.encode())
    prompt = dataclasses.replace(prompt_of([user("q")]), spans=(span,) * spans, cache_marks=1 << 20)
    texts_left = b"".join([bytes(each) for each in keyed_spans(prompt, PLAIN)]).decode()
    assert texts_left.count(MARK) + texts_left.count(BREAKPOINT) == left


@pytest.mark.parametrize(
    "content",
    [
        '"cache_control":' * 400_000,
        '"cache_control":{"a":1},' * 200_000,
        '"prompt_cache_breakpoint":null,' * 200_000,
        '"cache_control":' + "[" * 10 + '"cache_control":{"a":"' + "b" * 5_000_000,
        " " * 3_000_000 + '"cache_control":null' + " " * 3_000_000,
    ],
)
def test_very_many_or_very_long_marks_take_no_time(content):
    """Only so many are looked at, over all messages."""
    span = b'{"content":[{' + content.encode() + b'"cache_control":null}]}'
    prompt = dataclasses.replace(prompt_of([user("q")]), spans=(span,) * 3, cache_marks=1 << 20)
    start = time.process_time()
    keyed_spans(prompt, PLAIN)
    assert time.process_time() - start < 0.5, "of several seconds"


def test_items_of_the_responses_api_have_one_key_as_a_string_and_as_a_marked_list():
    mark = {"prompt_cache_breakpoint": {"mode": "explicit"}}

    def key(value: Any) -> list[bytes]:
        output = {"type": "function_call_output", "call_id": "c", "output": value}
        items = [{"role": "developer", "content": value}, {"role": "user", "content": "q"}, output]
        body = json.dumps({"model": "m", "input": items}).encode()
        return [bytes(span) for span in keyed_spans(read(body, Endpoint.RESPONSES), PLAIN)]

    assert (
        key([{"type": "input_text", "text": "t", **mark}]) == key([{"type": "input_text", "text": "t"}]) == key("t")
    )


def test_text_and_parameters_that_are_named_like_a_mark_stay():
    texts_of_marks = [user('write "cache_control": {"type": "ephemeral"} there'), user("cache_control")]
    assert texts(texts_of_marks) == [json.dumps(message) for message in texts_of_marks]
    tools = [{"name": "f", "parameters": {"properties": {"cache_control": {"type": "object", "properties": {}}}}}]
    assert texts([user("q")], tools=tools)[0] == json.dumps(tools)


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


def test_a_billing_block_in_anthropics_dialect_is_kept_only_if_it_is_rendered_from_there():
    def keys(facts):
        blocks = [
            [{"type": "text", "text": text} for text in (f"x-anthropic-billing-header: cch={n};", "s" * 600)]
            for n in "ab"
        ]
        return [hashes([user("q")], facts, Endpoint.MESSAGES, system=system) for system in blocks]

    one, two = keys(TemplateFacts(keeps_billing=True))
    assert one != two
    one, two = keys(TemplateFacts(keeps_billing=True, messages_drop_billing=True))
    assert one == two


def test_only_the_line_of_the_billing_mark_is_left_out():
    """Clients may write it before the system prompt in one text; engines drop the line."""

    def system(nonce, rest):
        return {"role": "system", "content": f"x-anthropic-billing-header: cch={nonce};\n{rest * 300}"}

    one, other = [system("abc", "x"), user("q")], [system("def", "x"), user("q")]
    assert hashes(one) == hashes(other)
    assert hashes(one)[0] != hashes([system("abc", "y"), user("q")])[0]


DROPS = TemplateFacts(drops_reasoning=True, drops_thoughts=True)


@pytest.mark.parametrize(
    "content",
    [
        "<think>\nso I thought\n</think>\n\nan answer",
        "so I thought</think>an answer",
        [{"type": "text", "text": "<think>so I thought</think>an answer"}],
    ],
)
def test_reasoning_within_the_text_of_an_old_answer_is_no_part_of_the_key_if_the_template_drops_it(content):
    before = [SYSTEM, user("q1"), assistant(content)]
    assert "so I thought" in texts(before, DROPS)[-1], "the last turn keeps it"
    then = texts([*before, user("q2")], DROPS)
    assert "so I thought" not in "".join(then)
    assert "an answer" in then[2]
    assert "so I thought" in "".join(texts([*before, user("q2")]))


def test_reasoning_in_the_text_stays_if_the_template_drops_only_the_field():
    before = [SYSTEM, user("q1"), assistant("<think>so I thought</think>an answer"), user("q2")]
    assert "so I thought" in "".join(texts(before, TemplateFacts(drops_reasoning=True)))


def test_a_template_that_knows_no_reasoning_leaves_the_field_out_in_the_last_turn_too():
    """The next user message therefore changes nothing before it."""
    ignores = TemplateFacts(ignores_reasoning=True)
    loop = [SYSTEM, user("q1"), assistant("<think>hm</think>a1", reasoning_content="so I thought")]
    then = texts([*loop, user("q2")], ignores)
    assert texts(loop, ignores) == then[:3]
    assert "so I thought" not in then[2]
    assert "hm" in then[2]


def test_reasoning_marks_that_encoders_escape_are_found_too():
    body = (
        rb'{"model": "m", "messages": [{"role": "assistant", "content": "\u003cthink\u003ehm\u003c/think\u003eyes"},'
        rb'{"role": "assistant", "content": "hm<\/think>no"}, {"role": "user", "content": "<think>mine</think>"}]}'
    )
    spans = [bytes(span) for span in keyed_spans(read(body, Endpoint.CHAT), DROPS)]
    assert [b"hm" in span for span in spans] == [False, False, False]
    assert b"yes" in spans[0]
    assert b"no" in spans[1]
    assert b"mine" in spans[2]


def test_reasoning_of_other_dialects_is_dropped_before_a_users_message_and_not_before_the_result_of_a_tool():
    thought = {"type": "thinking", "thinking": "so I thought", "signature": "s"}
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "r"}]}
    loop = [user("q1"), assistant([thought, call]), result]
    assert "so I thought" in "".join(texts(loop, DROPS, Endpoint.MESSAGES, max_tokens=5))
    then = texts([*loop, user("q2")], DROPS, Endpoint.MESSAGES, max_tokens=5)
    assert "so I thought" not in "".join(then)
    assert "tool_use" in then[1]
    items = [user("q1"), {"type": "reasoning", "id": "rs_1", "summary": []}, assistant("a1"), user("q2")]
    prompt = read(json.dumps({"model": "m", "input": items}).encode(), Endpoint.RESPONSES)
    assert [b"summary" in bytes(span) for span in keyed_spans(prompt, DROPS)] == [False] * 4


@pytest.mark.parametrize("place", ["first", "last"])
def test_ids_of_messages_are_no_part_of_the_key(place):
    """The ids of calls within them are, since some templates render these."""

    def talk(prefix, call="call_1"):
        calls = [{"id": call, "type": "function", "function": {"name": "f", "arguments": "{}" * 99}}]
        messages = [user("q" * 600), assistant("a", tool_calls=calls), {"role": "tool", "content": "r"}]
        ids = [{"id": f"{prefix}_{number}"} for number in range(len(messages))]
        merged = zip(ids, messages, strict=True)
        return [{**one, **other} if place == "first" else {**other, **one} for one, other in merged]

    assert hashes(talk("msg_a")) == hashes(talk("msg_b"))
    assert hashes(talk("msg_a")) != hashes(talk("msg_a", call="call_2"))


def test_an_item_that_refers_to_another_is_known_by_its_id():
    def key(name):
        body = {"model": "m", "input": [{"type": "item_reference", "id": name}]}
        prompt = read(json.dumps(body).encode(), Endpoint.RESPONSES)
        return [bytes(span) for span in keyed_spans(prompt, PLAIN)]

    assert key("msg_a") != key("msg_b")


def stored(tools, messages, rest, facts):
    """The key of a stored context's part alone, if it is first, with that of the rest; and of all of it at once."""
    prompt = prompt_of(rest)
    listed = [memoryview(json.dumps(message).encode()) for message in messages]
    packed = json.dumps(tools).encode() if tools else b""
    whole = keyed_stored(prompt, packed, listed, prompt.spans, facts)
    if not stored_first(prompt.spans, facts):
        return None, [bytes(span) for span in whole]
    alone = [*keyed_stored(prompt, packed, listed, (), facts), *keyed_spans(prompt, facts)]
    return [bytes(span) for span in alone], [bytes(span) for span in whole]


@pytest.mark.parametrize(
    "message",
    [
        b'{"role":"user","content":[{"type":"text","text":"a","cache_control":{"type":"ephemeral"}}]}',
        b'{"role":"user","content":[{"type":"text","text":"a","prompt_cache_breakpoint":{"mode":"explicit"}}]}',
        b'{"role":"user","content":[{"type":"text","text":"a"}]}',
        b'{"role":"user","id":"msg_1","content":"a"}',
    ],
)
def test_what_is_no_part_of_the_key_is_left_out_of_a_stored_context_whatever_the_body_has(message: bytes):
    """The body that names the context has neither its marks nor its lists nor its ids."""
    plain = b'{"role":"user","id":,"content":"a"}' if b"msg_1" in message else b'{"role":"user","content":"a"}'
    prompt = prompt_of([user("q")])
    assert bytes(keyed_stored(prompt, b"", [message], prompt.spans, PLAIN)[0]) == plain


def test_a_stored_context_that_begins_with_a_user_has_no_system_prompt():
    """Its tools come first where they come behind the system prompt."""
    prompt, message = prompt_of([user("q")]), b'{"role":"user","content":"a"}'
    facts = TemplateFacts(order=ToolOrder.SYSTEM_FIRST)
    spans = [bytes(span) for span in keyed_stored(prompt, b"[1]", [message], prompt.spans, facts)]
    assert spans[:2] == [b"[1]", message]


@pytest.mark.parametrize("order", list(ToolOrder))
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_stored_context_is_keyed_as_the_same_prompt_sent_whole(order, drops, moves, last):
    """Whether its own part is computed beforehand or not."""
    facts = TemplateFacts(
        order=order, drops_reasoning=drops, moves_system=moves, splits_systems=not moves, system_last=last
    )
    messages = [SYSTEM, user("document"), assistant("noted", reasoning_content="hm")]
    late = {"role": "system", "content": "late"}
    for rest in ([user("q")], [late, user("q")], [user("q"), assistant("a"), late, user("q2")]):
        alone, whole = stored(TOOLS, messages, rest, facts)
        sent = texts([*messages, *rest], facts, tools=TOOLS)
        assert [span.decode() for span in whole] == sent
        if alone is not None:
            assert alone == whole
    assert (alone is None) == (moves or last or order is ToolOrder.TOOLS_LAST)


def test_a_stored_context_with_answers_that_are_rewritten_is_keyed_as_the_same_prompt_sent_whole():
    """It is computed beforehand only if a user message follows."""
    rewrites = TemplateFacts(rewrites_turns=True)
    messages = [SYSTEM, user("document"), assistant("noted")]
    for rest, is_alone in (([user("q"), assistant("a")], True), ([{"role": "tool", "content": "r"}], False)):
        alone, whole = stored(None, messages, rest, rewrites)
        assert [span.decode() for span in whole] == texts([*messages, *rest], rewrites)
        assert alone == (whole if is_alone else None)


def test_a_stored_context_with_a_joint_head_is_keyed_as_the_same_prompt_sent_whole():
    assert not stored_first((), TemplateFacts(joins_head=True)), "what follows may belong to the head"


def test_a_stored_context_before_the_result_of_a_tool_keeps_its_last_reasoning():
    messages = [user("q"), assistant("a", reasoning_content="so I thought")]
    alone, whole = stored(None, messages, [{"role": "tool", "content": "r"}], DROPS)
    assert alone is None
    assert b"so I thought" in b"".join(whole)


def test_messages_that_cannot_be_read_keep_their_place():
    body = b'{"model": "m", "messages": [{"role": 5}, "text", {"role": "user"}], "tools": [{"type": "function"}]}'
    spans = keyed_spans(read(body, Endpoint.CHAT), TemplateFacts(ToolOrder.SYSTEM_FIRST, drops_reasoning=True))
    assert [bytes(span)[:8] for span in spans] == [b'[{"type"', b'{"role":', b'"text"', b'{"role":']


_MARK = {"cache_control": {"type": "ephemeral"}}
_MESSAGES = st.one_of(
    st.builds(user, st.text(max_size=300)),
    st.builds(lambda text, name: {"id": name, **assistant(text)}, st.text(max_size=300), st.text(max_size=9)),
    st.builds(lambda text, name: assistant(text, id=name), st.sampled_from(["a", "a" * 300]), st.text(max_size=9)),
    st.builds(lambda text: user([{"type": "text", "text": text, **_MARK}]), st.text(max_size=40)),
    st.builds(lambda text: user([{"type": "text", "text": text}]), st.text(max_size=40)),
    st.builds(lambda text: user(text) | _MARK, st.text(max_size=40)),
    st.just({"role": "system", "content": "x-anthropic-billing-header: cch=1\nbe kind"}),
)


@given(st.lists(_MESSAGES, max_size=3) | st.lists(_MESSAGES, max_size=12), st.booleans())
def test_the_key_does_not_depend_on_how_much_of_the_body_is_searched(messages, has_tools):
    """A short body is searched as a whole, a long one at the ends of its messages: both leave out the same."""
    prompt = prompt_of(messages, **({"tools": TOOLS} if has_tools else {}))
    long = dataclasses.replace(prompt, body=bytes(prompt.body) + b" " * 4096)
    assert [*map(bytes, keyed_spans(long, PLAIN))] == [*map(bytes, keyed_spans(prompt, PLAIN))]


def test_only_an_assistants_thoughts_are_left_out_of_the_key():
    """What a user or a tool wrote between such marks is rendered."""
    facts = TemplateFacts(drops_thoughts=True)

    def key(role: str, thought: str) -> list[bytes]:
        old = {"role": role, "content": f"<think>{thought}</think>an answer"}
        prompt = prompt_of([SYSTEM, user("q1"), old, user("q2")])
        return [bytes(span) for span in keyed_spans(prompt, facts)]

    for role in ("user", "tool", "system"):
        assert key(role, "one") != key(role, "other")
    assert key("assistant", "one") == key("assistant", "other")

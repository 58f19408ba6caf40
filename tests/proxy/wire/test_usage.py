"""Usage of every dialect in the normal form: golden files, clamping, and never an exception."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import brotli
import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from proxy.model import Endpoint
from proxy.records import KindTokens, Usage
from proxy.wire.decode import ResponseDecoder
from proxy.wire.schemas import LONG_RESPONSE_BYTES, MEMBER_BYTES_MOST
from proxy.wire.sse import StreamTap
from proxy.wire.usage import TOKENS_MOST, PassedBody, created_object, merge, normal, read_response, tail_usage

GOLDEN = Path(__file__).parent / "golden"
PACK: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.compress,
    b"br": brotli.compress,
    b"zstd": zstandard.compress,
}

_OPENAI = Usage(2006, 300, 1920, reasoning_tokens=128)
_WRITE = Usage(2006, 30, 1024, cache_write_5m_tokens=896)
_RESPONSES = Usage(328, 52, 256, reasoning_tokens=20)
_ANTHROPIC = Usage(2121, 42, 1800, cache_write_5m_tokens=100, cache_write_1h_tokens=200)
_MOONSHOT = Usage(8000, 20, 7936)
_DEEPSEEK = Usage(1100, 60, 1024, reasoning_tokens=40)
_QWEN = Usage(3019, 104, 2048, cache_write_5m_tokens=900)
_LLAMA = Usage(1950, 32, 1900, prefill_seconds=0.0945)
EXPECTED: dict[str, Usage | None] = {
    "anthropic.json": _ANTHROPIC,
    "anthropic.sse": _ANTHROPIC,
    "anthropic_repeats_zeros.sse": _ANTHROPIC,
    "anthropic_without_split.json": Usage(2121, 42, 1800, cache_write_5m_tokens=300),
    "broken.sse": None,
    "cr_only.sse": _OPENAI,
    "crlf_multiline.sse": _OPENAI,
    "deepseek.json": _DEEPSEEK,
    "deepseek.sse": _DEEPSEEK,
    "embeddings.json": Usage(8),
    "error_inside.sse": None,
    "error_with_status_200.json": None,
    "gemini_native.json": Usage(2000, 603, 1500, reasoning_tokens=405),
    "gemini_openai.json": Usage(21, 603, None, reasoning_tokens=405),
    "gemini_openai.sse": Usage(21, 603),
    "inconsistent.json": Usage(100, 0, 100, inconsistent=True),
    "llamacpp.json": _LLAMA,
    "llamacpp.sse": _LLAMA,
    "llamacpp_timings_alone.json": _LLAMA,
    "llamacpp_timings_alone.sse": _LLAMA,
    "moonshot_both.json": _MOONSHOT,
    "moonshot_in_choices.sse": _MOONSHOT,
    "moonshot_nested.json": _MOONSHOT,
    "moonshot_top_level.json": _MOONSHOT,
    "moonshot_top_level.sse": _MOONSHOT,
    "negative.json": Usage(0, 12, 0, inconsistent=True),
    "openai_chat.json": _OPENAI,
    "openai_chat.sse": _OPENAI,
    "openai_chat_cache_write.json": _WRITE,
    "openai_chat_cache_write.sse": _WRITE,
    "openai_completions.json": Usage(50, 16),
    "openai_completions.sse": Usage(50, 16),
    "openai_responses.json": _RESPONSES,
    "openai_responses.sse": _RESPONSES,
    "qwen.json": _QWEN,
    "qwen.sse": _QWEN,
    "sglang.json": Usage(700, 10, 640),
    "sglang.sse": Usage(700, 10, 640),
    "sglang_zero.json": Usage(700, 10, None),
    "usage_missing.json": None,
    "usage_missing.sse": None,
    "usage_null.json": None,
    "usage_null.sse": None,
    "usage_twice.sse": _OPENAI,
    "vllm.json": Usage(515, 5, 512),
    "vllm.sse": Usage(515, 5, 512),
    "vllm_continuous.sse": Usage(515, 2),
    "vllm_zero.json": Usage(515, 5, None),
}


def _usage_of(body: bytes, endpoint: Endpoint) -> Usage | None:
    return read_response(body, endpoint).usage


def endpoint_of(name: str) -> Endpoint:
    """Return the endpoint that a golden file's name means."""
    for part, endpoint in (("anthropic", Endpoint.MESSAGES), ("responses", Endpoint.RESPONSES)):
        if part in name:
            return endpoint
    return Endpoint.COMPLETIONS if "completions" in name else Endpoint.CHAT


def test_every_golden_file_has_its_expected_usage() -> None:
    """Every golden file is read."""
    assert {path.name for path in GOLDEN.iterdir()} - {"README.md"} == set(EXPECTED)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.endswith(".json")])
def test_a_plain_answer_is_read_in_its_dialect(name: str) -> None:
    """Each published shape gives its normal form."""
    assert _usage_of((GOLDEN / name).read_bytes(), endpoint_of(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.endswith(".sse")])
def test_a_stream_is_read_in_its_dialect(name: str) -> None:
    """Each published stream gives its normal form, and an end where it has one."""
    tap = StreamTap(endpoint_of(name))
    body = (GOLDEN / name).read_bytes()
    assert tap.feed(body) == body
    assert tap.close() == b""
    assert tap.usage == EXPECTED[name]
    assert tap.first_token_seen
    assert tap.finished == (name not in {"broken.sse", "error_inside.sse"})
    assert tap.error_seen == (name == "error_inside.sse")


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"zstd"])
@pytest.mark.parametrize("name", list(EXPECTED))
def test_every_dialect_is_read_as_well_when_compressed(name: str, encoding: bytes) -> None:
    """Whole where it is plain, in pieces of odd sizes where it streams."""
    packed = PACK[encoding]((GOLDEN / name).read_bytes())
    decoder = ResponseDecoder(encoding)
    if name.endswith(".json"):
        assert _usage_of(decoder.feed(packed), endpoint_of(name)) == EXPECTED[name]
        return
    tap = StreamTap(endpoint_of(name))
    for start in range(0, len(packed), 97):
        tap.feed(decoder.feed(packed[start : start + 97]))
    tap.close()
    assert tap.usage == EXPECTED[name]


def test_anthropic_input_excludes_what_was_cached_and_written() -> None:
    """Counting it as OpenAI's would lose nine tenths of the prompt."""
    usage = normal({"input_tokens": 10, "cache_read_input_tokens": 90, "output_tokens": 1})
    assert usage == Usage(100, 1, 90)


def test_anthropic_without_cache_fields_is_unknown_and_not_zero() -> None:
    """An engine behind that surface may not report at all."""
    assert normal({"input_tokens": 10, "output_tokens": 1}, endpoint=Endpoint.MESSAGES) == Usage(10, 1, None)


def test_the_split_of_writes_keeps_its_sum() -> None:
    """Writes in neither part of the split are for five minutes; a split larger than the sum is inconsistent."""
    base = {"input_tokens": 0, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 100}
    assert normal(base | {"cache_creation": {"ephemeral_1h_input_tokens": 30}}) == Usage(100, 0, 0, 70, 30)
    beyond = normal(base | {"cache_creation": {"ephemeral_1h_input_tokens": 300}})
    assert beyond == Usage(100, 0, 0, 0, 100, inconsistent=True)


@pytest.mark.parametrize(
    ("fresh", "cached", "written"), [(10, 900, 100), (5_000, 900, 100), (10, 900, 0), (10, 0, 100), (0, 900, 0)]
)
def test_a_gateway_passes_anthropics_counts_on_under_openais_names(fresh: int, cached: int, written: int) -> None:
    """The prompt excludes what the total includes. It is no thinking, which would be billed as output."""
    usage = {
        "prompt_tokens": fresh,
        "completion_tokens": 50,
        "total_tokens": fresh + cached + written + 50,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": written,
    }
    assert normal(usage) == Usage(fresh + cached + written, 50, cached, written)


@pytest.mark.parametrize(
    ("name", "counts"), [("cache_read_input_tokens", (900, 0)), ("cache_creation_input_tokens", (None, 900))]
)
def test_either_of_anthropics_names_shows_that_the_prompt_excludes_it(
    name: str, counts: tuple[int | None, int]
) -> None:
    """Although the rest is longer; without either it would be thinking."""
    usage = {"prompt_tokens": 5_000, "completion_tokens": 50, "total_tokens": 5_950}
    assert normal(usage | {name: 900}) == Usage(5_900, 50, *counts)


def test_writes_are_read_by_litellms_name_alone_too() -> None:
    """In the details of the prompt."""
    details = {"cached_tokens": 60, "cache_creation_tokens": 30}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": details}
    assert normal(usage) == Usage(100, 7, 60, 30)


@pytest.mark.parametrize(("total", "expected"), [(1_950, 50), (1_050, 50), (1_057, 57)])
def test_a_prompt_that_includes_what_was_cached_stays_as_it_is(total: int, expected: int) -> None:
    """Also if the total counts that part twice; thinking is still found."""
    usage = {"prompt_tokens": 1_000, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 900}}
    assert normal(usage | {"total_tokens": total}) == Usage(1_000, expected, 900)


@pytest.mark.parametrize(
    ("fields", "details"),
    [
        ({}, {"cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20}}),
        (
            {"cache_creation_input_tokens": 30, "cache_read_input_tokens": 60},
            {
                "cache_creation_tokens": 30,
                "cache_write_tokens": 30,
                "cache_creation_token_details": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
            },
        ),
        (
            {"claude_cache_creation_5_m_tokens": 10, "claude_cache_creation_1_h_tokens": 20},
            {"cached_creation_tokens": 30},
        ),
        ({"claude_cache_creation_1_h_tokens": 20}, {"cached_creation_tokens": 30}),
        ({"claude_cache_creation_5_m_tokens": 10, "claude_cache_creation_1_h_tokens": 20}, {}),
    ],
)
def test_gateways_report_writes_of_an_hour_in_openais_form(fields, details) -> None:
    """Qwen, LiteLLM and New API. At Anthropic these writes cost twice the input, and others 1.25 times."""
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 60, **details}}
    assert normal(usage | fields) == Usage(100, 7, 60, 10, 20)


def test_two_fields_that_disagree_give_the_lesser_and_a_mark() -> None:
    """A saving is never guessed upwards."""
    usage = normal({"prompt_tokens": 100, "cached_tokens": 50, "prompt_tokens_details": {"cached_tokens": 60}})
    assert usage == Usage(100, 0, 50, inconsistent=True)


@pytest.mark.parametrize(
    ("value", "tokens", "inconsistent"),
    [
        (7, 7, False),
        (7.0, 7, False),
        (7.5, 7, True),
        ("7", 7, True),
        ("x", None, True),
        (True, None, True),
        (-7, 0, True),
        (10**30, 100, True),
        (1e308, 100, True),
        (float("nan"), None, True),
        (float("inf"), 100, True),
        ([], None, True),
        ({"a": 1}, None, True),
        (None, None, False),
    ],
)
def test_a_cached_count_of_any_kind_is_clamped_and_marked(value, tokens, inconsistent) -> None:
    """An impossible value raises nothing and is never priced."""
    usage = normal({"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": value}})
    assert usage == Usage(100, 1, tokens, inconsistent=inconsistent)


def test_an_absurd_prompt_is_clamped() -> None:
    """Not even the sum of parts may pass the cap."""
    usage = normal({"input_tokens": 10**40, "cache_read_input_tokens": 10**40, "output_tokens": 0})
    assert usage == Usage(TOKENS_MOST, 0, TOKENS_MOST, inconsistent=True)


def test_deepseek_counts_that_do_not_add_up_are_marked() -> None:
    """Hit and miss make the prompt, or something is wrong."""
    usage = normal({"prompt_tokens": 100, "prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 6})
    assert usage == Usage(100, 0, 64, inconsistent=True)
    assert normal({"prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 6}) is not None


@pytest.mark.parametrize("usage", [None, {}, [], 3, "x", True, {"prompt_tokens": None}, {"total_tokens": 5}])
def test_usage_that_says_nothing_is_none(usage) -> None:
    """Missing is told apart from zero."""
    assert normal(usage) is None


def test_a_later_report_of_zero_does_not_erase_what_was_known() -> None:
    """Some Anthropic-compatible servers repeat the input as zero at the end."""
    merged = merge({"input_tokens": 10, "output_tokens": 1}, {"input_tokens": 0, "output_tokens": 9})
    assert merged == {"input_tokens": 10, "output_tokens": 9}
    split = {"cache_creation": {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 9}}
    zeros = {"cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}, "output_tokens": 9}
    assert merge(split, zeros) == split | {"output_tokens": 9}
    details = {"prompt_tokens_details": {"cached_tokens": 64}}
    assert merge(details, {"prompt_tokens_details": {"cached_tokens": None, "audio_tokens": 0}}) == {
        "prompt_tokens_details": {"cached_tokens": 64, "audio_tokens": 0}
    }


def test_an_answer_that_is_an_error_or_no_json_is_told() -> None:
    """A status of 200 does not make it a success."""
    assert read_response((GOLDEN / "error_with_status_200.json").read_bytes(), Endpoint.CHAT).error_seen
    assert read_response(b"<html>", Endpoint.CHAT).error_seen
    usage = b'"usage":{"prompt_tokens":9,"completion_tokens":1}'
    assert read_response(b'{"choices":[{"finish_reason":"error"}],%b}' % usage, Endpoint.CHAT).error_seen
    assert not read_response(b'{"choices":[{"finish_reason":"stop"}],%b}' % usage, Endpoint.CHAT).error_seen
    assert not read_response(b'{"message":"m",%b}' % usage, Endpoint.CHAT).error_seen
    assert read_response(b"", Endpoint.CHAT).error_seen
    assert not read_response((GOLDEN / "openai_responses.json").read_bytes(), Endpoint.RESPONSES).error_seen


def test_usage_is_found_in_the_end_of_an_event_and_not_in_a_tool() -> None:
    """A tool's parameter named usage comes before and has no counts."""
    body = (GOLDEN / "openai_responses.json").read_bytes()
    assert normal(tail_usage(body[200:])) == _RESPONSES
    assert tail_usage(b'"properties":{"usage":{"type":"object"}}') is None
    assert tail_usage(b'"usage":{"prompt_tokens":1') is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
_NAMES = st.sampled_from(
    [
        "prompt_tokens",
        "completion_tokens",
        "input_tokens",
        "output_tokens",
        "total_tokens",
        "cached_tokens",
        "prompt_tokens_details",
        "input_tokens_details",
        "completion_tokens_details",
        "reasoning_tokens",
        "cache_read_input_tokens",
        "cache_creation",
        "cache_creation_input_tokens",
        "cache_write_tokens",
        "ephemeral_5m_input_tokens",
        "ephemeral_1h_input_tokens",
        "prompt_cache_hit_tokens",
        "prompt_cache_miss_tokens",
        "promptTokenCount",
        "cachedContentTokenCount",
        "thoughtsTokenCount",
        "cache_n",
        "prompt_n",
        "prompt_ms",
        "predicted_n",
    ]
)
_USAGE = st.dictionaries(_NAMES, st.integers(-5, 2000) | _JSON | st.dictionaries(_NAMES, _JSON | st.integers(-5, 99)))


@given(_USAGE | _JSON, _USAGE | _JSON, st.sampled_from(list(Endpoint)))
def test_any_json_gives_a_sound_usage_or_none(usage, timings, endpoint) -> None:
    """Nothing is raised, and the parts never exceed the whole."""
    found = normal(usage, timings, endpoint=endpoint)
    if found is None:
        return
    written = found.cache_write_5m_tokens + found.cache_write_1h_tokens
    assert 0 <= (found.cached_tokens or 0) + written <= found.prompt_tokens <= TOKENS_MOST
    assert 0 <= found.reasoning_tokens <= found.output_tokens <= TOKENS_MOST
    assert min(found.cached_tokens or 0, found.cache_write_5m_tokens, found.cache_write_1h_tokens) >= 0


@given(st.binary(max_size=80) | _JSON.map(lambda value: msgspec.json.encode(repr(value))))
def test_any_bytes_as_an_answer_are_survived(body) -> None:
    """The answer was relayed already; reading it must not fail."""
    read_response(body, Endpoint.CHAT)
    tail_usage(body)


@pytest.mark.parametrize(
    ("usage", "beside", "tier"),
    [
        ({"service_tier": "batch", "input_tokens": 1, "output_tokens": 1}, None, "batch"),
        ({"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}, "flex", "flex"),
        ({"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}, "Priority", "priority"),
        ({"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}, "default", ""),
        ({"service_tier": "standard", "input_tokens": 1, "output_tokens": 1}, None, ""),
        ({"service_tier": "standard", "speed": "fast", "input_tokens": 1, "output_tokens": 1}, None, "fast"),
        ({"speed": "standard", "input_tokens": 1, "output_tokens": 1}, None, ""),
        ({"prompt_tokens": 1, "completion_tokens": 1}, 7, ""),
        ({"prompt_tokens": 1, "completion_tokens": 1}, "x" * 100, ""),
    ],
)
def test_the_service_tier_that_was_used_is_part_of_the_usage(usage, beside, tier) -> None:
    """Beside the usage or inside it; ordinary tiers have no name."""
    found = normal(usage, service_tier=beside)
    assert found is not None
    assert found.service_tier == tier


def test_the_tier_of_a_stream_is_found() -> None:
    """It comes with every chunk of chat, and with the response on the responses surface."""
    chat = StreamTap(Endpoint.CHAT)
    chat.feed(b'data: {"choices":[{"delta":{"content":"a"}}],"service_tier":"flex"}\n\n')
    chat.feed(b'data: {"choices":[],"service_tier":"flex","usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n')
    responses = StreamTap(Endpoint.RESPONSES)
    usage = b'"usage":{"input_tokens":1,"output_tokens":1}'
    responses.feed(b'data: {"type":"response.completed","response":{"service_tier":"priority",' + usage + b"}}\n\n")
    assert chat.usage is not None
    assert responses.usage is not None
    assert (chat.usage.service_tier, responses.usage.service_tier) == ("flex", "priority")


@pytest.mark.parametrize("iterations", [None, [], [{}], [7], [{"input_tokens": 5, "output_tokens": 1}], [{}] * 5000])
def test_iterations_that_add_nothing_leave_the_usage_as_it_is(iterations) -> None:
    """One call is no sum, and a list that makes no sense counts for nothing."""
    usage = {"input_tokens": 50, "output_tokens": 3, "iterations": iterations}
    assert normal(usage, endpoint=Endpoint.MESSAGES) == Usage(50, 3, None)


def test_cached_and_written_tokens_of_several_calls_are_added() -> None:
    """Each call has its own split."""
    call = {"input_tokens": 10, "output_tokens": 1, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 3}
    found = normal({**call, "iterations": [call, call]}, endpoint=Endpoint.MESSAGES)
    assert found == Usage(36, 2, 10, cache_write_5m_tokens=6, longest_call_tokens=18)


def test_calls_that_add_up_to_less_than_the_whole_are_no_list_of_it() -> None:
    """A list that leaves a call out must not lower the count."""
    usage = {"input_tokens": 50, "output_tokens": 3, "iterations": [{"input_tokens": 5}, {"output_tokens": 1}]}
    assert normal(usage, endpoint=Endpoint.MESSAGES) == Usage(50, 3, None)


@pytest.mark.parametrize("fields", [{"num_cached_tokens": 64}, {"prompt_token_details": {"cached_tokens": 64}}])
def test_mistrals_own_names_of_cached_tokens_are_read(fields) -> None:
    """At the top, or in details whose name is in the singular."""
    assert normal({"prompt_tokens": 100, "completion_tokens": 1, **fields}) == Usage(100, 1, 64)


def test_a_body_that_a_strict_decoder_refuses_is_read_as_well() -> None:
    """A lone surrogate or NaN in the text costs no usage, whichever the endpoint."""
    for text in (b'"\\ud800"', b"NaN"):
        body = b'{"x":%b,"usage":{"prompt_tokens":9,"completion_tokens":1},"model":"m"}' % text
        read = read_response(body, Endpoint.CHAT)
        assert (read.usage, read.error_seen, read.model) == (Usage(9, 1), False, "m")


def test_a_long_response_is_read_without_members_that_are_too_long() -> None:
    """A million values in one of them would hold the event loop for half a second; the rest counts as ever."""
    rest = b'"usage":{"prompt_tokens":9,"completion_tokens":1},"model":"m"'
    text = b'{"choices":[{"message":{"content":"%b"}}],' % (b"x" * LONG_RESPONSE_BYTES)
    read = read_response(text + rest + b"}", Endpoint.CHAT)
    assert (read.usage, read.error_seen, read.model) == (Usage(9, 1), False, "m")
    many = b"[%b]" % (b"1," * MEMBER_BYTES_MOST + b"1")
    read = read_response(text + rest.replace(b'"m"', many) + b"}", Endpoint.CHAT)
    assert (read.usage, read.error_seen, read.model) == (Usage(9, 1), False, None)
    read = read_response(b'%b"usage":{"prompt_tokens":%b},"error":%b}' % (text, many, many), Endpoint.CHAT)
    assert (read.usage, read.error_seen) == (None, True)
    in_choice = b'{"choices":[{"usage":{"prompt_tokens":9,"completion_tokens":1},"text":"%b"}]}'
    assert read_response(in_choice % b"x", Endpoint.CHAT).usage == Usage(9, 1)
    assert read_response(in_choice % (b"x" * LONG_RESPONSE_BYTES), Endpoint.CHAT).usage is None


def test_a_response_that_is_cut_or_broken_has_the_usage_at_its_end_and_is_an_error_without_one() -> None:
    """By the endpoint's own names, with the counts that it does not name left out."""
    tail = b'x","usage":{"input_tokens":7,"cache_read_input_tokens":5,"output_tokens":2}}'
    read = read_response(tail, Endpoint.MESSAGES)
    assert read.usage is not None
    assert (read.usage.prompt_tokens, read.usage.output_tokens, read.error_seen) == (12, 2, False)
    read = read_response(b"nothing", Endpoint.CHAT)
    assert (read.usage, read.error_seen, read.model) == (None, True, None)


def test_none_cached_is_a_count_and_more_than_the_prompt_is_not() -> None:
    """An absent count is not a zero."""
    for cached, expected in ((0, 0), (10, 10), (None, None)):
        details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
        usage = normal({"prompt_tokens": 10, "completion_tokens": 1, **details}, endpoint=Endpoint.CHAT)
        assert usage is not None
        assert usage.cached_tokens == expected


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b'{"id":7}', b"\xff"])
def test_a_response_that_describes_no_object_describes_none(body: bytes) -> None:
    """Whatever the upstream sends."""
    created = created_object(body)
    assert created is None or not list(created.ids())


def test_usage_in_a_choice_is_found_unless_the_choices_cannot_be_read() -> None:
    """Moonshot's older API has it there."""
    body = b'{"choices":[{},{"usage":{"prompt_tokens":9,"completion_tokens":1}}]}'
    assert read_response(body, Endpoint.CHAT).usage == Usage(9, 1)
    for choices in (b"7", b'[{"usage":7}]', b"null"):
        assert read_response(b'{"choices":%b}' % choices, Endpoint.CHAT).usage is None


def test_the_last_object_that_has_counts_is_the_usage_of_a_fragment() -> None:
    """Not a tool's parameter of that name; one with NaN in it is read, and one without an end is none."""
    counts = b'"usage": {"prompt_tokens": 9, "completion_tokens": 1, "x": {"y": NaN}}'
    assert normal(tail_usage(b'{"a":1},' + counts + b', "usage": {"type": "string"}')) == Usage(9, 1)
    assert tail_usage(counts[:-1]) is None
    assert tail_usage(b'"usage": 7') is None


@pytest.mark.parametrize(("most_bytes", "whole"), [(6, b"abcdef"), (5, None)])
def test_a_body_that_has_passed_is_kept_as_a_whole_up_to_a_limit(most_bytes: int, whole: bytes | None) -> None:
    """As it was sent."""
    body = PassedBody(b"", Endpoint.CHAT, most_bytes)
    for piece in (b"abc", b"", b"def"):
        body.feed(piece)
    assert body.whole() == whole


@pytest.mark.parametrize("encoding", [b"", b"gzip"])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_the_usage_of_a_body_that_is_too_long_is_read_at_its_ends(encoding: bytes, at_the_end: bool) -> None:
    """Near the end if there is one, else near the beginning; compressed or not, and however it came."""
    usage = b'"usage":{"prompt_tokens":9,"completion_tokens":1}'
    pad = b'"pad":"%b"' % (b"x" * 50_000)
    text = b"{%b}" % b",".join((pad, usage) if at_the_end else (usage, pad))
    sent = gzip.compress(text) if encoding else text
    for step in (7, 20_000, len(sent)):
        body = PassedBody(encoding, Endpoint.CHAT, 10)
        for begin in range(0, len(sent), step):
            body.feed(sent[begin : begin + step])
        assert body.whole() is None
        assert body.usage() == Usage(9, 1, None)


def test_of_two_usages_the_one_near_the_end_counts() -> None:
    body = PassedBody(b"", Endpoint.CHAT, 0)
    body.feed(b'{"usage":{"prompt_tokens":1,"completion_tokens":1},')
    body.feed(b'"usage":{"prompt_tokens":2,"completion_tokens":2}}')
    assert body.usage() == Usage(2, 2, None)
    assert PassedBody(b"", Endpoint.CHAT, 0).usage() is None


def test_sixteen_kilobytes_at_each_end_are_searched() -> None:
    """A count that is in neither is not found."""
    usage = b'"usage":{"prompt_tokens":9,"completion_tokens":1}'
    for before, after, is_found in (
        (16_384 - len(usage), 99_999, True),
        (16_385 - len(usage), 99_999, False),
        (99_999, 16_384 - len(usage), True),
        (99_999, 16_385 - len(usage), False),
    ):
        body = PassedBody(b"", Endpoint.CHAT, 0)
        for piece in (b"x" * before, usage, b"y" * after):
            body.feed(piece)
        assert (body.usage() is not None) is is_found


@pytest.mark.parametrize("begin", [b"", b'{"choices":[\xff],'])
def test_of_unreadable_text_only_the_size_of_a_usage_object_is_searched_behind_its_key(begin: bytes) -> None:
    """Eight keys before a megabyte of braces took two seconds."""
    usage = b'"usage":{"prompt_tokens":9,"completion_tokens":1,"details":[%b]}'
    assert normal(tail_usage(begin + usage % b"{},{}")) == Usage(9, 1)
    assert tail_usage(begin + usage % b",".join([b"{}"] * 2_000)) is None


def test_the_last_keys_of_very_many_are_tried() -> None:
    """From the end."""
    counts = b'"usage":{"prompt_tokens":9,"completion_tokens":1}'
    assert normal(tail_usage(b'"usage":{' * 100_000 + counts)) == Usage(9, 1)
    assert tail_usage(counts + b'"usage":{' * 8) is None
    assert normal(tail_usage(counts + b'"usage":null,' * 500)) == Usage(9, 1)
    assert tail_usage(counts + b'"usage":null,' * 100_000) is None


@pytest.mark.parametrize(
    ("usage", "audio", "images"),
    [
        (  # a chat with speech
            {
                "prompt_tokens": 90,
                "completion_tokens": 50,
                "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 70},
                "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 40},
            },
            KindTokens(70, 0, 40),
            None,
        ),
        (  # a transcript
            {
                "type": "tokens",
                "input_tokens": 90,
                "input_token_details": {"text_tokens": 10, "audio_tokens": 80},
                "output_tokens": 50,
                "total_tokens": 140,
            },
            KindTokens(80),
            None,
        ),
        (  # a picture that was edited
            {
                "input_tokens": 90,
                "input_tokens_details": {
                    "text_tokens": 10,
                    "image_tokens": 80,
                    "cached_tokens": 60,
                    "cached_tokens_details": {"text_tokens": 0, "image_tokens": 60},
                },
                "output_tokens": 50,
                "output_tokens_details": {"text_tokens": 5, "image_tokens": 45},
            },
            None,
            KindTokens(80, 60, 45),
        ),
        ({"prompt_tokens": 90, "completion_tokens": 50, "prompt_tokens_details": {"audio_tokens": 0}}, None, None),
        ({"prompt_tokens": 90, "completion_tokens": 50, "prompt_tokens_details": {"audio_tokens": None}}, None, None),
    ],
)
def test_tokens_of_audio_and_images_are_told_from_text(usage, audio, images) -> None:
    """They are parts of the counts, and have prices of their own."""
    found = normal(usage, endpoint=Endpoint.INFERENCE)
    assert found is not None
    assert (found.prompt_tokens, found.output_tokens, found.inconsistent) == (90, 50, False)
    assert (found.audio, found.images) == (audio, images)

"""The tap: the same reading however the bytes are cut, and not a byte changed but the chunk that is withheld."""

from __future__ import annotations

import itertools
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.model import Endpoint
from proxy.records import Usage
from proxy.wire.events import read_event
from proxy.wire.sse import EVENT_BYTES_MOST, TAIL_BYTES, StreamTap
from tests.proxy.wire.test_usage import endpoint_of
from tests.support.operations import operations

GOLDEN = Path(__file__).parent / "golden"
STREAMS = {path.name: path.read_bytes() for path in sorted(GOLDEN.glob("*.sse"))}

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":null},"finish_reason":null}]}\n\n'
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}],"usage":null}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


def relay(
    chunks: list[bytes], endpoint: Endpoint = Endpoint.CHAT, *, withhold: bool = False
) -> tuple[StreamTap, bytes]:
    """A tap fed with `chunks`, and what the client got."""
    tap = StreamTap(endpoint, withhold_usage=withhold)
    out = b"".join([tap.feed(chunk) for chunk in chunks])
    return tap, out + tap.close()


def cut(body: bytes, places: list[int]) -> list[bytes]:
    """`body` cut at `places`."""
    at = sorted({place % (len(body) + 1) for place in places} | {0, len(body)})
    return [body[start:end] for start, end in itertools.pairwise(at)]


def test_a_running_stream_passes_as_the_same_objects() -> None:
    """Nothing is copied where nothing is withheld."""
    tap = StreamTap(Endpoint.CHAT)
    for chunk in (ROLE, TOKEN, TOKEN, FINISH, USAGE, DONE):
        assert tap.feed(chunk) is chunk
    held = StreamTap(Endpoint.CHAT, withhold_usage=True)
    held.feed(TOKEN)
    assert held.feed(TOKEN) is TOKEN


def test_the_last_bytes_of_a_long_stream_are_read_from_their_first_one_on() -> None:
    """Usage just within the last bytes counts; usage before them was not kept."""
    between = b": x\n\n"
    for rest_bytes, finished in ((TAIL_BYTES, True), (TAIL_BYTES + len(between + FINISH), False)):
        rest = b":" + b" " * (rest_bytes - len(between + FINISH) - 3) + b"\n\n"
        tap, _ = relay([TOKEN * 60, between, FINISH, rest])
        assert tap.finished is finished


def test_an_event_of_several_lines_is_read_as_one() -> None:
    """Although its first line looks like a whole one."""
    read = read_event(b'data: {"choices": [\ndata: {"finish_reason": "stop"}]}\n\n', Endpoint.CHAT)
    assert read.finished


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_the_last_events_are_read_whole_whatever_their_lines_end_with(end: bytes) -> None:
    """Their parts would tell nothing."""
    last = b'data: {"choices": [{\ndata: "finish_reason": "stop"}],\ndata: "usage": {"prompt_tokens": 5}}\n\n'
    tap, _ = relay([TOKEN, last.replace(b"\n", end)])
    assert (tap.finished, tap.usage) == (True, Usage(5))


@pytest.mark.parametrize("last", [b"data: [DONE]", b": a\ndata: [DONE]", b":\ndata: [DONE]\n"])
def test_a_last_event_without_its_end_is_read(last: bytes) -> None:
    """Also behind a comment in it."""
    assert relay([TOKEN, last])[0].finished


def test_only_the_responses_api_tells_the_model() -> None:
    """As it was routed: other streams have none."""
    created = b'data: {"type":"response.created","response":{"model":"m"}}\n\n'
    delta = b'data: {"type":"response.output_text.delta","delta":"a"}\n\n'
    for chunks, model in (([created, delta], "m"), ([created], "m"), ([delta], None)):
        assert relay(chunks, Endpoint.RESPONSES)[0].result().model == model
    assert relay([TOKEN, DONE])[0].result().model is None


def test_no_more_of_a_running_stream_is_read_than_from_its_last_token_on() -> None:
    """Nor than its last 64 events."""
    token, finish = (event.replace(b',"usage":null', b"") for event in (TOKEN, FINISH))

    def cost(*chunks: bytes) -> int:
        tap, _ = relay(list(chunks))
        return operations(tap.result)

    assert cost(*[token] * 100) <= 1.2 * cost(*[token] * 5)
    assert cost(token, *[finish] * 100) <= 1.2 * cost(token, *[finish] * 64)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("withhold", [False, True])
def test_a_stream_cut_at_every_byte_reads_as_in_one_piece(name, withhold) -> None:
    """One byte at a time is the hardest cutting."""
    whole, out = relay([STREAMS[name]], endpoint_of(name), withhold=withhold)
    tap, cut_out = relay([bytes([byte]) for byte in STREAMS[name]], endpoint_of(name), withhold=withhold)
    assert tap.result() == whole.result()
    assert tap.first_token_seen == whole.first_token_seen
    assert cut_out == out


@given(st.sampled_from(sorted(STREAMS)), st.lists(st.integers(0, 5000), max_size=8), st.booleans())
def test_any_cutting_gives_the_same_reading_and_the_same_bytes(name, places, withhold) -> None:
    """The places where the network cuts must not matter."""
    body = STREAMS[name]
    whole, out = relay([body], endpoint_of(name), withhold=withhold)
    tap, cut_out = relay(cut(body, places), endpoint_of(name), withhold=withhold)
    assert tap.result() == whole.result()
    assert cut_out == out
    if not withhold:
        assert cut_out == body


_LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
_PIECES = st.sampled_from(
    [ROLE, TOKEN, FINISH, USAGE, DONE, b": hi\n\n", b"\n", b"data: {\n\n", b"data: []\n\n", b"x"]
)


@given(st.lists(_PIECES, max_size=10), st.lists(_LINE_ENDS, min_size=1, max_size=4), st.lists(st.integers(0, 999)))
def test_any_pieces_with_any_line_ends_are_cut_alike(pieces, ends, places) -> None:
    """Mixed line ends, broken events, blank lines: the client's bytes depend on the stream alone."""
    parts = b"".join(pieces).split(b"\n")
    body = b"".join([part + ends[i % len(ends)] for i, part in enumerate(parts[:-1])]) + parts[-1]
    _, whole = relay([body], withhold=True)
    _, cut_out = relay(cut(body, places), withhold=True)
    assert cut_out == whole
    _, untouched = relay(cut(body, places))
    assert untouched == body


BOM = b"\xef\xbb\xbf"
SPOKEN = 'data: {"choices":[{"index":0,"delta":{"content":"\u4e16\u754c \U0001f5ff"}}]}\n\n'.encode()
LINES = b'data: {"choices":[{"index":0,\ndata: "delta":{"content":"x"}}]}\n\n'


@pytest.mark.parametrize("event", [TOKEN, SPOKEN, LINES], ids=["plain", "beyond ASCII", "two data lines"])
@pytest.mark.parametrize("withhold", [False, True])
def test_a_first_event_behind_a_byte_order_mark_is_read_and_passes_at_any_cut(event: bytes, withhold: bool) -> None:
    """Its token is seen, and neither the mark nor a character that is cut in two loses a byte."""
    body = BOM + event + DONE
    for place in range(len(body)):
        tap, out = relay([body[:place], body[place:]], withhold=withhold)
        assert out == body
        assert tap.first_token_seen
        assert tap.finished


@given(st.lists(st.binary(max_size=40)), st.booleans(), st.sampled_from(list(Endpoint)))
def test_any_bytes_are_survived_and_passed(chunks, withhold, endpoint) -> None:
    """A body that is not an event stream is left to the client."""
    tap, out = relay(chunks, endpoint, withhold=withhold)
    assert out == b"".join(chunks)
    assert tap.usage is None


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_only_the_extra_chunk_is_withheld(end) -> None:
    """Everything else reaches the client as it came, in any line ends."""
    stream = [part.replace(b"\n", end) for part in (ROLE, TOKEN, FINISH, USAGE, b": bye\n\n", DONE)]
    tap, out = relay(stream, withhold=True)
    assert out == b"".join(stream[:3] + stream[4:])
    assert tap.usage == Usage(5, 2)
    assert tap.finished


@pytest.mark.parametrize("tokens", [3, 70, 300, 3000])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("in_token", [False, True])
def test_usage_is_found_wherever_in_a_stream_it_is(tokens: int, share: float, in_token: bool) -> None:
    """Some servers report it before their last tokens, and write null for it into all other chunks."""
    reported = TOKEN.replace(b'"usage":null', USAGE[USAGE.index(b'"usage"') : -3]) if in_token else USAGE
    events = [ROLE, *[TOKEN] * tokens]
    events.insert(max(1, round(share * len(events)) - 1), reported)
    tap, _ = relay([*events, FINISH, DONE], Endpoint.CHAT)
    assert (tap.usage, tap.finished) == (Usage(5, 2), True)


@pytest.mark.parametrize("withhold", [False, True])
@pytest.mark.parametrize("later", [b": keep-alive\n\n", b'event: ping\ndata: {"type":"ping"}\n\n'])
def test_usage_before_very_many_keep_alives_is_found(later: bytes, withhold: bool) -> None:
    tap, _ = relay([ROLE, TOKEN, TOKEN, FINISH, USAGE, *[later] * 100], Endpoint.CHAT, withhold=withhold)
    assert tap.usage == Usage(5, 2)
    assert tap.finished or later[:1] != b":"


def test_usage_in_a_chunk_with_choices_is_never_withheld() -> None:
    """Its content belongs to the client, before the first token and after it."""
    chunk = FINISH.replace(b"null}", b'{"prompt_tokens":5,"completion_tokens":2}}')
    tap, out = relay([chunk, TOKEN, chunk, DONE], withhold=True)
    assert out == chunk + TOKEN + chunk + DONE
    assert tap.usage == Usage(5, 2)


def test_a_chunk_without_choices_and_without_usage_is_never_withheld() -> None:
    """Azure sends its content filter's results so."""
    chunk = b'data: {"choices":[],"prompt_filter_results":[]}\n\n'
    assert relay([chunk, TOKEN, chunk, DONE], withhold=True)[1] == chunk + TOKEN + chunk + DONE


def test_a_usage_chunk_before_any_token_is_withheld_too() -> None:
    """An answer of no tokens has one as well."""
    assert relay([ROLE, FINISH, USAGE, DONE], withhold=True)[1] == ROLE + FINISH + DONE


def test_an_unfinished_last_event_reaches_the_client_unless_it_is_the_extra_one() -> None:
    """Some servers end without the last blank line."""
    assert relay([TOKEN, DONE[:-2]], withhold=True)[1] == TOKEN + DONE[:-2]
    tap, out = relay([TOKEN, USAGE[:-2]], withhold=True)
    assert out == TOKEN
    assert tap.usage == Usage(5, 2)


def chat(**delta: object) -> bytes:
    """A chat chunk with this delta."""
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("event", "endpoint", "token"),
    [
        (ROLE, Endpoint.CHAT, False),
        (b": keep-alive\n\n", Endpoint.CHAT, False),
        (chat(content=""), Endpoint.CHAT, False),
        (chat(content=None, tool_calls=[]), Endpoint.CHAT, False),
        (chat(content="x"), Endpoint.CHAT, True),
        (chat(content="0"), Endpoint.CHAT, True),
        (chat(reasoning_content="x"), Endpoint.CHAT, True),
        (chat(reasoning="x"), Endpoint.CHAT, True),
        (chat(tool_calls=[{"index": 0}]), Endpoint.CHAT, True),
        (b'data:{"choices":[{"text":"x"}]}\n\n', Endpoint.COMPLETIONS, True),
        (b'data:{"choices":[{"text":""}]}\n\n', Endpoint.COMPLETIONS, False),
        (b'data: {"type":"response.created","response":{"usage":null}}\n\n', Endpoint.RESPONSES, False),
        (b'data: {"type":"response.output_text.delta","delta":"x"}\n\n', Endpoint.RESPONSES, True),
        (b'data: {"type":"response.reasoning_summary_text.delta","delta":"x"}\n\n', Endpoint.RESPONSES, True),
        (b'data: {"type":"response.function_call_arguments.delta","delta":"x"}\n\n', Endpoint.RESPONSES, True),
        (b'event: ping\ndata: {"type":"ping"}\n\n', Endpoint.MESSAGES, False),
        (
            b'data: {"type":"content_block_start","content_block":{"type":"text","text":""}}\n\n',
            Endpoint.MESSAGES,
            False,
        ),
        (b'data: {"type":"content_block_delta","delta":{"text":"x"}}\n\n', Endpoint.MESSAGES, True),
    ],
)
def test_the_first_token_is_content_reasoning_or_a_tool_call(event, endpoint, token) -> None:
    """Roles, nulls, empty texts and keep-alives come earlier and mean nothing."""
    assert relay([event], endpoint)[0].first_token_seen == token


def test_keep_alives_are_not_progress() -> None:
    """An idle limit must see through comments, blank lines and pings, however they are cut."""
    tap = StreamTap(Endpoint.MESSAGES)
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    fed = [
        (TOKEN, True),
        (b": processing\n\n", False),
        (b"\n", False),
        (b": proc", False),
        (b"essing\r", False),
        (b"\n\n", False),
        (TOKEN[:9], True),
        (b": no comment", True),
        (TOKEN[9:], True),
        (ping, False),
        (ping + TOKEN, True),
        (b": a\n\n" + TOKEN, True),
    ]
    for chunk, progress in fed:
        tap.feed(chunk)
        assert tap.progress == progress, chunk


@pytest.mark.parametrize("aside", [b"\r", b"\n", b":\n", b": busy\n\n", b":"])
def test_a_megabyte_of_keep_alives_is_no_progress_and_is_not_cut_into_lines(aside: bytes) -> None:
    """A list of a million lines would take memory, and the loop's time."""
    tap = StreamTap(Endpoint.CHAT)
    tap.feed(TOKEN)
    chunk = aside * (1_000_000 // len(aside))
    tracemalloc.start()
    try:
        tap.feed(chunk)
        assert tracemalloc.get_traced_memory()[1] < 3_500_000
    finally:
        tracemalloc.stop()
    assert not tap.progress
    tap.feed(b"\n" + TOKEN)
    assert tap.progress


@pytest.mark.parametrize("withhold", [False, True])
@pytest.mark.parametrize("step", [7, 1000, 10_000_000])
def test_the_first_token_is_looked_for_in_a_bounded_number_of_events(step: int, withhold: bool) -> None:
    """Behind them nothing is read before the end, which still tells."""
    body = b"data: {}\n\n" * 1_999
    assert relay([body + TOKEN])[0].first_token_seen
    body += ROLE + TOKEN * 3 + FINISH + USAGE + DONE
    tap, out = relay([body[i : i + step] for i in range(0, len(body), step)], withhold=withhold)
    assert out == (body.replace(USAGE, b"") if withhold else body)
    assert not tap.first_token_seen
    assert (tap.usage, tap.finished) == (Usage(5, 2), True)


@pytest.mark.parametrize("tiny", [b"data: {}\n\n", b":\n\n", b"data: [DONE]\n\n"])
def test_events_that_are_surely_the_clients_are_passed_on_together(tiny: bytes) -> None:
    """Also beside one that is withheld: one by one, a read of tiny events would hold up others for 0.2 s."""
    tap = StreamTap(Endpoint.CHAT, withhold_usage=True)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    many = tiny * 10_000
    sys.setprofile(count)
    try:
        out = tap.feed(TOKEN + many) + tap.feed(many + USAGE + many[:-1]) + tap.feed(many[-1:])
    finally:
        sys.setprofile(None)
    assert out == TOKEN + many * 3
    assert tap.usage == Usage(5, 2)
    assert calls < 1_000


def test_a_long_stream_keeps_only_its_tail() -> None:
    """Two thousand streams must fit, and the end still tells."""
    tap = StreamTap(Endpoint.CHAT)
    for _ in range(20_000):
        tap.feed(TOKEN)
    assert tap._tail_bytes < 1.3 * TAIL_BYTES  # noqa: SLF001 - internal state that no public name shows
    tap.feed(FINISH + USAGE + DONE)
    assert (tap.usage, tap.finished) == (Usage(5, 2), True)


@pytest.mark.parametrize("step", [1000, 100_000, 10_000_000])
def test_a_last_event_longer_than_the_tail_still_tells_its_usage(step) -> None:
    """The responses surface repeats the whole answer in its last event."""
    body = STREAMS["openai_responses.sse"].replace(b'"text":"A pile of stones."', b'"text":"' + b"x" * 300_000 + b'"')
    whole, _ = relay([STREAMS["openai_responses.sse"]], Endpoint.RESPONSES)
    tap, out = relay([body[i : i + step] for i in range(0, len(body), step)], Endpoint.RESPONSES)
    assert out == body
    assert tap.result() == whole.result()


@pytest.mark.parametrize("withhold", [False, True])
def test_an_event_over_the_cap_passes_unread_and_the_next_is_read(withhold) -> None:
    """A bounded buffer, not one byte lost."""
    long = b'data: {"choices":[],"usage":{"a":"' + b"y" * (EVENT_BYTES_MOST + 200_000) + b'"}}\n\n'
    body = long + TOKEN + USAGE + DONE
    tap, out = relay([body[i : i + 50_000] for i in range(0, len(body), 50_000)], withhold=withhold)
    assert out == (long + TOKEN + DONE if withhold else body)
    assert tap.first_token_seen
    assert tap.usage == Usage(5, 2)


def test_a_broken_stream_is_told_from_a_finished_one() -> None:
    """No end is invented."""
    tap, _ = relay([ROLE, TOKEN, TOKEN[:20]])
    assert (tap.finished, tap.usage, tap.error_seen, tap.mid_event) == (False, None, False, True)
    tap, _ = relay([ROLE, TOKEN, TOKEN])
    assert (tap.finished, tap.mid_event) == (False, False)
    tap, _ = relay([ROLE, TOKEN, FINISH])
    assert tap.finished


def test_what_was_said_before_the_break_is_kept() -> None:
    """Anthropic tells the input first."""
    body = STREAMS["anthropic.sse"]
    tap, _ = relay([body[: body.index(b"event: message_delta")]], Endpoint.MESSAGES)
    assert tap.usage == Usage(2121, 1, 1800, cache_write_5m_tokens=100, cache_write_1h_tokens=200)
    assert not tap.finished


def test_a_failed_response_is_an_error_and_an_end() -> None:
    """The responses surface ends its failures properly."""
    failed = b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"code":"x"}}}\n\n'
    tap, _ = relay([failed], Endpoint.RESPONSES)
    assert tap.error_seen
    assert tap.finished


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("withhold", [False, True])
def test_megabytes_of_blank_lines_are_no_events(end, withhold) -> None:
    """A sick upstream must not stall the loop: this took 20 s when each pair was an event."""
    tap, out = relay([end * 1_000_000, TOKEN, USAGE], withhold=withhold)
    assert out == end * 1_000_000 + TOKEN + (b"" if withhold else USAGE)
    assert tap.usage == Usage(5, 2)


@pytest.mark.parametrize("cut", range(24_000, 24_040))
def test_usage_that_leaves_the_tail_cut_in_two_is_found(cut: int) -> None:
    """The key and the object may lie on both sides of what is dropped."""
    usage = b'"usage":{"input_tokens":5,"output_tokens":2,"total_tokens":7}'
    delta = b'data: {"type":"response.output_text.delta","delta":"a"}\n\n'
    event = b'data: {"type":"response.completed","response":{"x":"' + b"y" * (24_020 - 63) + b'",'
    event += usage + b',"tools":"' + b"z" * 60_000 + b'"}}\n\n'
    tap = StreamTap(Endpoint.RESPONSES)
    tap.feed(delta)
    for start, end in ((0, cut), (cut, cut + 21_000), (cut + 21_000, cut + 42_000), (cut + 42_000, len(event))):
        tap.feed(event[start:end])
    assert tap.finished
    assert tap.usage is not None
    assert tap.usage.prompt_tokens == 5


def test_the_usage_of_a_first_event_too_long_to_hold_is_found() -> None:
    """A response without a delta whose only event repeats a request of over a megabyte."""
    usage = b'"usage":{"input_tokens":5,"output_tokens":2,"total_tokens":7}'
    event = b'data: {"type":"response.completed","response":{"x":"' + b"y" * 1_500_000 + b'",' + usage + b"}}\n\n"
    tap = StreamTap(Endpoint.RESPONSES)
    for start in range(0, len(event), 60_000):
        tap.feed(event[start : start + 60_000])
    assert tap.usage is not None
    assert tap.finished


@pytest.mark.parametrize(
    ("endpoint", "event"),
    [
        (Endpoint.CHAT, b'{"choices":[{"delta":{"content":%b}}],"usage":{"prompt_tokens":5,"completion_tokens":2}}'),
        (
            Endpoint.RESPONSES,
            b'{"type":"response.x.delta","delta":%b,"response":{"usage":{"input_tokens":5,"output_tokens":2}}}',
        ),
        (
            Endpoint.MESSAGES,
            b'{"type":"content_block_delta","delta":%b,"usage":{"input_tokens":5,"output_tokens":2}}',
        ),
    ],
)
@pytest.mark.parametrize("value", [b'"\\ud800"', b"NaN", b'"\xff"'])
def test_an_event_that_a_strict_decoder_refuses_is_read_as_well(
    endpoint: Endpoint, event: bytes, value: bytes
) -> None:
    """A lone surrogate, NaN and bytes that are no UTF-8, in every dialect."""
    stream = b"data: " + event % value + b"\n\n"
    tap, out = relay([stream], endpoint)
    assert out == stream
    assert tap.first_token_seen
    assert tap.usage is not None
    assert (tap.usage.prompt_tokens, tap.usage.output_tokens) == (5, 2)

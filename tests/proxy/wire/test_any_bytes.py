"""For any bytes, the pure readers return a value or raise a CairnError, and nothing else."""

from __future__ import annotations

import contextlib
import itertools
import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.errors import CairnError
from proxy.model import Endpoint
from proxy.pipeline.admission import Authenticator, credentials_of
from proxy.pipeline.cors import Cors
from proxy.records import Prompt, Usage
from proxy.wire import contexts, headers, multipart, named_models, usage
from proxy.wire.batch_lines import line_models, line_references
from proxy.wire.decode import ResponseDecoder, decode_request, request_encoding
from proxy.wire.events import read_event
from proxy.wire.references import references
from proxy.wire.request import first_file_id, read
from proxy.wire.schemas import decode_leniently
from proxy.wire.splice import apply, ask_usage
from proxy.wire.sse import StreamTap
from proxy.wire.text_alone import TextAlone

GENERATIONS = (Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES)
NAMES = (
    "model", "messages", "input", "prompt", "tools", "role", "content", "stream", "stream_options", "include_usage",
    "previous_response_id", "conversation", "id", "type", "file_id", "image_url", "url", "usage", "input_tokens",
    "output_tokens", "prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "cached_tokens",
    "iterations", "timings", "prompt_n", "choices", "delta", "text", "finish_reason", "error", "response",
    "service_tier", "message", "body", "requests", "params", "models", "fallbacks", "background", "status", "file",
    "container", "output_file_id", "cache_creation", "usageMetadata", "promptTokenCount",
)  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(("cache", "m", "user", "cache_id=a", "tag=x;dry_run=1", "batch", "completed", "function"))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
TOP = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
SPOILS = st.sampled_from((b"", b"\xff", b"\\ud800", b"\x00", b"NaN", b'"', b"}", b"[", b"\\u0066ile_id"))
FORM_TYPES = (b"multipart/form-data; boundary=b", b'multipart/form-data; boundary="b b"', b"multipart/form-data")
PIECES = st.sampled_from(
    (b"--b", b"--b--", b"\r\n", b"\r\n\r\n", b'content-disposition: form-data; name="model"', b"; filename*=x", b"x",
     b'content-disposition: form-data; name="file"; filename="a"', b'{"body":{"model":"m"}}', b"\xff")
)  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """JSON with the names that matter, as Python writes it, perhaps spoilt at one place; or any bytes at all."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=80))
    text = json.dumps(draw(TOP), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    place = draw(st.integers(0, len(text)))
    return text[:place] + draw(SPOILS) + text[place:]


def read_or_none(body: bytes, endpoint: Endpoint) -> Prompt | None:
    """The prompt, if the body is one."""
    with contextlib.suppress(CairnError):
        return read(body, endpoint)
    return None


@settings(max_examples=400)
@given(bodies(), st.sampled_from((*GENERATIONS, Endpoint.EMBEDDINGS)))
def test_any_body_is_a_prompt_or_refused(body: bytes, endpoint: Endpoint) -> None:
    """A prompt that was read can be edited, searched and fingerprinted, and its model's name can be logged."""
    prompt = read_or_none(body, endpoint)
    if prompt is None:
        return
    prompt.model.encode()
    assert all(isinstance(part, bytes) for part in prompt.chain_salt)
    assert prompt.size_bytes == sum(map(len, prompt.spans))
    TextAlone().holds_for(prompt)
    references(body, prompt.referring)
    edit = ask_usage(prompt)
    buffers, length = apply(body, () if edit is None else (edit,))
    assert length == sum(map(len, buffers))
    if endpoint is Endpoint.CHAT:
        with contextlib.suppress(CairnError):
            if (named := contexts.named_in(prompt)) is not None:
                contexts.splice_named(prompt, named, b"[]", b'{"role":"user"}')
        with contextlib.suppress(CairnError):
            contexts.splice_repeated(prompt, b"", b"{}", [memoryview(b"{}")])


@settings(max_examples=300)
@given(
    bodies(), st.lists(PIECES, max_size=12).map(b"".join), st.sampled_from((*FORM_TYPES, b"application/json", b""))
)
def test_the_models_of_any_body_are_found_or_it_is_unreadable(body: bytes, form: bytes, content_type: bytes) -> None:
    """JSON and forms, for one model, further models, batches and what they refer to."""
    for each in (body, form):
        with contextlib.suppress(CairnError):
            model = named_models.model_of(each, content_type)
            assert model is None or model
        named_models.further_models(each, content_type)
        named_models.batch_request_models(each)
        with contextlib.suppress(multipart.UnreadableForm):
            for field in multipart.fields(each, content_type):
                assert isinstance(field.name, str)
        references(each, (each,))
        first_file_id(each)
        for line in (each, b'{"body":%b}' % each):
            line_references(line)
            line_models(line)


@settings(max_examples=400)
@given(bodies(), st.sampled_from((*GENERATIONS, Endpoint.EMBEDDINGS, Endpoint.INFERENCE)))
def test_any_response_has_usage_that_makes_sense_or_none(body: bytes, endpoint: Endpoint) -> None:
    """Plain, as an event, and as an object; no part is larger than the whole."""
    found = [usage.read_response(body, endpoint).usage, usage.normal(usage.tail_usage(body), endpoint=endpoint)]
    tap = StreamTap(endpoint)
    tap.feed(b"data: " + body.replace(b"\n", b" ") + b"\n\n")
    read_event(b"data: " + body, endpoint)
    for each in (*found, tap.usage):
        assert each is None or _makes_sense(each)
    created = usage.created_object(body)
    assert created is None or all(created.ids())
    decode_leniently(body, dict)


def _makes_sense(found: Usage) -> bool:
    parts = (found.cached_tokens or 0) + found.cache_write_5m_tokens + found.cache_write_1h_tokens
    return 0 <= parts <= found.prompt_tokens and 0 <= found.reasoning_tokens <= found.output_tokens


@settings(max_examples=200)
@given(
    st.lists(bodies(), max_size=5),
    st.lists(st.integers(0, 400), max_size=8),
    st.sampled_from(GENERATIONS),
    st.booleans(),
)
def test_any_stream_passes_unchanged_however_it_is_cut(events, cuts, endpoint, withhold) -> None:
    """Without withholding every byte comes out; with it, nothing is added, and no cut makes a difference."""
    stream = b"".join(b"data: " + event + b"\n\n" for event in events)
    outputs = []
    for places in ((), sorted(cuts)):
        tap = StreamTap(endpoint, withhold_usage=withhold)
        bounds = [0, *[place for place in places if place < len(stream)], len(stream)]
        out = b"".join(tap.feed(stream[a:b]) for a, b in itertools.pairwise(bounds)) + tap.close()
        outputs.append((out, tap.usage, tap.finished, tap.error_seen))
    assert withhold or outputs[0][0] == stream
    assert outputs[0] == outputs[1]


@settings(max_examples=200)
@given(st.binary(max_size=200), st.sampled_from((b"gzip", b"deflate", b"br", b"zstd")), st.integers(1, 10_000))
def test_any_bytes_are_decoded_within_the_limit_or_refused(body: bytes, encoding: bytes, limit: int) -> None:
    """Requests are a CairnError, responses end the decoding."""
    with contextlib.suppress(CairnError):
        assert len(decode_request(body, encoding, limit)) <= limit
    ResponseDecoder(encoding, limit).feed(body)


HEADER_NAMES = (
    b"authorization", b"x-api-key", b"x-request-id", b"connection", b"content-encoding", b"origin",
    b"x-msh-context-cache", b"x-msh-context-cache-reset-ttl", b"access-control-request-method",
)  # fmt: skip
HEADERS = st.lists(st.tuples(st.sampled_from(HEADER_NAMES), st.binary(max_size=30)), max_size=5)


@settings(max_examples=300)
@given(HEADERS)
def test_any_headers_are_read_or_refused(given_headers: list[tuple[bytes, bytes]]) -> None:
    """Keys, ids, encodings, contexts and origins, in any bytes."""
    Authenticator([], b"s" * 100).tenant_of_any(credentials_of(given_headers))
    for reader in (
        request_encoding,
        contexts.reference_in,
        headers.kept_request_id,
        lambda pairs: headers.upstream_head(pairs, request_id="r", identity=True, decoded=True),
        lambda pairs: headers.response_head(pairs, request_id="r"),
        lambda pairs: Cors(("https://a.example",)).preflight("OPTIONS", pairs),
    ):
        with contextlib.suppress(CairnError):
            reader(given_headers)


@given(st.binary(max_size=40), st.floats(0, 1e12))
@example(b"\xb2", 0.0)
@example(b"9" * 40, 0.0)
@example(b"Fri, 31 Dec 9999 23:59:59 -2359", 0.0)
def test_any_retry_after_is_seconds_or_nothing(value: bytes, now: float) -> None:
    """Never negative, never an error."""
    for name in (b"retry-after", b"retry-after-ms"):
        seconds = headers.pause_seconds([(name, value)], now)
        assert seconds is None or seconds >= 0


@given(VALUES)
def test_any_content_of_a_cache_message_is_a_reference_or_refused(content: object) -> None:
    """The content is whatever JSON the client puts there."""
    with contextlib.suppress(CairnError):
        contexts.read_reference(content)

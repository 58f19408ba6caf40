"""Reading a prompt: the right spans in the right order, and a BadRequest with a field for all that is not one."""

from __future__ import annotations

import base64
import contextlib
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.common.bodies import words
from proxy.errors import BadRequest
from proxy.model import Endpoint, UsageRequest
from proxy.records import Media
from proxy.wire import media
from proxy.wire import spans as spans_module
from proxy.wire.request import first_file_id, read

CHAT = b'{"model":"m","messages":[{"role":"user","content":"hi"} , {"role":"user","content":"\xc3\xa9"}]}'
GENERATIONS = (Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES)


def spans(body: bytes | str | dict, endpoint: Endpoint = Endpoint.CHAT) -> list[bytes]:
    """The spans of a body as bytes."""
    if isinstance(body, dict):
        body = json.dumps(body, separators=(",", ":"))
    return [bytes(span) for span in read(body.encode() if isinstance(body, str) else body, endpoint).spans]


def salt(**fields: object) -> tuple[bytes, ...]:
    """The salt of a chat body with these fields beside its model and messages."""
    return read(json.dumps({"model": "m", "messages": [], **fields}).encode(), Endpoint.CHAT).chain_salt


def test_each_message_is_a_span_of_its_own_bytes() -> None:
    """The bytes of the body are hashed unchanged, with escapes and spaces."""
    prompt = read(CHAT, Endpoint.CHAT)
    assert [bytes(span) for span in prompt.spans] == [
        b'{"role":"user","content":"hi"}',
        b'{"role":"user","content":"\xc3\xa9"}',
    ]
    assert (prompt.model, prompt.stream, prompt.chain_salt) == ("m", False, (b"m",))
    assert all(isinstance(span, memoryview) for span in prompt.spans)


def test_tools_come_before_messages_wherever_they_stand() -> None:
    """Engines render tools first, and a chain that leaves them out lies about the prefix."""
    assert spans({"model": "m", "messages": [1], "tools": [{"a": 1}]}) == [b'[{"a":1}]', b"1"]


@pytest.mark.parametrize("tools", [None, []])
def test_no_tools_are_the_same_however_they_are_said(tools) -> None:
    """Absent, null and empty render alike."""
    assert spans({"model": "m", "messages": [1], "tools": tools}) == [b"1"]


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "low"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"tool_choice": "none"},
        {"lora_path": "a"},
        {"cache_salt": "x"},
    ],
)
def test_what_changes_the_rendered_head_is_in_the_salt(fields) -> None:
    """Two prompts that render differently do not share a chain."""
    assert salt(**fields) != salt()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.3, "seed": 7, "top_p": 1, "stop": ["x"], "logit_bias": {}},
        {"tool_choice": "auto"},
        {"response_format": {"type": "json_object"}},
        {"user": "u", "metadata": {"a": "b"}},
        {"reasoning_effort": None},
    ],
)
def test_sampling_is_not_in_the_salt(fields) -> None:
    """Settings that the engine applies after the prompt do not change the prefix."""
    assert salt(**fields) == salt()


def test_values_of_different_template_fields_are_not_mixed_up() -> None:
    """The salt names each field."""
    assert salt(reasoning="x") != salt(reasoning_effort="x")


@pytest.mark.parametrize("prompt", ["text", ["a", "b"], [1, 2, 3], [[1], [2]]])
def test_a_completion_has_its_prompt_as_one_span(prompt) -> None:
    """Strings, lists and token ids alike."""
    body = {"model": "m", "prompt": prompt, "suffix": "tail"}
    expected = [json.dumps(value, separators=(",", ":")).encode() for value in (prompt, "tail")]
    assert spans(body, Endpoint.COMPLETIONS) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("hello you", [b'"hello you"']), ([1, {"a": 2}], [b"1", b'{"a":2}'])]
)
def test_responses_have_instructions_before_input(value, expected) -> None:
    """Input may be a text or items."""
    body = {"input": value, "model": "m", "instructions": "Be brief", "tools": [{"type": "x"}]}
    assert spans(body, Endpoint.RESPONSES) == [b'[{"type":"x"}]', b'"Be brief"', *expected]


def test_anthropic_has_tools_then_system_then_messages() -> None:
    """The order in which its own cache breaks."""
    body = {"messages": [1, 2], "system": [{"type": "text"}], "model": "m", "tools": [{"b": 1}], "max_tokens": 5}
    assert spans(body, Endpoint.MESSAGES) == [b'[{"b":1}]', b'[{"type":"text"}]', b"1", b"2"]
    assert read(json.dumps(body).encode(), Endpoint.MESSAGES).max_output_tokens == 5


def test_embeddings_need_only_a_model() -> None:
    """Nothing of them is worth a prefix."""
    prompt = read(b'{"model":"e","input":["a","b"],"stream":7}', Endpoint.EMBEDDINGS)
    assert (prompt.model, prompt.spans) == ("e", ())


@pytest.mark.parametrize(
    ("fields", "pinned"),
    [
        ({"previous_response_id": "resp_1"}, "resp_1"),
        ({"conversation": "conv_1"}, "conv_1"),
        ({"conversation": {"id": "conv_2"}}, "conv_2"),
        ({"previous_response_id": None, "conversation": None}, None),
        ({"previous_response_id": 7, "conversation": []}, None),
    ],
)
def test_what_names_an_object_is_pinned_to_it(fields, pinned) -> None:
    """A response lives on one replica only."""
    assert read(json.dumps({"model": "m", "input": "x", **fields}).encode(), Endpoint.RESPONSES).pinned_to == pinned


@pytest.mark.parametrize(
    ("endpoint", "fields", "names"),
    [
        (
            Endpoint.RESPONSES,
            {"previous_response_id": "resp_1", "conversation": {"id": "conv_1"}},
            {("responses", "resp_1"), ("conversations", "conv_1")},
        ),
        (Endpoint.RESPONSES, {"conversation": "conv_1"}, {("conversations", "conv_1")}),
        (Endpoint.MESSAGES, {"container": "c-1", "messages": []}, {("containers", "c-1")}),
        (Endpoint.MESSAGES, {"container": {"id": "c-1", "skills": []}, "messages": []}, {("containers", "c-1")}),
        (Endpoint.MESSAGES, {"container": {"skills": []}, "messages": []}, set()),
        (Endpoint.RESPONSES, {"previous_response_id": 7, "conversation": None, "container": [1]}, set()),
    ],
)
@pytest.mark.parametrize("padding", ["", "," * 260_000 + " " * 3_000_000], ids=["short", "many values"])
def test_every_object_that_a_prompt_names_is_found(endpoint, fields, names, padding) -> None:
    """Each of them must be the client's own, also in a body that may hold too many values to be decoded whole."""
    body = {"model": "m", "metadata": padding} | ({"input": "x"} if endpoint is Endpoint.RESPONSES else {}) | fields
    assert set(read(json.dumps(body).encode(), endpoint).names) == names


@pytest.mark.parametrize("member", ["previous_response_id", "conversation", "container"])
@pytest.mark.parametrize("values", [('"a"', '"b"'), ('"a"', "null"), ('{"id":"a"}', '"b"'), ("7", '"b"')])
@pytest.mark.parametrize("padding", ["", "," * 260_000 + " " * 3_000_000], ids=["short", "many values"])
def test_an_object_that_is_named_twice_is_refused(member: str, values: tuple[str, str], padding: str) -> None:
    """Servers differ in which of the two they use."""
    first, second = values
    body = f'{{"model":"m","input":"x","{member}":{first},"{member}":{second},"metadata":"{padding}"}}'
    with pytest.raises(BadRequest, match=f"^{member} is given twice$"):
        read(body.encode(), Endpoint.RESPONSES)


def test_what_names_an_object_is_not_decoded_if_it_is_as_large_as_the_body() -> None:
    """A list of a million numbers would take the event loop a tenth of a second."""
    body = f'{{"model":"m","messages":[],"container":[{"7," * 2_000_000}7]}}'
    with pytest.raises(BadRequest, match=r"^container is too long$"):
        read(body.encode(), Endpoint.MESSAGES)


def test_the_first_file_id_is_found() -> None:
    """It costs a search, so it is made where files were uploaded."""
    body = b'{"model":"m","messages":[{"content":[{"type":"file","file":{"file_id" : "file-7"}}]}]}'
    assert read(body, Endpoint.CHAT).pinned_to is None
    assert first_file_id(body) == "file-7"
    assert first_file_id(CHAT) is None
    assert first_file_id(b'"file_id":"file-8"') == "file-8"
    assert first_file_id(b'{"file_id" "x":"y"}') is None
    assert first_file_id(b'{"file_id":7}') is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": -5}, None),
        ({"max_tokens": "many"}, None),
        ({"max_tokens": 1e3}, None),
        ({"max_tokens": 10**30}, None),
    ],
)
def test_the_output_limit_is_read_where_it_is_one(fields, expected) -> None:
    """A limit of a wrong type is for the upstream to refuse."""
    assert (
        read(json.dumps({"model": "m", "messages": [], **fields}).encode(), Endpoint.CHAT).max_output_tokens
        == expected
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, UsageRequest.NOT_APPLICABLE),
        ({"stream": False, "stream_options": {}}, UsageRequest.NOT_APPLICABLE),
        ({"stream": True}, UsageRequest.ABSENT),
        ({"stream": True, "stream_options": None}, UsageRequest.REPLACE),
        ({"stream": True, "stream_options": {}}, UsageRequest.REPLACE),
        ({"stream": True, "stream_options": {"include_usage": False}}, UsageRequest.REPLACE),
        ({"stream": True, "stream_options": {"include_usage": True}}, UsageRequest.ASKED),
        ({"stream": True, "stream_options": 7}, UsageRequest.NOT_APPLICABLE),
        ({"stream": True, "stream_options": {"include_usage": 1}}, UsageRequest.NOT_APPLICABLE),
    ],
)
def test_what_the_body_says_about_usage(fields, expected) -> None:
    """Each form that clients send, and wrong ones left to the upstream."""
    body = json.dumps({"model": "m", "messages": [], **fields}).encode()
    prompt = read(body, Endpoint.CHAT)
    assert prompt.usage_request is expected
    if expected is UsageRequest.REPLACE:
        start, end = prompt.stream_options_span
        assert json.loads(body[start:end]) == fields["stream_options"]


def test_the_span_of_options_is_theirs_and_not_an_equal_text_before() -> None:
    """A search for the bytes would find the wrong ones."""
    body = b'{"x":{"stream_options":{}},"model":"m","messages":[{}],"stream":true,"stream_options":{}}'
    assert read(body, Endpoint.CHAT).stream_options_span == (len(body) - 3, len(body) - 1)


@pytest.mark.parametrize("endpoint", [Endpoint.RESPONSES, Endpoint.MESSAGES])
def test_dialects_that_always_report_are_not_asked(endpoint) -> None:
    """stream_options is for chat and completions."""
    body = b'{"model":"m","messages":[],"input":"x","stream":true}'
    assert read(body, endpoint).usage_request is UsageRequest.NOT_APPLICABLE


BAD = [
    (b"", None),
    (b"  ", None),
    (b"{", None),
    (b"not json", None),
    (b"[]", None),
    (b"null", None),
    (b"3", None),
    (b'"x"', None),
    (b"\xef\xbb\xbf" + CHAT, None),
    (CHAT + b"x", None),
    (CHAT + b"\x00", None),
    (b'{"model":7,"messages":[]}', "model"),
    (b'{"model":"' + b"m" * 600 + b'","messages":[]}', "model"),
    (b'{"model":"\xff","messages":[]}', None),
    (b'{"model":"\\ud800","messages":[]}', None),
    (b'{"model":"a","messages":["\\ud800"]}', None),
    (b'{"model":"a","messages":["\x00"]}', None),
    (b'{"model":"a","model":"b","messages":[]}', "model"),
    (b'{"model":"a","mod\\u0065l":"b","messages":[]}', "model"),
    (b'{"model":"a"}', "messages"),
    (b'{"model":"a","messages":null}', "messages"),
    (b'{"model":"a","messages":{}}', "messages"),
    (b'{"model":"a","messages":"x"}', "messages"),
    (b'{"model":"a","messages":[NaN]}', None),
    (b'{"model":"a","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    (b'{"model":"a","messages":[],"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", None),
    (b"[" * 100_000, None),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=range(len(BAD)))
def test_a_bad_body_is_refused_with_its_field(body, param) -> None:
    """Never a crash, never a guess."""
    with pytest.raises(BadRequest) as caught:
        read(body, Endpoint.CHAT)
    assert caught.value.param == param
    assert "mmmm" not in caught.value.message


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b"  ", "the body is empty", None),
        (b"{", "the body is not valid JSON: Input data was truncated", None),
        (b'{"messages":' + b"[" * 100_000, "the body is nested too deeply", None),
        (b'{"model":"\xff","messages":[]}', "the body is not valid UTF-8", None),
        (b'{"model":"a","model":"a","messages":[]}', "model is given twice", "model"),
        (b'{"model":"%b","messages":[]}' % (b"m" * 513), "model is too long", "model"),
        (b'{"model":7,"messages":[]}', "model: model must be a string", "model"),
        (b'{"model":"m"}', "messages must be an array", "messages"),
        (b'{"messages":[%b0]}' % (b"0," * 10_000), "messages has more than 10000 items.", "messages"),
        (b'{"messages":{"a":1}}', "messages: Expected `array | null`, got `object`", "messages"),
        (b"[]", "the body: Expected `object`, got `array`", None),
    ],
)
def test_the_error_for_a_body_says_what_is_wrong_with_it(body: bytes, message: str, param: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        read(body, Endpoint.CHAT)
    assert (caught.value.message, caught.value.param) == (message, param)


def test_a_body_without_a_model_is_read_and_a_model_of_the_path_replaces_its_own() -> None:
    """Whether a model is needed depends on the pools; Azure's paths name it and their bodies need not."""
    assert read(b'{"messages":[]}', Endpoint.CHAT).model == ""
    prompt = read(b'{"model":"a","messages":[]}', Endpoint.CHAT, model="b")
    assert (prompt.model, prompt.chain_salt) == ("b", (b"b",))


@pytest.mark.parametrize("model", [b"null", b'""'])
def test_an_empty_model_is_as_good_as_none(model: bytes) -> None:
    """Engines that serve one model accept it; the pools decide whether it may be missing."""
    assert read(b'{"messages":[],"model":%b}' % model, Endpoint.CHAT).model == ""
    with pytest.raises(BadRequest, match="twice"):
        read(b'{"messages":[],"model":%b,"model":"a"}' % model, Endpoint.CHAT)


@pytest.mark.parametrize("stream", [b"1", b'"true"', b"null", b"[]"])
def test_what_else_is_true_is_the_upstreams_to_say(stream: bytes) -> None:
    """The request is no stream that Cairn asks for usage; its response shows what it is."""
    prompt = read(b'{"model":"a","messages":[],"stream":%b}' % stream, Endpoint.CHAT)
    assert (prompt.stream, prompt.usage_request) == (False, UsageRequest.NOT_APPLICABLE)


def test_a_failed_reading_leaves_nothing_to_the_next() -> None:
    """The models seen are those of one body."""
    for _ in range(2):
        with pytest.raises(BadRequest):
            read(b'{"model":"a","messages":7}', Endpoint.CHAT)
    assert read(CHAT, Endpoint.CHAT).model == "m"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","messages":["\xff\xfe"]}',
        b'{"model":"m","messages":[],"x":1e9999}',
        b'{"model":"m","messages":[],"x":' + b"9" * 10_000 + b"}",
        b'{"model":"m","messages":["\\ud83d\\ude00","\\u0000"]}',
    ],
)
def test_what_only_the_upstream_can_judge_is_passed_on(body) -> None:
    """Invalid UTF-8 inside a message, huge numbers, an escaped NUL."""
    assert read(body, Endpoint.CHAT).model == "m"


def test_of_messages_given_twice_the_last_is_read_as_upstreams_do() -> None:
    """Python's json, orjson, pydantic and nlohmann all take the last."""
    body = b'{"model":"m","messages":[1],"messages":[2]}'
    assert spans(body) == [str(item).encode() for item in json.loads(body)["messages"]]


@given(st.binary(max_size=200), st.sampled_from((*GENERATIONS, Endpoint.EMBEDDINGS)))
@example(CHAT[:-1], Endpoint.CHAT)
def test_any_bytes_are_read_or_refused(body, endpoint) -> None:
    """No exception but BadRequest."""
    with contextlib.suppress(BadRequest):
        read(body, endpoint)


_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "input",
        "instructions",
        "system",
        "tools",
        "stream",
        "stream_options",
        "max_tokens",
        "tool_choice",
        "conversation",
        "previous_response_id",
        "chat_template_kwargs",
    ]
)


@given(st.dictionaries(_FIELDS, _VALUE | st.lists(_VALUE), max_size=8), st.sampled_from(GENERATIONS), st.booleans())
def test_any_json_is_read_or_refused_and_its_messages_are_found(fields, endpoint, indented) -> None:
    """Spans parse to the values in the body, with any white space."""
    body = json.dumps(fields | {"model": "m"}, indent=2 if indented else None, ensure_ascii=False).encode()
    try:
        prompt = read(body, endpoint)
    except BadRequest:
        return
    if endpoint in (Endpoint.CHAT, Endpoint.MESSAGES):
        count = len(fields["messages"])
        assert [json.loads(bytes(span)) for span in prompt.spans][len(prompt.spans) - count :] == fields["messages"]


PICTURE = base64.b64encode(bytes(range(256)) * 200).decode()
PROSE = 'It was raining on the hill, and nobody had brought "a map".\n' * 3000


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64," + PICTURE}}, "image"),
        ({"type": "input_image", "image_url": "data:image/png;base64," + PICTURE}, "image"),
        ({"type": "input_audio", "input_audio": {"data": PICTURE, "format": "wav"}}, "audio"),
        ({"type": "file", "file": {"file_data": "data:application/pdf;base64," + PICTURE}}, "file"),
        ({"type": "input_file", "file_data": "data:application/pdf;base64," + PICTURE}, "file"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}, "image"),
        (
            {"type": "tool_result", "content": [{"type": "image", "source": {"type": "base64", "data": PICTURE}}]},
            "image",
        ),
    ],
)
@pytest.mark.parametrize("prose", ["", PROSE])
def test_media_are_found_in_every_dialect_also_inside_long_text(part, kind, prose) -> None:
    """A picture's bytes are not its tokens."""
    content = [{"type": "text", "text": prose + "what is it?"}, part]
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": prose}, {"content": content}]}).encode()
    (found,) = read(body, Endpoint.CHAT).media
    assert found.kind == kind
    assert len(PICTURE) <= found.size_bytes < len(PICTURE) + 100


def test_all_media_of_a_message_are_found_in_their_order() -> None:
    """Those beside the result of a tool, and those inside it."""
    inner = {"type": "tool_result", "content": [{"type": "image", "source": {"type": "base64", "data": PICTURE}}]}
    sound = {"type": "input_audio", "input_audio": {"data": PICTURE, "format": "wav"}}
    body = json.dumps({"model": "m", "messages": [{"content": [sound, inner, sound]}]}).encode()
    assert [found.kind for found in read(body, Endpoint.CHAT).media] == ["audio", "image", "audio"]


@pytest.mark.parametrize(
    ("fields", "is_plain"),
    [
        ({"messages": [{"role": "user", "content": PROSE}]}, True),
        ({"messages": [{"role": "user", "content": "hi"}]}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": PROSE}]}]}, False),
        ({"messages": [{"role": "user", "content": PROSE}], "system": PROSE}, False),
    ],
    ids=["strings", "short", "parts", "system"],
)
def test_a_prompt_of_strings_alone_is_known_to_have_no_parts(fields, is_plain) -> None:
    """So that its messages need no second look; a short body and a system prompt are not examined."""
    endpoint = Endpoint.MESSAGES if "system" in fields else Endpoint.CHAT
    assert read(json.dumps({"model": "m", **fields}).encode(), endpoint).is_plain_text is is_plain


@pytest.mark.parametrize("content", [PROSE, PICTURE, "a" * 5000, [{"type": "text", "text": PICTURE}], 7, [7]])
def test_text_is_not_media_even_where_it_looks_like_it(content) -> None:
    """Sampling may err; the close look does not."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()
    assert read(body, Endpoint.CHAT).media == ()


def test_media_of_responses_are_found_in_its_items() -> None:
    """Input items hold content parts as messages do."""
    item = {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64," + PICTURE}]}
    body = json.dumps({"model": "m", "input": [item]}).encode()
    assert read(body, Endpoint.RESPONSES).media == (Media("image", len(PICTURE) + 24, body.index(b'"data:image')),)


def _image(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_media_are_located_in_views_of_the_body_and_in_rewritten_copies_of_them() -> None:
    """By their order, so that two equal ones are two; one that no span contains is left out."""
    pictures = [_image(PICTURE + name) for name in ("one", "two", "two")]
    messages = [{"role": "user", "content": [pictures[0]]}, {"role": "user", "content": pictures[1:]}]
    body = json.dumps({"model": "m", "messages": messages}).encode()
    prompt = read(body, Endpoint.CHAT)
    copied = (prompt.spans[0], b"  " + bytes(prompt.spans[1]))
    for spans in (prompt.spans, copied):
        text = b"".join(spans)
        found = media.locate_media(prompt.media, body, spans, lambda kind: 300.4)
        values = [body[item.start : item.start + item.size_bytes] for item in prompt.media]
        assert [text[start:end] for start, end, _ in found] == values
        assert [tokens for _, _, tokens in found] == [300] * 3
        assert len({start for start, _, _ in found}) == 3
    assert media.locate_media(prompt.media, body, prompt.spans[:1], lambda kind: 1.0)[1:] == ()
    assert media.locate_media([Media("image", 50)], body, prompt.spans, lambda kind: 1.0) == ()


@pytest.mark.parametrize("per_message", [1, 5000])
def test_very_many_pictures_are_found_up_to_a_bound_and_each_is_looked_for_once(
    per_message: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 of them took half a second of the event loop. Those beyond the bound count as text."""
    looked_up: list[object] = []
    address = spans_module._address  # noqa: SLF001 - counted here, and called

    def counted(part: bytes) -> int:
        looked_up.append(part)
        return address(part)

    monkeypatch.setattr(spans_module, "_address", counted)
    picture = _image("A" * 1024)
    messages = [{"role": "user", "content": [picture] * per_message}] * (5000 // per_message)
    body = json.dumps({"model": "m", "messages": messages}).encode()
    prompt = read(body, Endpoint.CHAT)
    assert len(prompt.media) == media.MEDIA_MOST
    assert len(looked_up) <= media.MEDIA_MOST + 10
    looked_up.clear()
    found = media.locate_media(prompt.media, body, prompt.spans, lambda kind: 1.0)
    assert len(found) == media.MEDIA_MOST
    assert len(looked_up) <= min(len(messages), media.MEDIA_MOST) + 10


@pytest.mark.parametrize("content", [b'"%b"', b'[{"type":"text","text":"%b"}]'])
def test_prose_is_not_looked_at_twice_for_pictures(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long words without spaces between the samples are no reason to decode messages, which is as much again."""
    monkeypatch.setattr(media, "decode_parts_message", lambda _: pytest.fail("decoded"))
    for size in (65_536, 1 << 20):
        text = words(size, seed=7)
        body = b'{"model":"m","messages":[{"role":"user","content":' + content % text + b"}]}"
        assert read(body, Endpoint.CHAT).media == ()


@pytest.mark.parametrize("messages", [1, 40])
def test_pictures_stand_out_among_much_plain_text(messages: int) -> None:
    """However many messages are text by their beginning, and in whichever order a message has its members."""
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PICTURE * 4 * messages}}
    plain = [{"role": "user", "content": PROSE * 5}, {"content": PROSE * 5, "role": "user"}] * messages
    body = json.dumps({"model": "m", "messages": [*plain, {"content": [part], "role": "user"}, *plain]}).encode()
    assert [found.kind for found in read(body, Endpoint.CHAT).media] == ["image"]


@pytest.mark.parametrize(
    ("key", "kept"), [("abc", b'"abc"'), ("", b""), (None, b""), (5, b""), (["a"], b""), ({"a": 1}, b"")]
)
def test_only_a_text_names_a_session_in_the_body(key, kept) -> None:
    """A client that always sends the field without a value has no session, and not one session for all."""
    body = {"model": "m", "messages": [], "prompt_cache_key": key}
    assert read(json.dumps(body).encode(), Endpoint.CHAT).cache_key == kept


def test_a_text_without_a_template_has_another_key_than_the_same_text_as_input_of_a_response() -> None:
    """An engine shares nothing between them."""
    text = "word " * 500
    bodies = [(Endpoint.COMPLETIONS, {"prompt": text}), (Endpoint.RESPONSES, {"input": text})]
    prompts = [read(json.dumps({"model": "m", **fields}).encode(), endpoint) for endpoint, fields in bodies]
    assert [bytes(each.spans[0]) for each in prompts] == [json.dumps(text).encode()] * 2
    assert prompts[0].chain_salt != prompts[1].chain_salt


TOOLS = [{"name": "t"}]
SAID = [{"role": "user", "content": "x"}]
TOOLS_SPAN, SAID_SPAN = b'[{"name":"t"}]', b'{"role":"user","content":"x"}'


@pytest.mark.parametrize(
    ("endpoint", "fields", "spans", "expected"),
    [
        (Endpoint.CHAT, {"messages": SAID}, [SAID_SPAN], {}),
        (
            Endpoint.CHAT,
            {
                "messages": SAID,
                "tools": TOOLS,
                "functions": [{"name": "f"}],
                "stream": True,
                "max_completion_tokens": 7,
                "max_tokens": 9,
                "web_search_options": {},
                "store": True,
                "prompt_cache_key": "k",
                "priority": -1,
                "tool_choice": "none",
                "reasoning_effort": "low",
            },
            [TOOLS_SPAN, b'[{"name":"f"}]', SAID_SPAN],
            {
                "stream": True,
                "chain_salt": (b"m", b"reasoning_effort", b'"low"', b"tool_choice", b"none"),
                "usage_request": UsageRequest.ABSENT,
                "max_output_tokens": 7,
                "has_hidden_parts": True,
                "is_stored": True,
                "cache_key": b'"k"',
                "priority": 0,
                "tool_spans": 2,
                "referring": [TOOLS_SPAN],
            },
        ),
        (
            Endpoint.CHAT,
            {"messages": [{"role": "cache", "content": "tag=a"}], "max_tokens": 9, "cache_prompt": False},
            [b'{"role":"cache","content":"tag=a"}'],
            {"max_output_tokens": 9, "may_name_context": True, "skips_cache": True},
        ),
        (
            Endpoint.COMPLETIONS,
            {
                "prompt": "p",
                "suffix": "s",
                "max_tokens": 5,
                "stream": True,
                "stream_options": {"include_usage": False},
            },
            [b'"p"', b'"s"'],
            {
                "stream": True,
                "chain_salt": (b"m", b"template", b"none"),
                "usage_request": UsageRequest.REPLACE,
                "stream_options_span": (85, 108),
                "max_output_tokens": 5,
            },
        ),
        (
            Endpoint.COMPLETIONS,
            {"prompt": "p", "echo": True},
            [b'"p"'],
            {"chain_salt": (b"m", b"template", b"none"), "skips_cache": True},
        ),
        (
            Endpoint.MESSAGES,
            {
                "messages": SAID,
                "system": "s",
                "tools": TOOLS,
                "tool_choice": {"type": "any"},
                "max_tokens": 5,
                "stream": True,
                "container": "c",
            },
            [TOOLS_SPAN, b'"s"', b'{"type":"any"}', SAID_SPAN],
            {
                "stream": True,
                "max_output_tokens": 5,
                "names": (("containers", "c"),),
                "has_effects": True,
                "tool_spans": 1,
                "system_spans": 2,
                "is_anthropic": True,
                "referring": [TOOLS_SPAN],
            },
        ),
        (
            Endpoint.RESPONSES,
            {
                "input": SAID,
                "instructions": "i",
                "prompt": {"id": "p"},
                "tools": TOOLS,
                "max_output_tokens": 5,
                "previous_response_id": "r",
                "stream": True,
            },
            [TOOLS_SPAN, b'"i"', b'{"id":"p"}', SAID_SPAN],
            {
                "stream": True,
                "chain_salt": (b"m", b"continues", b"r"),
                "pinned_to": "r",
                "max_output_tokens": 5,
                "names": (("responses", "r"),),
                "has_hidden_parts": True,
                "tool_spans": 1,
                "system_spans": 2,
                "referring": [TOOLS_SPAN],
            },
        ),
        (
            Endpoint.RESPONSES,
            {"input": "x", "conversation": {"id": "c"}},
            [b'"x"'],
            {
                "chain_salt": (b"m", b"continues", b"c"),
                "pinned_to": "c",
                "has_effects": True,
                "names": (("conversations", "c"),),
                "system_spans": 0,
            },
        ),
        (Endpoint.EMBEDDINGS, {"input": "x"}, [], {}),
    ],
    ids=range(9),
)
def test_a_prompt_has_these_facts_and_no_others(
    endpoint: Endpoint, fields: dict[str, object], spans: list[bytes], expected: dict[str, object]
) -> None:
    """Everything that is not in the body has its default."""
    prompt = read(json.dumps({"model": "m", **fields}, separators=(",", ":")).encode(), endpoint)
    found = {name: getattr(prompt, name) for name in DEFAULTS}
    found["referring"] = [bytes(each) for each in prompt.referring]
    assert found == {**DEFAULTS, **expected}
    assert [bytes(span) for span in prompt.spans] == spans
    assert prompt.size_bytes == sum(map(len, spans))


DEFAULTS: dict[str, object] = {
    "model": "m",
    "stream": False,
    "chain_salt": (b"m",),
    "usage_request": UsageRequest.NOT_APPLICABLE,
    "stream_options_span": (0, 0),
    "pinned_to": None,
    "media": (),
    "max_output_tokens": None,
    "may_name_context": False,
    "referring": [],
    "names": (),
    "has_hidden_parts": False,
    "is_stored": False,
    "has_effects": False,
    "skips_cache": False,
    "cache_key": b"",
    "priority": None,
    "tool_spans": 0,
    "system_spans": -1,
    "is_anthropic": False,
    "is_plain_text": False,
}


@pytest.mark.parametrize(
    ("endpoint", "member"),
    [(Endpoint.CHAT, "messages"), (Endpoint.MESSAGES, "messages"), (Endpoint.RESPONSES, "input")],
)
def test_the_error_for_a_list_names_it_in_every_dialect(endpoint: Endpoint, member: str) -> None:
    """Missing, where it must be there, and too long."""
    if endpoint is not Endpoint.RESPONSES:
        with pytest.raises(BadRequest) as caught:
            read(b'{"model":"m"}', endpoint)
        assert (caught.value.message, caught.value.param) == (f"{member} must be an array", member)
    for items, refused in ((10_000, False), (10_001, True)):
        body = b'{"model":"m","%b":[%b0]}' % (member.encode(), b"0," * (items - 1))
        if refused:
            with pytest.raises(BadRequest) as caught:
                read(body, endpoint)
            assert (caught.value.message, caught.value.param) == (f"{member} has more than 10000 items.", member)
        else:
            assert len(read(body, endpoint).spans) == items


@pytest.mark.parametrize(
    ("fields", "skips"),
    [
        ({"cache_prompt": True}, False),
        ({"cache_prompt": False}, True),
        ({"prompt_logprobs": None}, False),
        ({"prompt_logprobs": 0}, True),
        ({"logprob_start_len": -1}, False),
        ({"logprob_start_len": None}, False),
        ({"logprob_start_len": 0}, True),
        ({"truncate_prompt_tokens": None}, False),
        ({"truncate_prompt_tokens": 5}, True),
    ],
)
def test_a_request_that_must_be_computed_anew_is_known(fields: dict[str, object], skips: bool) -> None:
    """By llama.cpp's field, by log-probabilities of the prompt, and by a prompt that is cut on its left."""
    body = json.dumps({"model": "m", "messages": SAID, **fields}).encode()
    assert read(body, Endpoint.CHAT).skips_cache is skips


@pytest.mark.parametrize(
    ("endpoint", "fields", "has_effects"),
    [
        (Endpoint.RESPONSES, {}, False),
        (Endpoint.RESPONSES, {"store": True, "previous_response_id": "resp_1"}, False),
        (Endpoint.RESPONSES, {"background": None, "conversation": None, "container": None}, False),
        (Endpoint.RESPONSES, {"background": False, "tools": [{"type": "function", "name": "mcp"}]}, False),
        (Endpoint.RESPONSES, {"background": True}, True),
        (Endpoint.RESPONSES, {"background": "true"}, True),
        (Endpoint.RESPONSES, {"conversation": {"id": "conv_1"}}, True),
        (Endpoint.RESPONSES, {"tools": [{"type": "web_search"}, {"type": "mcp", "server_label": "mail"}]}, True),
        (Endpoint.RESPONSES, {"input": "x", "background": True}, True),
        (Endpoint.MESSAGES, {"mcp_servers": []}, False),
        (Endpoint.MESSAGES, {"mcp_servers": [{"type": "url", "url": "https://mail"}]}, True),
        (Endpoint.MESSAGES, {"container": {"skills": []}}, False),
        (Endpoint.MESSAGES, {"container": "container_1"}, True),
        (Endpoint.CHAT, {"store": True, "background": True}, False),
    ],
)
@pytest.mark.parametrize("padding", [0, 60_000])
def test_effects_beyond_the_answer_are_known(
    endpoint: Endpoint, fields: dict[str, object], has_effects: bool, padding: int
) -> None:
    """Jobs, conversations, containers and remote tools; not what is stored under an id that nobody learns."""
    member = "input" if endpoint is Endpoint.RESPONSES else "messages"
    body = json.dumps({"model": "m", member: SAID, "metadata": [0] * padding, **fields}).encode()
    assert read(body, endpoint).has_effects is has_effects


def test_a_model_may_have_512_bytes() -> None:
    assert read(b'{"model":"%b","messages":[]}' % (b"m" * 512), Endpoint.CHAT).model == "m" * 512

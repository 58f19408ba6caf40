"""Every model that a body can make the upstream use is found, or the body counts as unreadable."""

from __future__ import annotations

import json

import pytest

from proxy.errors import BadRequest
from proxy.wire.named_models import (
    batch_request_models,
    further_models,
    hides_names,
    model_of,
    models_of_request,
    query_models,
)
from proxy.wire.references import has_members_in_other_case

JSON = b"application/json"
FORM = b"multipart/form-data; boundary=b"


def form(*named: tuple[str, bytes]) -> bytes:
    """A form of these fields."""
    parts = [b'--b\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (n.encode(), v) for n, v in named]
    return b"".join(parts) + b"--b--\r\n"


@pytest.mark.parametrize(
    ("body", "content_type", "model"),
    [
        (b'{"model":"m","input":[1]}', JSON, "m"),
        (b'{"mod\\u0065l":"m"}', JSON, "m"),
        (b'{"model":"m"}', b"", "m"),
        (b'{"model":""}', JSON, None),
        (b'{"model":7}', JSON, None),
        (b"{}", JSON, None),
        (b"x", JSON, None),
        (b"[" * 100_000, JSON, None),
        (form(("file", b"\xff"), ("model", b" m ")), FORM, "m"),
        (form(("model", b"")), FORM, None),
        (form(("model", b"\xff")), FORM, None),
        (form(("file", b"x")), FORM, None),
        (b"x", FORM, None),
    ],
)
def test_the_model_of_a_body_is_found(body: bytes, content_type: bytes, model: str | None) -> None:
    """In JSON, whatever the type says, and in forms."""
    assert model_of(body, content_type) == model


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(b'{"model":"a","model":"b"}', JSON), (form(("model", b"a"), ("model", b"b")), FORM)],
)
def test_a_model_given_twice_is_refused(body: bytes, content_type: bytes) -> None:
    """The upstream might read the other one."""
    with pytest.raises(BadRequest, match=r"^model is given twice$"):
        model_of(body, content_type)


SCHEMA = {"type": "object", "properties": {"model": {"type": "string"}}, "$defs": {"CarModel": {}}}


@pytest.mark.parametrize(
    ("fields", "further"),
    [
        ({}, []),
        ({"models": ["a", "b"], "fallbacks": None}, ["a", "b"]),
        ({"Fallbacks": ["c"], "fallback_models": ["d"]}, ["c", "d"]),
        ({"models": "a"}, ["a"]),
        ({"extra_body": {"provider": [{"models": ["a"]}]}}, ["a"]),
        ({"tools": [{"type": "image_generation", "model": "a"}, {"type": "mcp", "name": "model"}]}, ["a"]),
        ({"tools": [{"type": "advisor", "MODEL": "a"}]}, ["a"]),
        ({"session": {"audio": {"input": {"transcription": {"model": "a"}}}}}, ["a"]),
        ({"plugins": [{"id": "web", "model_name": "a"}]}, ["a"]),
        ({"lora_path": "a", "adapter_id": None, "lora": ["b"]}, ["a", "b"]),
        ({"engine": "a", "deployment_id": "b", "extra_body": {"preset": "c"}}, ["a", "b", "c"]),
        ({"agent_id": "a", "inputs": [{"model": "b"}], "items": [{"model": "b"}]}, ["a"]),
        ({"tools": [{"type": "image_generation"}]}, None),
        ({"tools": [{"type": "image_generation", "model": None}]}, None),
        ({"Tools": [{"Type": "image_generation"}]}, None),
        ({"tools": [{"type": "x", "TYPE": "image_generation"}]}, None),
        ({"MODEL": "x"}, None),
        ({"fallbacks": [{"model": "a"}]}, None),
        ({"context_window_fallbacks": [{"m": ["a"]}]}, None),
        ({"lora": [{"id": 0, "scale": 1}]}, None),
        ({"models": 7}, None),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]}, []),
        ({"tools": [{"type": "function", "name": "f", "parameters": SCHEMA}]}, []),
        ({"tools": [{"name": "f", "input_schema": SCHEMA, "input_examples": [{"model": "T"}]}]}, []),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, []),
        ({"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, []),
        ({"guided_json": SCHEMA, "structured_outputs": {"json": SCHEMA}}, []),
        ({"messages": [{"role": "user", "content": "x", "model": "a"}], "metadata": {"model": "T"}}, []),
        ({"chat_template_kwargs": {"model_identity": "You are a pirate."}, "modalities": ["text"]}, []),
        ({"tool_choice": {"type": "image_generation"}}, []),
    ],
)
def test_every_model_that_a_body_can_make_the_upstream_use_is_found(fields, further) -> None:
    """At any depth and in any letter case; prompts and schemas name none, and what cannot be read could name any."""
    expected = None if further is None else ["m", *further]
    assert further_models(json.dumps({"model": "m", **fields}).encode(), JSON) == expected


def test_a_key_cannot_be_hidden_in_an_escape() -> None:
    hidden = b'{"model":"m","tools":[{"type":"x","mod\\u0065l":"a"}]}'
    assert further_models(hidden, JSON) == ["m", "a"]


def test_the_fields_of_a_form_that_name_models_are_all_read() -> None:
    assert further_models(form(("model", b"a"), ("fallback_model", b" b "), ("prompt", b"model")), FORM) == ["a", "b"]
    assert further_models(form(("Model", b"\xff")), FORM) is None
    assert further_models(b"x", JSON) is None
    assert further_models(b"x", FORM) is None


@pytest.mark.parametrize(
    ("content_type", "hides"),
    [
        (b"", False),
        (JSON, False),
        (b"application/json; charset=utf-8", False),
        (b'application/json;Charset = "UTF8"', False),
        (b"application/json; charset=ISO-8859-1", False),
        (b"application/json; charset=utf-7", True),
        (b"application/json; charset='UTF-16'", True),
    ],
)
def test_a_charset_in_which_ascii_means_something_else_may_hide_names(content_type: bytes, hides: bool) -> None:
    """It is named in any letter case, with quotes or without."""
    assert hides_names(content_type) is hides


def test_a_query_may_name_models() -> None:
    assert query_models("/v1/x?api-version=1&model=a&Fallback%5Fmodel=b") == ["a", "b"]
    assert query_models("/v1/x") == []


@pytest.mark.parametrize(
    ("request_of_a_line", "models"),
    [
        ({"model": "b", "models": ["c"]}, {"b", "c"}),
        ({}, None),
        ({"model": 7}, None),
        ({"model": "a", "Model": "b"}, None),
        ({"model": "a", "fallbacks": "b"}, {"a", "b"}),
        ({"model": "a", "tools": [{"type": "image_generation", "model": "b"}]}, {"a", "b"}),
        ({"model": "a", "tools": [{"type": "image_generation"}]}, None),
        ({"model": "a", "models": [7]}, None),
        (7, None),
    ],
)
def test_the_models_of_a_decoded_request_are_all_that_it_can_use(request_of_a_line, models) -> None:
    """What names none, or could name any, is unreadable."""
    assert models_of_request(request_of_a_line) == models


@pytest.mark.parametrize(
    ("body", "models"),
    [
        ({"requests": [{"params": {"model": "a"}}, {"params": {"model": "b"}}]}, {"a", "b"}),
        ({"requests": []}, set()),
        ({"requests": [{"params": {}}]}, None),
        ({"requests": [{"params": {"model": "a"}}], "REQUEST\u017f": []}, None),
        ({"requests": [{"params": {"model": "a"}, "Params": {"model": "b"}}]}, None),
        ({"requests": [7]}, None),
        ({"requests": 7}, None),
        ({"requests": [{"params": {"model": "a"}}] * 3 + [7]}, None),
        ({}, None),
        ([], None),
    ],
)
def test_the_models_of_a_batch_of_messages_are_those_of_all_its_requests(body, models) -> None:
    """One request without a model makes it unreadable."""
    assert batch_request_models(json.dumps(body).encode()) == models


def test_the_members_of_a_body_with_very_many_of_them_are_not_all_looked_at() -> None:
    """300,000 of them took half a second. The models of such a body are unknown, and its objects too."""
    body = b'{"model":"m",%b}' % b",".join(b'"k%d":1' % place for place in range(1_001))
    assert further_models(body, JSON) is None
    with pytest.raises(BadRequest, match=r"^the body has more than 1,000 members\.$"):
        has_members_in_other_case(body)
    assert further_models(body.replace(b',"k1000":1', b"").replace(b',"k999":1', b""), JSON) == ["m"]


def test_the_token_ids_of_a_limited_client_s_prompt_may_be_many() -> None:
    """A prompt names no model, and is not decoded for it."""
    body = b'{"model":"m","prompt":[%b0]}' % (b"1," * 1_500_000)
    assert further_models(body, JSON) == ["m"]

"""Every model that a body can make the upstream use is found, or the body counts as unreadable."""

from __future__ import annotations

import json

import pytest

from proxy.errors import BadRequest
from proxy.wire.named_models import batch_file_models, batch_request_models, further_models, is_batch_input, model_of

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
    with pytest.raises(BadRequest):
        model_of(body, content_type)


@pytest.mark.parametrize(
    ("fields", "further"),
    [
        ({}, []),
        ({"models": ["a", "b"], "fallbacks": None}, ["a", "b"]),
        ({"Fallbacks": ["c"], "fallback_models": ["d"]}, ["c", "d"]),
        ({"MODEL": "x"}, None),
        ({"models": "a"}, None),
        ({"fallbacks": [{"model": "a"}]}, None),
    ],
)
def test_further_models_are_found_or_make_the_body_unreadable(fields, further) -> None:
    """Some servers ignore the case of keys, and gateways take fallbacks."""
    assert further_models(json.dumps({"model": "m", **fields}).encode(), JSON) == further
    assert further_models(b"x", JSON) is None
    assert further_models(b"x", FORM) == []


def test_a_batch_file_is_told_by_its_purpose() -> None:
    """Two purposes, or a form that cannot be read, are neither yes nor no."""
    assert is_batch_input(form(("purpose", b"batch")), FORM) is True
    assert is_batch_input(form(("purpose", b"user_data")), FORM) is False
    assert is_batch_input(form(("file", b"x")), FORM) is False
    assert is_batch_input(form(("purpose", b"batch"), ("purpose", b"user_data")), FORM) is None
    assert is_batch_input(b"x", FORM) is None


def line(**body: object) -> bytes:
    """One request of a batch."""
    return json.dumps({"custom_id": "1", "body": body}).encode()


@pytest.mark.parametrize(
    ("content", "models"),
    [
        (line(model="a") + b"\n\n" + line(model="b", models=["c"]) + b"\r\n", {"a", "b", "c"}),
        (b"", set()),
        (line(model="a") + b"\n{", None),
        (line(), None),
        (line(model=7), None),
        (line(model="a", Model="b"), None),
        (line(model="a", fallbacks="b"), None),
        (line(model="a", models=[7]), None),
        (b'{"body":7}', None),
        (b"7", None),
        (b"{}\n" * 50_001, None),
    ],
    ids=range(11),
)
def test_the_models_of_a_batch_file_are_those_of_all_its_lines(content: bytes, models) -> None:
    """One line that cannot be read makes the file unreadable."""
    assert batch_file_models(form(("purpose", b"batch"), ("file", content)), FORM) == models
    assert batch_file_models(b"x", FORM) is None


@pytest.mark.parametrize(
    ("body", "models"),
    [
        ({"requests": [{"params": {"model": "a"}}, {"params": {"model": "b"}}]}, {"a", "b"}),
        ({"requests": []}, set()),
        ({"requests": [{"params": {}}]}, None),
        ({"requests": [7]}, None),
        ({"requests": 7}, None),
        ({}, None),
        ([], None),
    ],
)
def test_the_models_of_a_batch_of_messages_are_those_of_all_its_requests(body, models) -> None:
    """One request without a model makes it unreadable."""
    assert batch_request_models(json.dumps(body).encode()) == models

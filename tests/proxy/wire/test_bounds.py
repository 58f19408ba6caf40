"""Bodies that would take too long to decode are refused early, and no others."""

from __future__ import annotations

import contextlib
import json
import re
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from proxy.errors import BadRequest
from proxy.model import Endpoint
from proxy.wire import bounds
from proxy.wire.bounds import (
    CHECKED_BYTES,
    COMMAS_HARMLESS,
    NESTED_MOST,
    VALUES_MOST,
    TooManyItems,
    check_array,
    check_nesting,
    check_values,
    is_nested_beyond,
)
from proxy.wire.named_models import further_models
from proxy.wire.references import references
from proxy.wire.request import read
from proxy.wire.schemas import MESSAGES_MOST
from tests.conftest import IS_COMPILED

MIB = 1024 * 1024
MANY = b"[" + b",".join([b"0"] * 4_000_000) + b"]"
MEMBERS = {Endpoint.CHAT: b"messages", Endpoint.MESSAGES: b"messages", Endpoint.RESPONSES: b"input"}


@pytest.mark.parametrize("endpoint", MEMBERS)
@pytest.mark.parametrize("times", [1, 3])
def test_millions_of_items_are_refused_before_they_take_memory(endpoint: Endpoint, times: int) -> None:
    """They are refused at any place, and even if a shorter array of that name follows."""
    member = MEMBERS[endpoint]
    body = b'{"model":"m"' + (b',"%b":' % member + MANY) * times + b',"x":1}'
    if times > 1:
        body = body[:-1] + b',"%b":[]}' % member
    tracemalloc.start()
    try:
        if times > 1:
            assert read(body, endpoint).spans == ()
        else:
            with pytest.raises(TooManyItems) as refused:
                read(body, endpoint)
            assert refused.value.param == member.decode()
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("endpoint", MEMBERS)
def test_a_long_body_with_many_commas_is_read_as_a_short_one_is(endpoint: Endpoint) -> None:
    """Its spans lie in the body, and a wrong type is named in the same way."""
    member = MEMBERS[endpoint].decode()
    content = "1,2," * CHECKED_BYTES
    items = [{"role": "user", "content": content}, {"role": "user", "content": "b"}]
    body = json.dumps({"model": "m", member: items}).encode()
    prompt = read(body, endpoint)
    assert [json.loads(bytes(span)) for span in prompt.spans] == items
    for wrong in (b"7", b"{}") if endpoint is not Endpoint.RESPONSES else ():  # whose input may be anything
        with pytest.raises(BadRequest) as refused:
            read(b'{"model":"m","x":"%b","%b":%b}' % (content.encode(), member.encode(), wrong), endpoint)
        assert refused.value.param == member


def test_a_text_as_input_may_have_any_number_of_commas() -> None:
    """It is one item."""
    body = json.dumps({"model": "m", "input": "1,2," * CHECKED_BYTES}).encode()
    assert len(read(body, Endpoint.RESPONSES).spans) == 1


def test_a_second_model_ends_the_reading() -> None:
    """A body can hold half a million of them, each of which is a call. Of CPU time the best of five counts."""
    body = b'{"messages":[],' + b",".join([b'"model":"m"'] * (NESTED_MOST - 100)) + b"}"

    def cpu_seconds() -> float:
        begun = time.thread_time()
        with pytest.raises(BadRequest, match="model is given twice"):
            read(body, Endpoint.CHAT)
        return time.thread_time() - begun

    assert any(cpu_seconds() < 0.2 for _ in range(5))


@pytest.mark.parametrize("items", [0, 1, 99, 100, 101])
def test_an_array_may_have_as_many_items_as_are_allowed(items: int) -> None:
    """Not one more."""
    array = Raw(b"[" + b",".join([b'{"a":[1,2]}'] * items) + b"]")
    if items > 100:
        with pytest.raises(TooManyItems, match=r"^x has more than 100 items\.$") as caught:
            check_array(array, "x", 100)
        assert caught.value.param == "x"
    else:
        check_array(array, "x", 100)


@pytest.mark.parametrize("text", [b"", b"7" * 200, b'"' + b"," * 200 + b'"', b"[" + b"1," * 90, b"[" * 5000, b"{}"])
def test_what_is_no_array_is_left_to_its_reader(text: bytes) -> None:
    """Broken or of another type."""
    check_array(Raw(text), "x", 100)


@pytest.mark.parametrize("value", [b"[],", b"{},", b'"a",', b'{"a":0},', b"0,"])
def test_a_body_that_must_be_decoded_whole_has_a_bounded_number_of_values(value: bytes) -> None:
    """Of any kind; commas and brackets within texts do not count."""
    text = b'"%b"' % (b'\\"[{,' * (2 * VALUES_MOST))
    check_values(b'{"input":[%b]}' % text)
    with pytest.raises(BadRequest, match=r"^the body has more than 250,000 values\.$"):
        check_values(b'{"input":[%b0]}' % (value * max(VALUES_MOST + 1, CHECKED_BYTES // len(value))))


def test_neither_references_nor_further_models_are_sought_in_too_many_values() -> None:
    """Each would decode all of them."""
    body = b'{"file_id":"f","model":"m","x":[%b"model"]}' % (b"[]," * (VALUES_MOST + CHECKED_BYTES // 3))
    with pytest.raises(BadRequest, match="values"):
        references(body, (body,))
    with pytest.raises(BadRequest, match="values"):
        further_models(body, b"application/json")


def test_the_bounds_leave_room_for_honest_bodies() -> None:
    """As many messages as are allowed pass though they hold more commas than are harmless."""
    message = {"role": "user", "content": "x" * 150, "a": [0] * 15}
    body = json.dumps({"model": "m", "messages": [message] * MESSAGES_MOST}).encode()
    assert len(body) > CHECKED_BYTES
    assert body.count(b",") > COMMAS_HARMLESS
    assert len(read(body, Endpoint.CHAT).spans) == MESSAGES_MOST


@pytest.mark.parametrize("endpoint", [each for each in Endpoint if each.is_generation] + [Endpoint.EMBEDDINGS])
@pytest.mark.parametrize("unit", [b"{}", b"[]", b'{"a":1}'])
def test_millions_of_objects_arrays_and_members_are_refused_anywhere(endpoint: Endpoint, unit: bytes) -> None:
    """Even what is only skipped takes too long then."""
    many = b",".join([unit] * (NESTED_MOST + 1))
    with pytest.raises(BadRequest, match="objects, arrays and members"):
        read(b'{"model":"m","messages":[],"input":[],"prompt":"a","x":[%b]}' % many, endpoint)


def test_a_body_may_have_any_number_of_token_ids() -> None:
    """A prompt of them has millions, and they are skipped fast."""
    prompt = read(b'{"model":"m","prompt":[%b]}' % b",".join([b"17"] * 3_000_000), Endpoint.COMPLETIONS)
    assert prompt.size_bytes == 9_000_001


@pytest.mark.skipif(IS_COMPILED, reason="a constant is part of the compiled code")
@pytest.mark.parametrize(
    ("text", "count"),
    [
        (b'{"a":[{}],"b":"c"}', 5),
        (b'["[{:","\\"",[],"\\\\\\"[[[",{}]', 3),
        (b'["\\\\",["\\\\\\\\"],":\\\\"]', 2),
        (b'["\\u005b[","a\\n[",["\\\\n["]]', 2),
        (b'{"":{"":""}}', 4),
    ],
)
def test_signs_inside_strings_do_not_count_however_they_are_escaped(
    monkeypatch: pytest.MonkeyPatch, text: bytes, count: int
) -> None:
    """A text about JSON has many."""
    json.loads(text)
    monkeypatch.setattr(bounds, "NESTED_MOST", count)
    check_nesting(text)
    monkeypatch.setattr(bounds, "NESTED_MOST", count - 1)
    with pytest.raises(BadRequest):
        check_nesting(text)


def test_many_strings_with_signs_are_told_from_members() -> None:
    """Strings that only follow each other cost nothing; each member has a sign outside."""
    check_nesting(b"[" + b",".join([b'"[{:"'] * (2 * NESTED_MOST)) + b"]")
    with pytest.raises(BadRequest):
        check_nesting(b"{" + b",".join([b'"[":"{"'] * (2 * NESTED_MOST)) + b"}")


_TOKENS = [b'"a"', b'""', b'"\\""', b'"\\\\"', b'"[:{\\\\\\""', b'"' + b"\\\\" * 6 + b'"', b"{", b":", b"[", b","]
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')


@pytest.mark.skipif(IS_COMPILED, reason="a constant is part of the compiled code")
@given(tokens=st.lists(st.sampled_from(_TOKENS), max_size=30), step=st.integers(1, 9))
def test_signs_are_counted_outside_of_strings_wherever_the_text_is_cut(tokens: list[bytes], step: int) -> None:
    """A string, and an escape in it, may go on in the next part."""
    text = b"{" + b"".join(tokens)
    outside = _STRING.sub(b"", text)
    count = sum(outside.count(sign) for sign in (b":", b"[", b"{"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "_STEP_BYTES", step)
        assert (is_nested_beyond(text, count), is_nested_beyond(text, count - 1)) == (False, True)


@pytest.mark.parametrize("member", ["stream", "store", "container"])
def test_the_values_of_a_member_of_any_type_are_not_made_in_a_body_that_may_hold_many(member: str) -> None:
    """300,000 empty lists in 900 KB took a quarter of a second, most of it the garbage collector's."""
    lists = b",".join([b"[]"] * 50_000)
    body = b'{"model":"m","messages":[{"content":"x"}],"%b":[%b]}' % (member.encode(), lists)
    tracemalloc.start()
    try:
        with contextlib.suppress(BadRequest):  # of a container that is too long
            assert not read(body, Endpoint.CHAT).stream
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()

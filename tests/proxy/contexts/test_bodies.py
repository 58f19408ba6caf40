"""Bodies sent to /v1/caching: what is read, and the field that each refusal names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.contexts import bodies
from proxy.errors import BadRequest

TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}
CALL = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "find"}}]}
ANSWER = {"role": "tool", "tool_call_id": "c1", "content": "found"}
USER = {"role": "user", "content": "q"}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [USER], **fields}).encode()


def test_an_upload_keeps_the_bytes_of_messages_and_tools() -> None:
    """With bounds of each message, and whether the last one is the user's."""
    raw = (
        b'{"model":"m","messages":[ {"role":"user","content":"a"} , '
        b'{"content":[{"type":"text","text":"b"}],"role":"system"}],'
        b'"tools": [ {"type":"function","function":{"name":"f"}} ], "ttl":5, "tags":["t","t"], "metadata":{"a":"b"}}'
    )
    upload = bodies.read_upload(raw)
    assert upload.messages.startswith(b'{"role":"user","content":"a"} , {')
    assert upload.messages[upload.bounds[2] : upload.bounds[3]].endswith(b'"role":"system"}')
    assert upload.tools == b'[ {"type":"function","function":{"name":"f"}} ]'
    assert (upload.ttl_seconds, upload.tags, upload.metadata, upload.ends_with_user) == (5, ("t",), {"a": "b"}, False)


def test_a_conversation_with_tools_is_read() -> None:
    """A tool's answer follows its call; other tools need no function; an empty list of tools is none."""
    upload = bodies.read_upload(body(messages=[USER, CALL, ANSWER], tools=[TOOL, {"type": "web_search"}]))
    assert not upload.ends_with_user
    assert bodies.read_upload(body(tools=[])).tools == b""
    assert bodies.read_upload(body(tools=None)).tools == b""
    bodies.read_upload(body(messages=[{"role": "assistant", "content": None, "refusal": "no"}]))
    bodies.read_upload(body(messages=[{"role": "assistant", "function_call": {"name": "f"}, "content": None}]))
    bodies.read_upload(body(messages=[{"role": "user", "name": "n", "content": [{"type": "image_url"}]}]))


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"\xff", None),
        (b"[" * 100_000, None),
        (body(model=""), "model"),
        (body(model=7), "model"),
        (body(model="m" * 5000), "model"),
        (body(messages=None), "messages"),
        (body(messages=[]), "messages"),
        (body(messages={}), "messages"),
        (body(messages=[USER] * 10_001), "messages"),
        (body(messages=["x"]), "messages[0]"),
        (body(messages=[{"role": "cache", "content": "x"}]), "messages[0].role"),
        (body(messages=[{"role": ["user"], "content": "x"}]), "messages[0].role"),
        (body(messages=[{**USER, "name": 7}]), "messages[0].name"),
        (body(messages=[{**CALL, "role": "user"}]), "messages[0].tool_calls"),
        (body(messages=[{**CALL, "tool_calls": [{"id": 7}]}]), "messages[0].tool_calls"),
        (body(messages=[{"role": "user"}]), "messages[0].content"),
        (body(messages=[{"role": "user", "content": 7}]), "messages[0].content"),
        (body(messages=[{"role": "user", "content": []}]), "messages[0].content"),
        (body(messages=[{"role": "user", "content": [7]}]), "messages[0].content"),
        (body(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
        (body(messages=[ANSWER]), "messages[0].tool_call_id"),
        (body(messages=[CALL, ANSWER]), "tools"),
        (body(tools={}), "tools"),
        (body(tools=[TOOL] * 129), "tools"),
        (body(tools=[7]), "tools[0]"),
        (body(tools=[{"type": "function"}]), "tools[0].function"),
        (body(tools=[{"type": "function", "function": {"name": " "}}]), "tools[0].function.name"),
        (
            body(tools=[{"type": "function", "function": {"name": "f", "parameters": 7}}]),
            "tools[0].function.parameters",
        ),
        (body(name=7), "name"),
        (body(name="n" * 257), "name"),
        (body(description="n" * 513), "description"),
        (body(metadata=[]), "metadata"),
        (body(metadata={str(number): "" for number in range(17)}), "metadata"),
        (body(metadata={"k" * 65: ""}), "metadata"),
        (body(metadata={"k": 7}), "metadata"),
        (body(metadata={"k": "v" * 513}), "metadata"),
        (body(tags="t"), "tags"),
        (body(tags=["t"] * 17), "tags"),
        (body(tags=["9"]), "tags[0]"),
        (body(ttl=5, expired_at=5), "expired_at"),
        (body(ttl=0), "ttl"),
        (body(ttl=True), "ttl"),
        (body(ttl=10**10), "ttl"),
        (body(expired_at=1.5), "expired_at"),
        (b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}', "messages"),
    ],
)
def test_each_refusal_names_its_field(raw: bytes, param: str | None) -> None:
    """In a message of one sentence."""
    with pytest.raises(BadRequest) as refused:
        bodies.read_upload(raw)
    assert refused.value.param == param
    assert refused.value.message.rstrip(")").endswith(".") or "not JSON" in refused.value.message


def test_changes_and_tags_are_read_by_the_same_rules() -> None:
    """An id that cannot exist is None, not an error."""
    assert bodies.read_change(b'{"ttl":5}') == bodies.Change(None, 5, None)
    context_id = f"cache-{7:032x}"
    assert bodies.read_tagging(b'{"tag":"t","cache_id":"%b"}' % context_id.encode()) == ("t", context_id)
    assert bodies.read_tagging(b'{"tag":"t","cache_id":"x"}') == ("t", None)
    for raw in (b'{"tag":"t"}', b'{"tag":"","cache_id":"x"}'):
        with pytest.raises(BadRequest):
            bodies.read_tagging(raw)


def test_a_query_is_read_and_its_limits_hold() -> None:
    """Unknown fields are ignored, as an SDK may add some."""
    page = bodies.read_page("limit=5&order=asc&after=a&metadata[k]=v&metadata[e]=&other=x")
    assert page == bodies.Page(5, newest_first=False, after="a", before=None, metadata={"k": "v", "e": ""})
    for query in ("limit=0", "limit=101", "limit=x", "limit=%C2%B2", "order=up", "&".join(["a=b"] * 65)):
        with pytest.raises(BadRequest):
            bodies.read_page(query)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    """By all three readers of bodies."""
    for read in (bodies.read_upload, bodies.read_change, bodies.read_tagging):
        try:
            read(raw)
        except BadRequest:
            continue

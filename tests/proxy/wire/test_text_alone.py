"""Only a prompt that is all there in its body says how many tokens its text has."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from proxy.model import Endpoint
from proxy.wire.request import read
from proxy.wire.text_alone import SEARCHED_BYTES_MOST, TextAlone

PICTURE = "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 20).decode()
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"url": {"type": "string"}, "file_id": {}}}}


def holds(body: dict[str, Any], endpoint: Endpoint = Endpoint.CHAT) -> bool:
    """Whether the prompt of a body is text alone."""
    return TextAlone().holds_for(read(json.dumps({"model": "m", **body}).encode(), endpoint))


def content(*parts: dict[str, Any]) -> dict[str, Any]:
    """A chat of one message of parts."""
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": 'a text with "url": "http://x" and file_id in it'}]},
        content({"type": "text", "text": 'call {"url": "http://x"}'}),
        content({"type": "image_url", "image_url": {"url": PICTURE}}),
        {"messages": [{"role": "user", "content": "x" * (2 * SEARCHED_BYTES_MOST)}], "tools": [FUNCTION] * 900},
        {"messages": [], "tools": None},
        {"messages": [], "tools": [{"name": "a", "input_schema": {}}]},
    ],
    ids=range(6),
)
def test_text_embedded_media_and_the_clients_own_tools_are_alone(body) -> None:
    """Data URLs are content, and a text that speaks of addresses names none."""
    assert holds(body)


@pytest.mark.parametrize(
    "body",
    [
        content({"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}),
        content({"type": "image", "source": {"type": "url", "url": "https://x.example/a.png"}}),
        content({"type": "file", "file": {"file_id": "file-1"}}),
        content({"type": "text", "text": "x" * (SEARCHED_BYTES_MOST + 1)}),
        {"messages": [], "tools": [FUNCTION, {"type": "web_search"}]},
        {"messages": [], "tools": [{"type": 7}]},
        {"messages": [], "tools": "x"},
        {"messages": [], "web_search_options": {}},
    ],
    ids=range(8),
)
def test_what_the_upstream_adds_to_is_not_alone(body) -> None:
    """Media by address, files by id, hosted tools and searches, and content too long to be searched."""
    assert not holds(body)


@pytest.mark.parametrize("fields", [{"previous_response_id": "r"}, {"conversation": "c"}, {"prompt": {"id": "p"}}])
def test_a_response_that_continues_or_uses_a_stored_prompt_is_not_alone(fields) -> None:
    """The upstream knows more than the body."""
    assert not holds({"input": "x", **fields}, Endpoint.RESPONSES)
    assert holds({"input": "x"}, Endpoint.RESPONSES)


def test_lists_of_tools_are_remembered_within_a_bound() -> None:
    """The same tools come with every request of an agent, and clients may make up as many as they like."""
    alone = TextAlone()
    for number in range(1000):
        body = {"model": "m", "messages": [], "tools": [{"type": "function", "n": number}]}
        assert alone.holds_for(read(json.dumps(body).encode(), Endpoint.CHAT))
    assert len(alone._tools) <= 256  # noqa: SLF001 - internal state that no public name shows


@pytest.mark.parametrize(
    ("last", "expected"), [("b" * 4096, True), ([{"type": "image_url", "image_url": {"url": "https://x/y"}}], False)]
)
def test_a_few_long_messages_are_text_alone_only_if_each_content_is_a_string(last, expected):
    messages = [{"role": "system", "content": "a" * 4096}, {"role": "user", "content": last}]
    assert holds({"messages": messages}) is expected


def test_a_file_id_that_begins_a_list_of_content_is_found_and_a_text_of_that_kind_is_not() -> None:
    """Wherever the key is, and whatever white space is around it."""
    assert not holds({"messages": [{"role": "user", "content": [{"file_id": "f"}]}]})
    assert not holds({"messages": [{"role": "user", "content": [{"a": {"url": "x"}, "b": {"url": "https://x"}}]}]})
    assert holds(content({"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "url"}))

"""The urgency that a client states for its request."""

from __future__ import annotations

import json

import pytest

from proxy.errors import BadRequest
from proxy.model import Endpoint
from proxy.wire.request import read
from proxy.wire.urgency import HIGH, LOW, NORMAL, UNSAID, urgency_of


@pytest.mark.parametrize(
    ("header", "expected"), [(b"high", HIGH), (b" Normal ", NORMAL), (b"low", LOW)], ids=["high", "normal", "low"]
)
def test_the_header_names_a_priority(header, expected):
    """In any letter case."""
    assert urgency_of([(b"accept", b"*/*"), (b"x-cairn-priority", header)]).priority == expected


def test_nothing_said_is_nothing():
    """The common case."""
    assert urgency_of([(b"host", b"a"), (b"authorization", b"Bearer x")]) is UNSAID


@pytest.mark.parametrize(
    "value", [b"0", b"-1", b"nan", b"inf", b"soon", b"", b"90000", b"1_0", b"5s", b"1e99", b"0x10", b"10,20", b"+5"]
)
def test_a_deadline_that_is_no_time_is_refused(value):
    """Rather than ignored: the client relies on it."""
    with pytest.raises(BadRequest) as caught:
        urgency_of([(b"x-request-deadline", value)])
    assert caught.value.message == "x-request-deadline must be a number of seconds, above 0 and at most 86400."
    assert caught.value.param == "x-request-deadline"


def test_a_deadline_is_in_seconds():
    """With a fraction, if the client likes; a day is the longest."""
    assert urgency_of([(b"x-request-deadline", b"86400")]).deadline_seconds == 86_400
    with pytest.raises(BadRequest):
        urgency_of([(b"x-request-deadline", b"86400.001")])
    assert urgency_of([(b"x-request-deadline", b"2.5")]).deadline_seconds == 2.5


def test_an_unknown_priority_is_refused():
    """It names the three."""
    with pytest.raises(BadRequest, match=r"^x-cairn-priority must be high, normal or low\.$") as caught:
        urgency_of([(b"x-cairn-priority", b"urgent")])
    assert caught.value.param == "x-cairn-priority"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"priority": -5}, HIGH),
        ({"priority": 0}, NORMAL),
        ({"priority": 7}, LOW),
        ({"priority": 0.5}, LOW),
        ({"service_tier": "flex"}, LOW),
        ({"service_tier": "priority"}, HIGH),
        ({"service_tier": "auto"}, None),
        ({"service_tier": "auto", "priority": 3}, LOW),
        ({"service_tier": 3, "priority": -1}, HIGH),
        ({"priority": True}, None),
        ({"priority": [1]}, None),
        ({"priority": None}, None),
        ({"priority": "1"}, None),
        ({"metadata": {"priority": -5}}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize(
    ("endpoint", "prompt"),
    [
        (Endpoint.CHAT, {"messages": [{"role": "user", "content": '"priority": -5'}]}),
        (Endpoint.COMPLETIONS, {"prompt": "Hello"}),
        (Endpoint.RESPONSES, {"input": "Hello"}),
        (Endpoint.MESSAGES, {"messages": [{"role": "user", "content": "Hello"}]}),
    ],
)
def test_the_body_may_say_it_as_openai_and_vllm_do(endpoint, prompt, members, expected):
    """A value of another kind is left to the upstream, and text of a message says nothing."""
    assert read(json.dumps({"model": "m", **members, **prompt}).encode(), endpoint).priority == expected

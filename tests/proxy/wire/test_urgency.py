"""What a client says about how urgent its request is."""

from __future__ import annotations

import pytest

from proxy.errors import BadRequest
from proxy.wire.urgency import HIGH, LOW, NORMAL, UNSAID, body_priority, urgency_of


@pytest.mark.parametrize(
    ("header", "expected"), [(b"high", HIGH), (b" Normal ", NORMAL), (b"low", LOW)], ids=["high", "normal", "low"]
)
def test_the_header_names_a_priority(header, expected):
    """In any letter case."""
    assert urgency_of([(b"accept", b"*/*"), (b"x-cairn-priority", header)]).priority == expected


def test_nothing_said_is_nothing():
    """The common case."""
    assert urgency_of([(b"host", b"a"), (b"authorization", b"Bearer x")]) is UNSAID


@pytest.mark.parametrize("value", [b"0", b"-1", b"nan", b"inf", b"soon", b"", b"90000"])
def test_a_deadline_that_is_no_time_is_refused(value):
    """Rather than ignored: the client relies on it."""
    with pytest.raises(BadRequest):
        urgency_of([(b"x-request-deadline", value)])


def test_a_deadline_is_in_seconds():
    """With a fraction, if the client likes."""
    assert urgency_of([(b"x-request-deadline", b"2.5")]).deadline_seconds == 2.5


def test_an_unknown_priority_is_refused():
    """It names the three."""
    with pytest.raises(BadRequest, match="high, normal or low"):
        urgency_of([(b"x-cairn-priority", b"urgent")])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"m","priority":-5}', HIGH),
        (b'{"priority":0}', NORMAL),
        (b'{"priority":7}', LOW),
        (b'{"service_tier":"flex"}', LOW),
        (b'{"service_tier":"priority"}', HIGH),
        (b'{"service_tier":"auto"}', None),
        (b'{"service_tier":"auto","priority":3}', LOW),
        (b'{"priority":true}', None),
        (b'{"priority":[1]}', None),
        (b'{"messages":[{"content":"\\"priority\\": -5"}]}', None),
        (b'not json "priority"', None),
        (b"{}", None),
    ],
)
def test_the_body_may_say_it_as_openai_and_vllm_do(body, expected):
    """A value of another kind is left to the upstream, and text of a message says nothing."""
    assert body_priority(body) == expected

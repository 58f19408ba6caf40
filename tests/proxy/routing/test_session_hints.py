"""A session's hint: by whom it is given, how it is found, and that it is forgotten."""

from __future__ import annotations

import pytest

from proxy.routing import session_hints
from proxy.routing.session_hints import SessionHints


def test_a_header_names_the_session_before_the_cache_key_does():
    """Known headers of agents, in lower case as the server gives them; without either there is none."""
    hints = SessionHints()
    header = hints.key("t", [(b"accept", b"*/*"), (b"session-id", b"one")], b'"key"')
    assert header == hints.key("t", [(b"x-session-affinity", b"one")], b"")
    assert header != hints.key("t", [(b"accept", b"*/*")], b'"key"')
    assert hints.key("t", [(b"accept", b"*/*")], b"") is None


def test_equal_names_of_two_tenants_are_two_sessions():
    hints = SessionHints()
    assert hints.key("a", [(b"session-id", b"one")], b"") != hints.key("b", [(b"session-id", b"one")], b"")


def test_a_name_may_have_256_bytes():
    """The most that is taken."""
    assert SessionHints().key("t", [(b"session-id", b"x" * 256)], b"") is not None


@pytest.mark.parametrize("name", [b"", b"x" * 257])
def test_an_empty_or_endless_name_is_no_session(name):
    assert SessionHints().key("t", [(b"session-id", name)], b"") is None


def test_headers_can_be_configured():
    hints = SessionHints(("X-Mine",))
    assert hints.key("t", [(b"x-mine", b"one")], b"") is not None
    assert hints.key("t", [(b"session-id", b"one")], b"") is None


def test_the_least_recently_served_session_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(session_hints, "MAX_SESSIONS", 2)
    hints = SessionHints()
    for key, replica in ((1, 5), (2, 6), (1, 7), (3, 8)):
        hints.served(key, replica)
    assert [hints.replica(key) for key in (1, 2, 3)] == [7, None, 8]

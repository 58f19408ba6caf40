"""Heads both ways: what ends here, what is set, and nothing that breaks out of its line."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.errors import BadRequest, BadResponse
from proxy.model import CacheStatus, MissReason, RouteReason
from proxy.wire import headers
from proxy.wire.headers import cairn_headers, kept_request_id, response_head, upstream_head

CLIENT = (
    (b"host", b"cairn:8080"),
    (b"authorization", b"Bearer client"),
    (b"x-api-key", b"client"),
    (b"user-agent", b"sdk"),
    (b"accept-encoding", b"gzip, br"),
    (b"content-type", b"application/json"),
    (b"content-length", b"7"),
    (b"traceparent", b"00-1-2-01"),
    (b"x-stainless-lang", b"python"),
)


def head(*extra: tuple[bytes, bytes], **options) -> list[tuple[bytes, bytes]]:
    """The upstream head for CLIENT and some more headers."""
    settings: dict[str, Any] = {"request_id": "r1", **options}
    return list(upstream_head((*CLIENT, *extra), **settings))


def test_host_and_length_are_left_out_and_the_request_id_is_set_anew() -> None:
    """The connection writes the first two itself; the third appears once, with our value."""
    found = head((b"x-request-id", b"theirs"))
    assert [pair for pair in found if pair[0] in (b"host", b"content-length", b"x-request-id")] == [
        (b"x-request-id", b"r1")
    ]


def test_end_to_end_headers_pass_with_the_client_s_key() -> None:
    """Without a key of the replica's own, the client's is the one."""
    found = dict(head())
    for name in (
        b"authorization",
        b"x-api-key",
        b"traceparent",
        b"user-agent",
        b"accept-encoding",
        b"x-stainless-lang",
    ):
        assert found[name] == dict(CLIENT)[name]


@pytest.mark.parametrize(
    "name",
    b"connection keep-alive te trailer transfer-encoding upgrade proxy-authorization proxy-connection expect cookie "
    b"forwarded x-forwarded-for x-forwarded-host x-forwarded-proto x-forwarded-anything x-real-ip via "
    b"x-http-method-override x-http-method x-method-override x-original-url x-original-uri x-rewrite-url "
    b"x-original-host x-original-path x-host x-http-host-override x-override-url x-request-uri x-envoy-original-path "
    b"x-waws-unencoded-url x_forwarded_for transfer_encoding content_length x_http_method_override x_cairn_replica "
    b"proxy_authorization "
    b"x-cairn-replica x-cairn-anything x-msh-context-cache x-msh-context-cache-reset-ttl".split(),
)
def test_what_ends_here_is_dropped(name) -> None:
    """Hop-by-hop, spoofable, overriding what was checked, and our own; also spelled as CGI would read it."""
    assert name not in dict(head((name, b"x")))


def test_a_name_with_an_underscore_that_means_nothing_else_passes() -> None:
    """Codex sends the id of its session in one."""
    assert dict(head((b"session_id", b"s")))[b"session_id"] == b"s"


@pytest.mark.parametrize(
    "name", [b"openai_project", b"x-goog-user-project", b"openai_organization", b"api_key", b"x_api_key"]
)
def test_no_spelling_of_an_account_goes_with_the_replica_s_key(name: bytes) -> None:
    """The client does not choose whose account is charged."""
    found = upstream_head(((name, b"x"),), request_id="r1", credential=(b"authorization", b"Bearer op"))
    assert name not in dict(found)


def test_what_connection_lists_is_dropped() -> None:
    """RFC 9110, 7.6.1; in any case, any spacing, several headers."""
    found = dict(head((b"connection", b"close, X-Secret"), (b"connection", b" x-other "), (b"x-secret", b"1")))
    assert b"x-secret" not in found
    assert found[b"user-agent"] == b"sdk"


def test_the_replica_s_key_replaces_every_key_of_the_client() -> None:
    """A client's credential never reaches an upstream that has its own."""
    found = head(credential=(b"authorization", b"Bearer replica"))
    assert [value for name, value in found if name == b"authorization"] == [b"Bearer replica"]
    assert b"x-api-key" not in dict(found)


def test_identity_is_asked_for_where_bytes_may_be_withheld() -> None:
    """A compressed stream cannot lose a chunk."""
    assert [value for name, value in head(identity=True) if name == b"accept-encoding"] == [b"identity"]


def test_names_made_up_by_strangers_do_not_grow_memory() -> None:
    """The number of remembered names is bounded, and further ones are still judged."""
    made_up = [(b"x-cairn-%d" % number, b"1") for number in range(5_000)] + [(b"n" * 100, b"1")]
    assert upstream_head(made_up, request_id="r") == ((b"n" * 100, b"1"), (b"x-request-id", b"r"))
    assert len(headers._FORWARDS) <= 1024  # noqa: SLF001 - internal state that no public name shows


@pytest.mark.parametrize("value", [b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b"])
def test_a_value_that_breaks_out_of_its_line_is_refused(value) -> None:
    """Both ways."""
    with pytest.raises(BadRequest, match=r"^a header contains a line break or NUL$"):
        head((b"x-note", value))
    with pytest.raises(BadRequest):
        head(request_id=value.decode())
    with pytest.raises(BadResponse, match=r"^a header of the response contains a line break or NUL$"):
        response_head([(b"x-note", value)], request_id="r1")


def test_the_answer_s_head_loses_what_ends_here_and_gains_ours() -> None:
    """The rest passes in its order."""
    upstream = [
        (b"content-type", b"text/event-stream"),
        (b"content-length", b"5"),
        (b"transfer-encoding", b"chunked"),
        (b"connection", b"keep-alive, x-hop"),
        (b"x-hop", b"1"),
        (b"set-cookie", b"a=b"),
        (b"x-request-id", b"theirs"),
        (b"x-cairn-replica", b"theirs"),
        (b"x-ratelimit-remaining", b"3"),
    ]
    ours = (b"x-cairn-replica", b"a")
    assert response_head(upstream, request_id="r1", own=(ours,), keep_length=False) == [
        (b"content-type", b"text/event-stream"),
        (b"x-ratelimit-remaining", b"3"),
        (b"x-request-id", b"r1"),
        ours,
    ]
    assert (b"content-length", b"5") in response_head(upstream, request_id="r1")


@pytest.mark.parametrize(
    "name",
    b"x-accel-redirect x-sendfile x-lighttpd-send-file x-reproxy-url set-cookie set-cookie2 alt-svc nel report-to "
    b"reporting-endpoints clear-site-data strict-transport-security access-control-allow-origin".split(),
)
def test_an_upstream_decides_nothing_for_a_front_server_or_for_the_origin(name: bytes) -> None:
    """nginx before Cairn would send a file of its own for x-accel-redirect."""
    assert name not in dict(response_head([(name, b"x")], request_id="r1"))


def test_cairn_s_own_headers_tell_the_decision() -> None:
    """RFC 9211's Cache-Status, Server-Timing in milliseconds."""
    assert cairn_headers(
        cache=CacheStatus.PARTIAL,
        miss=MissReason.CHANGED,
        reason=RouteReason.WARM,
        replica="a-1",
        matched_tokens=12.7,
        times=(0.0004, 0.0, 1.5),
    ) == (
        (b"cache-status", b"Cairn; fwd=partial; detail=changed"),
        (b"x-cairn-replica", b"a-1"),
        (b"x-cairn-matched-tokens", b"12"),
        (b"x-cairn-reason", b"warm"),
        (b"server-timing", b"cairn;dur=0.400, upstream;dur=1500.000"),
    )


def test_the_time_for_which_a_request_waited_is_a_time_of_its_own() -> None:
    """Nobody takes a wait for Cairn's own work."""
    described = cairn_headers(
        cache=CacheStatus.MISS,
        miss=MissReason.COLD,
        reason=RouteReason.COLD,
        replica="a-1",
        matched_tokens=0.0,
        times=(0.0004, 2.25, 1.5),
    )
    assert dict(described)[b"server-timing"] == b"cairn;dur=0.400, queue;dur=2250.000, upstream;dur=1500.000"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (b"req_1.a:b-c", "req_1.a:b-c"),
        (b"", None),
        (b"a b", None),
        (b"a\r\nb", None),
        (b"x" * 129, None),
        (b"\xff", None),
    ],
)
def test_a_client_s_request_id_is_kept_where_it_is_harmless(value, kept) -> None:
    """It is echoed and logged."""
    assert kept_request_id([(b"x-request-id", value)]) == kept
    assert kept_request_id([]) is None


@pytest.mark.parametrize(
    "name",
    [
        b"authorization",
        b"x-api-key",
        b"api-key",
        b"x-goog-api-key",
        b"ocp-apim-subscription-key",
        b"openai-organization",
        b"openai-project",
        b"x-litellm-api-key",
    ],
)
def test_no_key_of_the_client_reaches_an_upstream_that_has_its_own(name: bytes) -> None:
    """The choice of the account to be charged does not either; with the client's own key all of it passes."""
    sent = [(name, b"secret")]
    for options in ({"credential": (b"authorization", b"Bearer own")}, {"drop_credentials": True}):
        assert b"secret" not in [value for _, value in upstream_head(sent, request_id="r", **options)]
    assert (name, b"secret") in upstream_head(sent, request_id="r")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"7", 7.0),
        (b" 0 ", 0.0),
        (b"Thu, 26 Nov 2026 12:00:30 GMT", 30.0),
        (b"Thu, 26 Nov 2026 11:00:00 GMT", 0.0),
        (b"-1", None),
        (b"1.5", 1.5),
        (b"9" * 40, 999_999_999.0),
        (b"Thu Nov 26 12:00:30 2026", 30.0),
        (b"Thu, 26 Nov 2026 12:00:30 -0000", 30.0),
        (b"3s", None),
        (b"nan", None),
        (b"soon", None),
        (b"", None),
    ],
)
def test_a_retry_after_is_read_as_seconds_or_as_a_date(value: bytes, seconds: float | None) -> None:
    """A date in the past asks for no wait, and anything else is none."""
    noon = 1_795_694_400.0  # on 26 November 2026
    assert headers.retry_after_seconds(value, noon) == seconds


@pytest.mark.parametrize(
    ("pairs", "seconds"),
    [
        ([], None),
        ([(b"retry-after", b"7")], 7.0),
        ([(b"retry-after", b"7"), (b"retry-after", b"9")], 7.0),
        ([(b"retry-after", b"2"), (b"retry-after-ms", b"1500")], 1.5),
        ([(b"x-ms-retry-after-ms", b"250.5"), (b"retry-after", b"1")], 0.2505),
        ([(b"retry-after-ms", b"soon"), (b"retry-after", b"1")], 1.0),
    ],
)
def test_a_pause_is_read_from_every_header_that_names_one(pairs: list, seconds: float | None) -> None:
    """Milliseconds are more precise than the seconds beside them."""
    assert headers.pause_seconds(pairs, 0.0) == seconds


def test_no_cross_origin_grant_of_an_upstream_reaches_a_page() -> None:
    """Engines allow every origin by default; who may read responses is said in Cairn's configuration alone."""
    grants = ((b"access-control-allow-origin", b"*"), (b"access-control-allow-credentials", b"true"))
    assert response_head((*grants, (b"content-type", b"x")), request_id="i") == [
        (b"content-type", b"x"),
        (b"x-request-id", b"i"),
    ]


@pytest.mark.parametrize(
    ("cache", "miss", "text"),
    [
        (CacheStatus.HIT, MissReason.NONE, b"Cairn; hit"),
        (CacheStatus.PARTIAL, MissReason.NONE, b"Cairn; fwd=partial"),
        (CacheStatus.MISS, MissReason.COLD, b"Cairn; fwd=miss; detail=cold"),
        (CacheStatus.BYPASS, MissReason.SHORT, b"Cairn; fwd=bypass; detail=short"),
    ],
)
def test_each_status_of_the_cache_has_its_words(cache: CacheStatus, miss: MissReason, text: bytes) -> None:
    assert headers._cache_status(cache, miss) == text  # noqa: SLF001 - its table is made when it is imported


def test_times_are_left_out_where_they_could_show_what_others_do() -> None:
    described = cairn_headers(
        cache=CacheStatus.HIT,
        miss=MissReason.NONE,
        reason=RouteReason.WARM,
        replica="r",
        matched_tokens=1.0,
        times=None,
    )
    assert [name for name, _ in described] == [
        b"cache-status", b"x-cairn-replica", b"x-cairn-matched-tokens", b"x-cairn-reason",
    ]  # fmt: skip


def test_only_short_names_and_so_many_of_them_are_remembered() -> None:
    """The longest that is kept has 64 bytes, and the table 1,024 names."""
    table = headers._Verdicts(frozenset({b"x-secret"}), (b"x-own-",))  # noqa: SLF001 - a table that no other test fills
    assert [table[name] for name in (b"x_secret", b"x-secret", b"x-own-a", b"x-a")] == [False, False, False, True]
    assert (table[b"n" * 64], table[b"n" * 65]) == (True, True)
    assert (b"n" * 64 in table, b"n" * 65 in table) == (True, False)
    for number in range(2_000):
        assert table[b"x-%d" % number]
    assert len(table) == 1_024


def test_the_longest_request_id_that_is_kept_has_128_signs() -> None:
    assert kept_request_id([(b"x-request-id", b"x" * 128)]) == "x" * 128


def test_connection_lists_names_in_any_letter_case_over_all_its_headers() -> None:
    """Among the two words that are no names."""
    sent = [(b"x-a", b"1"), (b"x-b", b"1"), (b"x-c", b"1"), (b"connection", b"close, X-A")]
    assert upstream_head(sent, request_id="r") == ((b"x-b", b"1"), (b"x-c", b"1"), (b"x-request-id", b"r"))
    sent.append((b"connection", b"keep-alive , x-b"))
    assert upstream_head(sent, request_id="r") == ((b"x-c", b"1"), (b"x-request-id", b"r"))

"""Make the head of the request to an upstream, and the head of the response to the client. Pure.

Headers are (lower-case name, value) pairs of bytes; whether a name passes is computed once for each. Headers that
belong to one connection (RFC 9110, 7.6.1) are removed in both directions. Clients' `forwarded` and `x-forwarded-*`
are removed and none are set: engines have no use for them, and a forged one looks like a true one. Cookies are
removed in both directions, since a cookie that one upstream sets would be sent to another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

from proxy.errors import BadRequest, BadResponse
from proxy.model import CacheStatus, MissReason, RouteReason

Headers = tuple[tuple[bytes, bytes], ...]

REQUEST_ID_BYTES_MOST: Final = 128  # of a client's own id that is kept; a longer one is replaced

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
_FORWARDED = frozenset({b"forwarded", b"x-real-ip", b"true-client-ip", b"cf-connecting-ip", b"x-client-ip", b"via"})
KEY_HEADERS = frozenset(
    {
        b"authorization",
        b"x-api-key",
        b"api-key",
        b"x-goog-api-key",
        b"ocp-apim-subscription-key",
        b"x-litellm-api-key",
    }
)
"""Headers in which providers take keys."""

_CREDENTIALS = KEY_HEADERS | {b"openai-organization", b"openai-project", b"x-goog-user-project"}
"""The same, and headers that choose the account to be charged."""

_OVERRIDES = frozenset(
    {
        b"x-envoy-original-path",
        b"x-host",
        b"x-http-host-override",
        b"x-http-method",
        b"x-http-method-override",
        b"x-method-override",
        b"x-original-host",
        b"x-original-method",
        b"x-original-path",
        b"x-original-uri",
        b"x-original-url",
        b"x-override-url",
        b"x-request-uri",
        b"x-rewrite-url",
        b"x-waws-unencoded-url",
    }
)
"""Headers by which some servers replace the method, path or host of a request, which were checked here."""

_SET_ANEW = frozenset({b"host", b"content-length", b"expect", b"x-request-id"})
_NOT_FORWARDED = _HOP_BY_HOP | _FORWARDED | _OVERRIDES | _SET_ANEW | {b"cookie"}
_NOT_FORWARDED_WITH_KEY = _NOT_FORWARDED | _CREDENTIALS
_ABOUT_ORIGIN = frozenset(
    {
        b"alt-svc",
        b"clear-site-data",
        b"nel",
        b"report-to",
        b"reporting-endpoints",
        b"set-cookie",
        b"set-cookie2",
        b"strict-transport-security",
    }
)
"""Headers that a browser applies to the whole origin, which is Cairn's and not the upstream's."""

_FOR_FRONT_SERVERS = frozenset({b"x-accel-redirect", b"x-lighttpd-send-file", b"x-reproxy-url", b"x-sendfile"})
"""Headers by which nginx, lighttpd, Perlbal or Apache in front of Cairn would send a file of their own instead."""

_NOT_RETURNED = _HOP_BY_HOP | _ABOUT_ORIGIN | _FOR_FRONT_SERVERS | {b"x-request-id"}
CONTEXT_HEADER: Final = b"x-msh-context-cache"
_OWN_PREFIXES = (b"x-cairn-", b"x-forwarded-", CONTEXT_HEADER)  # set by Cairn, or easily forged: never passed on

_NUMBER = re.compile(r"[0-9]{1,40}(?:\.[0-9]{0,40})?")
_MILLISECONDS = frozenset({b"retry-after-ms", b"x-ms-retry-after-ms"})
_RETRY_AFTER_MOST_SECONDS: Final = 999_999_999.0  # whatever is longer means the same
_NUL: Final = 0
_LF: Final = 10
_CR: Final = 13
_NAMES_REMEMBERED: Final = 1024  # clients may make up names: the tables stop growing here
_NAME_BYTES_REMEMBERED: Final = 64
_NOTHING_LISTED = frozenset({b"keep-alive", b"close", b"Keep-Alive"})  # what most clients and servers send
_IDENTITY = (b"accept-encoding", b"identity")
_ID_SIGNS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:")


class _Verdicts(dict[bytes, bool]):
    """A table of which headers pass, by lower-case name; computed once for each name."""

    def __init__(self, removed: frozenset[bytes], prefixes: tuple[bytes, ...] = _OWN_PREFIXES) -> None:
        super().__init__()
        self._removed = removed
        self._prefixes = prefixes

    def __missing__(self, name: bytes) -> bool:
        alike = name.replace(b"_", b"-")  # which servers behind CGI or WSGI cannot tell apart
        passes = alike not in self._removed and not alike.startswith(self._prefixes)
        if len(self) < _NAMES_REMEMBERED and len(name) <= _NAME_BYTES_REMEMBERED:
            self[name] = passes
        return passes


_FORWARDS = _Verdicts(_NOT_FORWARDED)
_FORWARDS_BUT_KEYS = _Verdicts(_NOT_FORWARDED_WITH_KEY)
_RETURNS = _Verdicts(_NOT_RETURNED, (*_OWN_PREFIXES, b"access-control-"))  # `Cors` sets these


def upstream_head(
    headers: Sequence[tuple[bytes, bytes]],
    *,
    request_id: str,
    credential: tuple[bytes, bytes] | None = None,
    drop_credentials: bool = False,
    identity: bool = False,
    decoded: bool = False,
) -> Headers:
    """Return the head of the request to one upstream, without host and framing.

    Args:
        headers: the client's.
        request_id: sent as `x-request-id`.
        credential: the replica's own header, such as (b"authorization", b"Bearer ..."); it replaces every key of the
            client, and the client's choice of the account to be charged.
        drop_credentials: remove the client's keys without replacing them, because they are keys of Cairn.
        identity: ask for a response that is not compressed.
        decoded: the body was compressed and is sent decoded.

    Raises:
        BadRequest: a value contains a line break or NUL.
    """
    passes = _FORWARDS_BUT_KEYS if drop_credentials or credential is not None else _FORWARDS
    kept = [pair for pair in headers if passes[pair[0]]]
    if listed := [value for name, value in headers if name == b"connection"]:
        kept = _not_listed(kept, listed)
    if identity:
        kept = [pair for pair in kept if pair[0] != b"accept-encoding"]
        kept.append(_IDENTITY)
    if decoded:
        kept = [pair for pair in kept if pair[0] != b"content-encoding"]
    if credential is not None:
        kept.append(credential)
    kept.append((b"x-request-id", request_id.encode()))
    if _breaks_out(kept):
        raise BadRequest("a header contains a line break or NUL")
    return tuple(kept)


def response_head(
    headers: Sequence[tuple[bytes, bytes]],
    *,
    request_id: str,
    own: Iterable[tuple[bytes, bytes]] = (),
    keep_length: bool = True,
) -> list[tuple[bytes, bytes]]:
    """Return the head of the response to the client: the upstream's `headers` that pass, then Cairn's `own`.

    `own` comes from `cairn_headers`. `keep_length` is false if bytes may be withheld. Raises BadResponse if a
    value contains a line break or NUL.
    """
    kept = [pair for pair in headers if _RETURNS[pair[0]]]
    if listed := [value for name, value in headers if name == b"connection"]:
        kept = _not_listed(kept, listed)
    if not keep_length:
        kept = [pair for pair in kept if pair[0] != b"content-length"]
    kept.append((b"x-request-id", request_id.encode()))
    kept += own
    if _breaks_out(kept):
        raise BadResponse("a header of the response contains a line break or NUL")
    return kept


def cairn_headers(
    *,
    cache: CacheStatus,
    miss: MissReason,
    reason: RouteReason,
    replica: str,
    matched_tokens: float,
    times: tuple[float, float, float] | None,
) -> Headers:
    """Return the headers that describe the routing: `Cache-Status` (RFC 9211), `Server-Timing`, and `x-cairn-*`.

    `times` are the seconds of work in Cairn, of waiting in Cairn and at the upstream; None if they could show what
    other tenants do.
    """
    described = (
        (b"cache-status", _CACHE_STATUS[cache, miss]),
        (b"x-cairn-replica", replica.encode()),
        (b"x-cairn-matched-tokens", b"%d" % matched_tokens),
        (b"x-cairn-reason", _REASONS[reason]),
    )
    if times is None:
        return described
    own_seconds, waited_seconds, upstream_seconds = times
    waited = b"queue;dur=%.3f, " % (waited_seconds * 1e3) if waited_seconds else b""
    timing = b"cairn;dur=%.3f, %supstream;dur=%.3f" % (own_seconds * 1e3, waited, upstream_seconds * 1e3)
    return (*described, (b"server-timing", timing))


def names_context(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return True if the headers name the stored context that the messages repeat (`proxy.wire.contexts`)."""
    return any(name == CONTEXT_HEADER for name, _ in headers)


def kept_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the client's request id if it is short and has harmless characters only; None if one must be made."""
    for name, value in headers:
        if name == b"x-request-id":
            return value.decode() if 0 < len(value) <= REQUEST_ID_BYTES_MOST and _ID_SIGNS.issuperset(value) else None
    return None


def retry_after_seconds(value: bytes, now_unix_seconds: float) -> float | None:
    """Return the seconds of a `retry-after` value, a number or a date (RFC 9110, 10.2.3); None if it is neither.

    Fractions, which providers send and SDKs read, are allowed too.
    """
    text = value.decode("latin-1").strip()
    if _NUMBER.fullmatch(text):
        return min(float(text), _RETRY_AFTER_MOST_SECONDS)
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # the obsolete format of asctime, or -0000
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - now_unix_seconds)
    except (ValueError, OverflowError):
        return None


def pause_seconds(headers: Iterable[tuple[bytes, bytes]], now_unix_seconds: float) -> float | None:
    """Return the seconds for which a refusal asks its client to wait; None if it does not say.

    `retry-after-ms` and Azure's `x-ms-retry-after-ms` are more precise than `retry-after`, which may come with them.
    """
    asked: float | None = None
    for name, value in headers:
        if name == b"retry-after":
            seconds = retry_after_seconds(value, now_unix_seconds)
            asked = seconds if asked is None else asked
        elif name in _MILLISECONDS and _NUMBER.fullmatch(text := value.decode("latin-1").strip()):
            return min(float(text) / 1000, _RETRY_AFTER_MOST_SECONDS)
    return asked


def _cache_status(cache: CacheStatus, miss: MissReason) -> bytes:
    """Return the value of `Cache-Status`. RFC 9211 has no term for a partly cached prompt: it is `fwd=partial`."""
    text = {
        CacheStatus.HIT: "Cairn; hit",
        CacheStatus.PARTIAL: "Cairn; fwd=partial",
        CacheStatus.MISS: "Cairn; fwd=miss",
        CacheStatus.BYPASS: "Cairn; fwd=bypass",
    }[cache]
    return (text if miss is MissReason.NONE else f"{text}; detail={miss.value}").encode()


_CACHE_STATUS = {(cache, miss): _cache_status(cache, miss) for cache in CacheStatus for miss in MissReason}
_REASONS = {reason: reason.value.encode() for reason in RouteReason}


def _not_listed(headers: list[tuple[bytes, bytes]], listed: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return `headers` without those that a `connection` header lists."""
    if len(listed) == 1 and listed[0] in _NOTHING_LISTED:
        return headers
    names = {name.strip().lower() for name in b",".join(listed).split(b",")} - {b"close", b"keep-alive", b""}
    return [pair for pair in headers if pair[0] not in names] if names else headers


def _breaks_out(headers: list[tuple[bytes, bytes]]) -> bool:
    text = b"".join([value for _, value in headers])
    return _LF in text or _CR in text or _NUL in text  # numbers: with bytes, Python raises an error internally

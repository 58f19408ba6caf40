"""The head of the request that goes to an upstream, and of the answer that goes back to the client.

Pure, over lists of (lower-case name, value) pairs of bytes, in one pass with set look-ups. What belongs to one
connection only (RFC 9110, 7.6.1) ends here, both ways. Clients' `forwarded` and `x-forwarded-*` are stripped and none
are set: an engine has no use for them, and a spoofed one cannot be told from a true one. Cookies are stripped both
ways, since what one upstream sets would be sent to another.
"""

from __future__ import annotations

from collections.abc import Iterable
from email.utils import parsedate_to_datetime

from proxy.errors import BadAnswer, BadRequest
from proxy.model import CacheStatus, MissReason, RouteReason

Headers = tuple[tuple[bytes, bytes], ...]

REQUEST_ID_BYTES_MOST = 128  # a client's own id is kept up to this length; longer ones are replaced

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
_CREDENTIALS = frozenset({b"authorization", b"x-api-key", b"api-key"})
_SET_ANEW = frozenset({b"host", b"content-length", b"expect", b"x-request-id"})
_NOT_FORWARDED = _HOP_BY_HOP | _FORWARDED | _SET_ANEW | {b"cookie"}
_NOT_FORWARDED_WITH_KEY = _NOT_FORWARDED | _CREDENTIALS
_NOT_RETURNED = _HOP_BY_HOP | {b"x-request-id", b"set-cookie", b"alt-svc", b"strict-transport-security"}
_OWN_PREFIXES = (b"x-cairn-", b"x-forwarded-", b"x-msh-context-cache")  # ours, or spoofable: never passed on

_NOTHING_LISTED = frozenset({b"keep-alive", b"close", b"Keep-Alive"})  # what most clients and servers say
_IDENTITY = (b"accept-encoding", b"identity")
_ID_SIGNS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:")


def upstream_head(
    headers: Iterable[tuple[bytes, bytes]],
    *,
    host: bytes,
    request_id: str,
    length: int | None,
    credential: tuple[bytes, bytes] | None = None,
    drop_credentials: bool = False,
    identity: bool = False,
) -> Headers:
    """The request head for one upstream.

    `headers` are the client's, `host` the upstream's authority, `length` that of the body as it will be sent (None
    where it is streamed or there is none). `credential` is the replica's own header, such as
    (b"authorization", b"Bearer ..."), and replaces every key of the client; `drop_credentials` leaves those out with
    nothing in their place, where they are Cairn's own. `identity` asks for an answer that is not compressed. Raises
    BadRequest where a value could break out of its line.
    """
    dropped = _NOT_FORWARDED_WITH_KEY if drop_credentials or credential is not None else _NOT_FORWARDED
    kept = [(b"host", host)]
    listed: list[bytes] = []
    for pair in headers:
        name = pair[0]
        if name in dropped:
            if name == b"connection":
                listed.append(pair[1])
        elif name[:2] != b"x-" or not name.startswith(_OWN_PREFIXES):
            kept.append(pair)
    if listed:
        kept = [kept[0], *_not_listed(kept[1:], listed)]
    if identity:
        kept = [pair for pair in kept if pair[0] != b"accept-encoding"]
        kept.append(_IDENTITY)
    if credential is not None:
        kept.append(credential)
    kept.append((b"x-request-id", request_id.encode()))
    if length is not None:
        kept.append((b"content-length", b"%d" % length))
    if _breaks_out(kept):
        raise BadRequest("a header holds a line break or NUL")
    return tuple(kept)


def answer_head(
    headers: Iterable[tuple[bytes, bytes]],
    *,
    request_id: str,
    own: Iterable[tuple[bytes, bytes]] = (),
    keep_length: bool = True,
) -> list[tuple[bytes, bytes]]:
    """The answer head for the client: the upstream's `headers`, less what ends here, then ours.

    `own` comes from `cairn_headers`. `keep_length` is false where bytes may be withheld. Raises BadAnswer where a
    value could break out of its line.
    """
    kept: list[tuple[bytes, bytes]] = []
    listed: list[bytes] = []
    for pair in headers:
        name = pair[0]
        if name == b"connection":
            listed.append(pair[1])
        elif name not in _NOT_RETURNED and (name[:2] != b"x-" or not name.startswith(_OWN_PREFIXES)):
            kept.append(pair)
    if listed:
        kept = _not_listed(kept, listed)
    if not keep_length:
        kept = [pair for pair in kept if pair[0] != b"content-length"]
    kept.append((b"x-request-id", request_id.encode()))
    kept += own
    if _breaks_out(kept):
        raise BadAnswer("a header of the answer holds a line break or NUL")
    return kept


def cairn_headers(
    *,
    cache: CacheStatus,
    miss: MissReason,
    reason: RouteReason,
    replica: str,
    matched_tokens: float,
    overhead_seconds: float,
    upstream_seconds: float,
) -> Headers:
    """What Cairn tells of its decision: `Cache-Status` (RFC 9211), `Server-Timing`, and `x-cairn-*`."""
    return (
        (b"cache-status", _CACHE_STATUS[cache, miss]),
        (b"server-timing", b"cairn;dur=%.3f, upstream;dur=%.3f" % (overhead_seconds * 1e3, upstream_seconds * 1e3)),
        (b"x-cairn-replica", replica.encode()),
        (b"x-cairn-matched-tokens", b"%d" % matched_tokens),
        (b"x-cairn-reason", _REASONS[reason]),
    )


def kept_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The client's own request id, where it is short and made of harmless signs; else None, and one is made."""
    for name, value in headers:
        if name == b"x-request-id":
            return value.decode() if 0 < len(value) <= REQUEST_ID_BYTES_MOST and _ID_SIGNS.issuperset(value) else None
    return None


def retry_after_seconds(value: bytes, now_unix_seconds: float) -> float | None:
    """Seconds from a `retry-after` value, a number or a date (RFC 9110, 10.2.3); None where it is neither."""
    text = value.decode("latin-1").strip()
    if text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now_unix_seconds)
    except (ValueError, OverflowError):
        return None


def _cache_status(cache: CacheStatus, miss: MissReason) -> bytes:
    """RFC 9211 knows no half-computed prompts: a hit is a prefix that spares the prefill, a part is `fwd=partial`."""
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
    """Without those that a `connection` header names."""
    if len(listed) == 1 and listed[0] in _NOTHING_LISTED:
        return headers
    names = {name.strip().lower() for name in b",".join(listed).split(b",")} - {b"close", b"keep-alive", b""}
    return [pair for pair in headers if pair[0] not in names] if names else headers


def _breaks_out(headers: list[tuple[bytes, bytes]]) -> bool:
    text = b"".join([value for _, value in headers])
    return b"\n" in text or b"\r" in text or b"\0" in text

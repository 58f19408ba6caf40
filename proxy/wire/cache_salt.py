"""Salt the prefix cache of an engine by tenant: the field `cache_salt` of a body. Pure."""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from proxy.model import Body, Edit
from proxy.wire.schemas import DECODE_ERRORS, NONE
from proxy.wire.spans import span_of

_NAME: Final = b"cache_salt"
_ESCAPE: Final = b"\\u00"  # an escape could hide a letter of the name


class _Salted(msgspec.Struct, gc=False):
    cache_salt: Raw = NONE


_decode = msgspec.json.Decoder(_Salted).decode


def salted_by(body: Body, salt: bytes) -> Edit:
    """Return the edit by which nothing that is cached for this prompt is found with another `salt`.

    The client may have a salt of its own, to keep its users apart: `salt` precedes it. Beside a second member of that
    name the engine would use the client's, which other tenants may have chosen too.

    Args:
        body: a JSON object.
        salt: letters and digits.
    """
    own = _own_salt(body)
    if own is NONE:
        at = body.index(b"{") + 1
        return Edit(at, at, b'"cache_salt":"%b",' % salt)
    start, end = span_of(body, own)
    if memoryview(own)[0] == ord('"'):
        return Edit(start + 1, start + 1, salt + b"-")
    return Edit(start, end, b'"%b"' % salt)


def _own_salt(body: Body) -> Raw:
    if body.find(_NAME) < 0 and body.find(_ESCAPE) < 0:
        return NONE
    try:
        return _decode(body).cache_salt
    except DECODE_ERRORS:
        return NONE

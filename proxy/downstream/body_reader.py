"""Read the body of a request, whole or piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from copy import copy

from proxy.downstream.chunks import Buffer
from proxy.downstream.request import IncomingRequest
from proxy.errors import TooLarge


async def read_body(request: IncomingRequest, limit_bytes: int, limit_seconds: float) -> Buffer:
    """Return the whole body of `request`, which nothing else refers to.

    Raises:
        TooLarge: it is, or is declared to be, longer than `limit_bytes`; no more than that is ever kept.
        RequestTimeout: it did not arrive within `limit_seconds`, or came too slowly.
        ProtocolError: its framing is broken.
        Overloaded: the bodies of all requests together have no room for it.
    """
    body = body_at_hand(request, limit_bytes)
    if request.body is not None:
        return await request.body.read(limit_bytes, limit_seconds)
    return body or b""


def body_at_hand(request: IncomingRequest, limit_bytes: int) -> bytes | None:
    """Return the whole body of `request` if it came together with the head, None if it must be awaited.

    Raises:
        TooLarge: it is, or is declared to be, longer than `limit_bytes`.
        Overloaded: the bodies of all requests together have no room for it.
    """
    length = request.content_length
    if length is not None and length > limit_bytes:
        raise TooLarge(f"The body has {length} bytes; at most {limit_bytes} are read.")
    if request.refusal is not None:
        raise copy(request.refusal)
    return request.whole_body if request.body is None else None


def stream_body(request: IncomingRequest, idle_seconds: float) -> AsyncIterator[bytes]:
    """Return the body piece by piece, as it arrives; at most `AHEAD_BYTES` and one read are in memory.

    The iterator raises:
        RequestTimeout: nothing arrived for `idle_seconds`.
        ProtocolError: its framing is broken.
        Overloaded: the bodies of all requests together have no room for it.
    """
    if request.body is not None:
        request.body.begin_stream(idle_seconds)
    return _Pieces(request)


class _Pieces:
    """The iterator of `stream_body`; a class, since a generator would have to be closed."""

    def __init__(self, request: IncomingRequest) -> None:
        self._whole = request.whole_body
        self._body = request.body

    def __aiter__(self) -> _Pieces:
        return self

    async def __anext__(self) -> bytes:
        piece, self._whole = self._whole, b""
        if not piece and self._body is not None:
            piece = await self._body.next_piece()
        if not piece:
            raise StopAsyncIteration
        return piece

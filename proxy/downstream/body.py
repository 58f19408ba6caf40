"""The bodies of clients, on aiohttp's low-level server: read whole within limits, or handed on as they come.

It must not know answers, replicas or JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from aiohttp import HttpVersion, StreamReader, web

from proxy.downstream.body_ahead import BodyAhead
from proxy.downstream.long_body import LONG_BYTES, late, receive
from proxy.errors import BadRequest, RequestTimeout, TooLarge

_UNDECLARED_CHUNK_BYTES = 1024 * 1024  # how much of a body of unknown length may wait in aiohttp's buffer


class IncomingRequest(Protocol):
    """What is asked of a request: its parsed head, and its body as it comes."""

    @property
    def method(self) -> str: ...
    @property
    def raw_path(self) -> str: ...
    @property
    def version(self) -> HttpVersion: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def raw_headers(self) -> tuple[tuple[bytes, bytes], ...]: ...
    @property
    def keep_alive(self) -> bool: ...
    @property
    def content_length(self) -> int | None: ...
    @property
    def body_exists(self) -> bool: ...
    @property
    def content(self) -> StreamReader: ...
    @property
    def protocol(self) -> web.RequestHandler: ...


async def read_body(request: IncomingRequest, limit_bytes: int, limit_seconds: float) -> bytes | bytearray:
    """The whole body; nobody else holds it.

    Raises:
        TooLarge: it is, or says that it is, over `limit_bytes`; no more than that is ever held.
        RequestTimeout: it did not arrive within `limit_seconds`.
        BadRequest: its framing is broken.
    """
    length = request.content_length
    if length is not None and length > limit_bytes:
        raise TooLarge(f"The body has {length} bytes; at most {limit_bytes} are read.")
    content = request.content
    if content.is_eof() and not content.exception():
        return _within(content.read_nowait(), limit_bytes)
    protocol = request.protocol
    if length is not None and isinstance(protocol, BodyAhead):
        here_bytes = protocol.ahead_bytes
        if here_bytes >= length:
            return protocol.take_whole(content, length)
        if length - here_bytes - content.total_bytes >= LONG_BYTES:
            return await receive(content, protocol, length, limit_seconds)
        protocol.give_back_ahead()
    # one wake-up for many reads from the socket: a long body otherwise costs a pause and a resume for each 128 KB
    content.set_read_chunk_size(_UNDECLARED_CHUNK_BYTES if length is None else length)
    pieces: list[bytes] = []
    size_bytes = 0
    # a bare timer: `asyncio.timeout` costs four times as much, for a scope that nothing here needs
    timer = asyncio.get_running_loop().call_later(limit_seconds, _too_slow, content, limit_seconds)
    try:
        while piece := await content.readany():
            pieces.append(piece)
            size_bytes += len(piece)
            if size_bytes > limit_bytes:
                raise TooLarge(f"The body has more than {limit_bytes} bytes, the most that is read.")
    except web.RequestPayloadError:
        raise BadRequest("The framing of the body is broken.") from None
    finally:
        timer.cancel()
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _too_slow(content: StreamReader, limit_seconds: float) -> None:
    content.set_exception(late(limit_seconds))


def _within(body: bytes, limit_bytes: int) -> bytes:
    if len(body) > limit_bytes:
        raise TooLarge(f"The body has {len(body)} bytes; at most {limit_bytes} are read.")
    return body


def stream_body(request: IncomingRequest, idle_seconds: float) -> AsyncIterator[bytes]:
    """The body piece by piece, for what is passed through; memory holds some 128 KB of it.

    The iterator raises:
        RequestTimeout: nothing came for `idle_seconds`.
        BadRequest: its framing is broken.
    """
    if isinstance(request.protocol, BodyAhead):
        request.protocol.give_back_ahead()
    return _Pieces(request.content, idle_seconds)


class _Pieces:
    """See `stream_body`. A class and no generator, since nobody has to close it."""

    def __init__(self, content: StreamReader, idle_seconds: float) -> None:
        self._content = content
        self._idle_seconds = idle_seconds

    def __aiter__(self) -> _Pieces:
        return self

    async def __anext__(self) -> bytes:
        try:
            async with asyncio.timeout(self._idle_seconds):
                piece = await self._content.readany()
        except TimeoutError:
            raise RequestTimeout(f"Nothing of the body came for {self._idle_seconds:g} seconds.") from None
        except web.RequestPayloadError:
            raise BadRequest("The framing of the body is broken.") from None
        if not piece:
            raise StopAsyncIteration
        return piece

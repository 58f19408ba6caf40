"""Bodies of clients over real sockets: whole, cut, too long, too slow."""

from __future__ import annotations

import asyncio

from proxy.downstream.body_reader import read_body, stream_body
from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse
from proxy.errors import CairnError, RequestTimeout, TooLarge
from tests.support.answering import serving, talk


async def read_by(limit_bytes: int, limit_seconds: float, *pieces: bytes) -> object:
    """Return what `read_body` returns or raises for a raw request."""
    outcome: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        try:
            outcome.set_result(await read_body(request, limit_bytes, limit_seconds))
        except CairnError as error:
            outcome.set_result(error)
        answer.send(200, b"OK", [], b"")

    async with serving(play) as port:
        asked = asyncio.get_running_loop().create_task(talk(port, *pieces))
        async with asyncio.timeout(20):
            result = await outcome
        asked.cancel()
        return result


HEAD = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"


async def test_a_body_is_read_whole_however_it_is_cut() -> None:
    """Declared and chunked, in one piece and in many."""
    assert await read_by(99, 1, HEAD + b"content-length: 6\r\n\r\n", b"abc", b"def") == b"abcdef"
    chunks = b"3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"
    assert await read_by(99, 1, HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks) == b"abcdef"
    assert await read_by(99, 1, HEAD + b"content-length: 0\r\n\r\n") == b""


async def test_a_body_over_the_limit_is_refused() -> None:
    """By its declared length before a byte of it, by its chunks as soon as they exceed it."""
    declared = await read_by(5, 1, HEAD + b"content-length: 6\r\n\r\n")
    assert isinstance(declared, TooLarge)
    assert declared.message == "The body has 6 bytes; at most 5 are read."
    chunked = await read_by(5, 1, HEAD + b"transfer-encoding: chunked\r\n\r\n6\r\nabcdef\r\n")
    assert isinstance(chunked, TooLarge)
    assert chunked.message == "The body has more than 5 bytes, the most that is read."
    assert await read_by(5, 1, HEAD + b"content-length: 5\r\n\r\nabcde") == b"abcde"


async def test_a_body_that_does_not_come_is_a_408() -> None:
    """The limit is of time, too."""
    late = await read_by(99, 0.02, HEAD + b"content-length: 6\r\n\r\nabc")
    assert isinstance(late, RequestTimeout)
    assert (late.status, late.message) == (408, "The body of the request did not arrive in time.")


async def test_a_body_is_passed_through_piece_by_piece() -> None:
    """Nothing is gathered, and a stall is noticed."""
    outcome: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        got = b""
        try:
            async for piece in stream_body(request, 0.05):
                got += piece
        except RequestTimeout as error:
            outcome.set_result((got, error.status))
        answer.send(200, b"OK", [], b"")

    async with serving(play) as port:
        asked = asyncio.get_running_loop().create_task(talk(port, HEAD + b"content-length: 6\r\n\r\n", b"abc"))
        async with asyncio.timeout(20):
            assert await outcome == (b"abc", 408)
        asked.cancel()

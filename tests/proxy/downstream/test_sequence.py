"""Requests in sequence: whatever one of them says, the next on its connection is read as if it were the first."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.downstream.body_reader import read_body
from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse
from tests.proxy.downstream.test_cuts import Line
from tests.support.answering import client_server

METHODS = (
    b"GET",
    b"POST",
    b"HEAD",
    b"PUT",
    b"PATCH",
    b"DELETE",
    b"OPTIONS",
    b"TRACE",
    b"PROPFIND",
    b"SOURCE",
    b"M-SEARCH",
)
HEADERS = (
    b"connection: keep-alive", b"connection: upgrade", b"connection: x, close-not", b"connection: te",
    b"proxy-connection: close", b"proxy-connection: upgrade", b"proxy-connection: keep-alive",
    b"upgrade: h2c", b"upgrade: websocket", b"upgrade: x", b"te: trailers", b"trailer: x", b"keep-alive: 5",
    b"http2-settings: AAMAAABk", b"content-type: a", b"expect: 100-continue", b"x-empty:", b"content-encoding: gzip",
)  # fmt: skip
BODIES = (b"", b"content-length: 0\r\n\r\n", b"content-length: 3\r\n\r\nabc",
          b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")  # fmt: skip
REQUEST = st.tuples(
    st.sampled_from(METHODS), st.sampled_from((b"1.1", b"1.0")), st.lists(st.sampled_from(HEADERS), max_size=4),
    st.sampled_from(BODIES),
)  # fmt: skip


def message(method: bytes, version: bytes, headers: list[bytes], body: bytes) -> bytes:
    """A request that is valid and keeps its connection."""
    if version == b"1.0":
        headers = [*headers, b"connection: keep-alive"]
        body = b"" if body.startswith(b"transfer") else body
    lines = [b"%b /a HTTP/%b" % (method, version), b"host: x", *headers]
    return b"\r\n".join(lines) + b"\r\n" + (body or b"\r\n")


async def served(sent: bytes) -> list[str]:
    """The methods of the requests that a connection reads."""
    seen: list[str] = []

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        await read_body(asked, 100, 1.0)
        seen.append(asked.method)
        answer.send(200, b"OK", [], b"")

    server = client_server(play)
    line, connection = Line(), server.connect()
    connection.connection_made(line)
    connection.get_buffer(-1)[: len(sent)] = sent
    connection.buffer_updated(len(sent))
    before = -1
    while before != len(seen):
        before = len(seen)
        for _ in range(5):
            await asyncio.sleep(0)
    connection.connection_lost(None)
    await server.close()
    return seen


@settings(max_examples=300, deadline=None)
@given(st.lists(REQUEST, min_size=1, max_size=4))
def test_no_request_changes_how_the_next_is_read(
    requests: list[tuple[bytes, bytes, list[bytes], bytes]],
) -> None:
    """One parser reads many heads, and it has opinions on connections of its own."""
    sent = b"".join(message(*request) for request in requests)
    assert asyncio.run(served(sent)) == [method.decode() for method, *_ in requests]

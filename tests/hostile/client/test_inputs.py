"""Hostile input over raw sockets: what is served, what is answered, and whether the connection is in step."""

from __future__ import annotations

import asyncio
import re

import pytest

from proxy.downstream.body_reader import read_body
from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse
from proxy.errors import REASON_PHRASES, CairnError
from tests.hostile.client.inputs import (
    BODY_BYTES_MOST,
    CASES,
    HEAD_BYTES_MOST,
    LINE_BYTES_MOST,
    NEXT,
    Case,
)
from tests.support.answering import client_server, served_by
from tests.support.valkey import eventually

ANSWER = re.compile(
    rb"HTTP/1\.1 (\d{3}) [^\r\n]+\r\n(?:[^\r\n]+\r\n)*?content-length: (\d+)\r\n(?:[^\r\n]+\r\n)*\r\n"
)
LATE_SECONDS = 0.15
PATIENT_SECONDS = 10.0  # beyond any pause of the machine


class Served:
    """The requests that reached the handler."""

    def __init__(self, body_seconds: float) -> None:
        self.requests: list[bytes] = []
        self._body_seconds = body_seconds

    async def play(self, request: IncomingRequest, answer: ClientResponse) -> None:
        try:
            body = await read_body(request, BODY_BYTES_MOST, self._body_seconds)
        except CairnError as error:
            answer.send(error.status, REASON_PHRASES[error.status], [], error.message.encode())
            return
        self.requests.append(b"%b %b " % (request.method.encode(), request.target.encode()) + bytes(body))
        answer.send(200, b"OK", [], b"served")


class Line:
    """A client's connection, which reads answers strictly."""

    def __init__(self, reader: asyncio.StreamReader, case: Case) -> None:
        self._reader = reader
        self._is_head = any(request.startswith(b"HEAD") for request in case.served)
        self.output = b""

    async def status(self) -> int | None:
        """The status of the next answer; None at the end. Nothing but an answer may come."""
        while (found := ANSWER.match(self.output)) is None or len(self.output) < self._end(found):
            piece = await self._reader.read(65_536)
            if not piece:
                assert self.output == b"", f"half an answer: {self.output!r}"
                return None
            self.output += piece
        self.output = self.output[self._end(found) :]
        return int(found[1])

    def _end(self, found: re.Match[bytes]) -> int:
        return found.end() + (0 if self._is_head else int(found[2]))


@pytest.mark.parametrize("name", CASES)
async def test_hostile_input_is_served_or_refused_as_it_must_be(name: str) -> None:
    """No other request reaches the handler, nothing but whole answers comes back, and nothing is left behind."""
    case = CASES[name]
    ends_by_time = 408 in case.statuses or (case.ends and not case.statuses)
    seconds = LATE_SECONDS if ends_by_time else PATIENT_SECONDS
    served = Served(seconds)
    server = client_server(
        served.play,
        head_bytes=HEAD_BYTES_MOST,
        header_line_bytes=LINE_BYTES_MOST,
        body_bytes=BODY_BYTES_MOST,
        head_seconds=seconds,
        keepalive_seconds=2 * seconds,
        linger_seconds=PATIENT_SECONDS,
    )
    async with served_by(server) as port, asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        line = Line(reader, case)
        sending = asyncio.get_running_loop().create_task(send(writer, case))
        statuses = [await line.status() for _ in case.statuses]
        assert statuses == list(case.statuses)
        await sending
        if case.leaves or case.ends:
            assert await line.status() is None
        else:
            writer.write(NEXT)
            assert await line.status() == 200
            assert served.requests.pop() == b"GET /next "
        assert served.requests == list(case.served)
        writer.close()
        await eventually(lambda: not len(server))
        assert (server.heads.used, server.bodies.used) == (0, 0)


async def send(writer: asyncio.StreamWriter, case: Case) -> None:
    """Send the pieces, each once the server had its turn; the server may have closed before the last."""
    try:
        for piece in case.pieces:
            writer.write(piece)
            await writer.drain()
            for _ in range(3):
                await asyncio.sleep(0)
        if case.leaves:
            writer.write_eof()
    except ConnectionError:
        pass


def test_the_cases_are_as_many_as_they_are_said_to_be() -> None:
    """No name is used twice in two groups, which would hide a case."""
    assert len(CASES) >= 200

"""The clients' behaviour in the soak: whole requests, streams, leaving at each stage, upstreams that reset.

Each visit ends with one word; `ALLOWED` lists the words that are right for it.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections import Counter
from collections.abc import Mapping

from benchmarks.common import bodies
from benchmarks.common.upstream import Wish

_PATH = "/v1/chat/completions"
_HANG_SECONDS = 60.0
_LEAVE_SECONDS = 0.03  # at the most, before a client leaves
_CONVERSATIONS = 200  # distinct bodies per shape: what the proxy remembers is then bounded, so memory must be flat
_ENDS_STREAM = b"data: [DONE]\n\n"


class Visit(enum.StrEnum):
    """One client of the soak."""

    PLAIN = "plain"
    STREAM = "stream"
    CLOSE_AFTER = "upstream closes after it"
    RESET_BEFORE = "upstream resets before"
    RESET_MID_PLAIN = "upstream resets within"
    RESET_MID_STREAM = "upstream resets a stream"
    LEAVE_SENDING = "client leaves while sending"
    LEAVE_WAITING = "client leaves while waiting"
    LEAVE_STREAM = "client leaves a stream"


SHARES: Mapping[Visit, int] = {
    Visit.PLAIN: 58,
    Visit.STREAM: 22,
    Visit.CLOSE_AFTER: 4,
    Visit.RESET_BEFORE: 1,
    Visit.RESET_MID_PLAIN: 1,
    Visit.RESET_MID_STREAM: 2,
    Visit.LEAVE_SENDING: 3,
    Visit.LEAVE_WAITING: 4,
    Visit.LEAVE_STREAM: 5,
}

WHOLE, BROKEN, LEFT, REFUSED = "whole", "broken", "left", "status 503"

ALLOWED: Mapping[Visit, frozenset[str]] = {
    Visit.PLAIN: frozenset({WHOLE}),
    Visit.STREAM: frozenset({WHOLE}),
    Visit.CLOSE_AFTER: frozenset({WHOLE}),
    Visit.RESET_BEFORE: frozenset({"status 502"}),
    Visit.RESET_MID_PLAIN: frozenset({BROKEN, "status 502"}),
    Visit.RESET_MID_STREAM: frozenset({BROKEN}),
    Visit.LEAVE_SENDING: frozenset({LEFT}),
    Visit.LEAVE_WAITING: frozenset({LEFT}),
    Visit.LEAVE_STREAM: frozenset({LEFT}),
}

_WISHES = {
    Visit.CLOSE_AFTER: Wish.CLOSE_AFTER,
    Visit.RESET_BEFORE: Wish.RESET_BEFORE,
    Visit.RESET_MID_PLAIN: Wish.RESET_MID,
    Visit.RESET_MID_STREAM: Wish.RESET_MID,
    Visit.LEAVE_WAITING: Wish.SLOW,
}
_STREAMS = frozenset({Visit.STREAM, Visit.RESET_MID_STREAM, Visit.LEAVE_STREAM})
_SIZES = (600, 1024, 4096, 20_000, 64 << 10)


class Request:
    """Head and body of one shape, stamped anew for each use."""

    def __init__(self, visit: Visit, size_bytes: int) -> None:
        shape = bodies.Shape(size_bytes, stream=visit in _STREAMS, wish=_WISHES.get(visit, Wish.BENCH))
        content, offset = bodies.body(shape)
        head = bodies.request_head(_PATH, size_bytes)
        self._buffer = bytearray(head) + content
        self._offset = offset + len(head)

    def bytes(self, conversation: int) -> bytes:
        """Return the whole request."""
        bodies.stamp(self._buffer, self._offset, conversation)
        return bytes(self._buffer)


class Visitors:
    """Clients that visit one port until a number of requests is used up; tallies (visit, word)."""

    def __init__(self, port: int, seed: int) -> None:
        self.tally: Counter[tuple[Visit, str]] = Counter()
        self._port = port
        self._chooser = random.Random(seed)
        self._requests = {(visit, size): Request(visit, size) for visit in Visit for size in _SIZES}
        self._left = 0

    async def visit(self, requests: int, clients: int) -> None:
        """Make a number of requests with a number of concurrent clients."""
        self._left = requests
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client())

    async def _client(self) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while self._left > 0:
            self._left -= 1
            visit = self._chooser.choices(list(SHARES), list(SHARES.values()))[0]
            request = self._requests[visit, self._chooser.choice(_SIZES)]
            if connection is None:
                connection = await asyncio.open_connection("127.0.0.1", self._port)
            word, keep = await self._one(visit, request.bytes(self._chooser.randrange(_CONVERSATIONS)), *connection)
            self.tally[visit, word] += 1
            if not keep:
                connection[1].transport.abort() if self._chooser.random() < 0.5 else connection[1].close()
                connection = None
        if connection is not None:
            connection[1].close()

    async def _one(
        self, visit: Visit, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[str, bool]:
        try:
            async with asyncio.timeout(_HANG_SECONDS):
                if visit is Visit.LEAVE_SENDING:
                    writer.write(request[: len(request) // 2])
                    return await self._linger()
                writer.write(request)
                if visit is Visit.LEAVE_WAITING:
                    return await self._linger()
                if visit is Visit.LEAVE_STREAM:
                    await reader.readuntil(b"\r\n\r\n")
                    await reader.readline()
                    return await self._linger()
                return await read_response(reader, visit in _STREAMS)
        except TimeoutError:
            return "hung", False
        except (OSError, asyncio.IncompleteReadError):
            return BROKEN, False

    async def _linger(self) -> tuple[str, bool]:
        await asyncio.sleep(self._chooser.random() * _LEAVE_SECONDS)
        return LEFT, False


async def read_response(reader: asyncio.StreamReader, stream: bool) -> tuple[str, bool]:
    """Return the result in one word, and whether the connection may be reused.

    Raises asyncio.IncompleteReadError or OSError if the response is cut off.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" in head:
        body = await _read_chunked(reader)
    else:
        body = await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
    keep = b"connection: close" not in head
    if status != 200:
        return f"status {status}", keep
    right = body.endswith(_ENDS_STREAM) if stream else body.startswith(b"{") and body.endswith(b"}")
    return (WHOLE if right else "cut short"), keep


async def _read_chunked(reader: asyncio.StreamReader) -> bytes:
    pieces: list[bytes] = []
    while True:
        line = await reader.readuntil(b"\r\n")
        piece = await reader.readexactly(int(line, 16) + 2)
        if len(piece) == 2:
            return b"".join(pieces)
        pieces.append(piece[:-2])


def wrong(tally: Mapping[tuple[Visit, str], int], refused_share: float) -> dict[str, int]:
    """Return the visits that ended wrongly. A small share of refusals (503, a back-off after resets) is allowed."""
    found = {
        f"{visit}: {word}": count
        for (visit, word), count in tally.items()
        if word not in ALLOWED[visit] and word != REFUSED
    }
    refused = sum(count for (_, word), count in tally.items() if word == REFUSED)
    if refused > refused_share * sum(tally.values()):
        found["refused with 503"] = refused
    return found

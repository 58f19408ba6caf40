"""Clients that never stop asking, plain and streamed, and compare every byte of every answer.

They behave as SDKs do: connections are kept most of the time, a refused connection is tried again, and a request that
was sent is never sent twice.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from proxy.clock import SystemClock
from tests.chaos import dialogue
from tests.chaos.dialogue import Ask

CLOCK = SystemClock()
LIMIT_SECONDS = 20.0  # an answer that takes longer is lost
CONNECT_LIMIT_SECONDS = 30.0
_RETRY_SECONDS = 0.05
_PAUSE_SECONDS = (0.02, 0.14)  # between two requests of a client
_KEPT_SHARE = 0.7  # of the connections after an answer
_CONVERSATIONS = 24


class End(enum.StrEnum):
    """How a request ended, as its client sees it."""

    RIGHT = "right"
    WRONG = "wrong"  # whole, with other bytes than the replica's
    REFUSED = "refused"  # an error of Cairn's own, before any byte of an answer
    CUT = "cut"  # began and broke off, as told by the framing or by an error event
    BROKEN = "broken"  # the connection ended before the answer began
    HUNG = "hung"


class Record(NamedTuple):
    """One request. Times are monotonic seconds; `port` is the client's end of the connection."""

    end: End
    started: float
    ended: float
    port: int
    proxy: int
    replica: str
    ask: Ask
    detail: str = ""


class Response(NamedTuple):
    """A response as it was received; `whole` is False if the framing says that something is missing."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool


class Connection:
    """One connection to a proxy."""

    def __init__(self, proxy: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.port: int = writer.get_extra_info("sockname")[1]
        self._reader, self._writer = reader, writer

    @property
    def usable(self) -> bool:
        """False once the proxy has closed it."""
        return not (self._reader.at_eof() or self._writer.is_closing())

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()

    async def post(self, body: bytes, path: str = dialogue.PATH) -> Response:
        """Send one request and read the response to its end. Raises OSError or EOFError if none begins."""
        head = f"POST {path} HTTP/1.1\r\nHost: chaos\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        received = bytearray()
        try:
            await self._read_body(headers, received)
        except (OSError, EOFError) as error:
            if isinstance(error, asyncio.IncompleteReadError):
                received += error.partial
            return Response(int(lines[0].split()[1]), headers, bytes(received), whole=False)
        return Response(int(lines[0].split()[1]), headers, bytes(received), whole=True)

    async def _read_body(self, headers: dict[str, str], received: bytearray) -> None:
        if headers.get("transfer-encoding") != "chunked":
            received += await self._reader.readexactly(int(headers["content-length"]))
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            received += await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)


def judge(ask: Ask, response: Response) -> tuple[End, str]:
    """Compare a response with what must come; returns the end and, unless it is right, a detail."""
    if response.status != 200:
        return End.REFUSED, f"{response.status} {response.body[:200]!r}"
    expected = ask.expected(response.body)
    if response.whole and response.body == expected:
        return End.RIGHT, ""
    told = b'"error"' in response.body
    if not response.whole or told:
        begun = response.body.partition(b'data: {"error"')[0].partition(b"event: error")[0]
        right_so_far = expected.startswith(begun)
        return (End.CUT, response.body[-200:].decode("latin-1")) if right_so_far else (End.WRONG, repr(begun[-200:]))
    return End.WRONG, f"{response.body[:300]!r} in place of {expected[:300]!r}"


class Load:
    """The clients of one scenario. `records` grows while they ask."""

    def __init__(self, ports: Sequence[int], clients: int, seed: int) -> None:
        self.records: list[Record] = []
        self._ports = list(ports)
        self._clients = clients
        self._seed = seed
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to ask."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._client(number)) for number in range(self._clients)]

    async def stop(self) -> None:
        """Let every client finish its request. Raises what a client raised."""
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def probe(self, ask: Ask) -> Response:
        """Send one request through the first proxy; it is recorded like all others."""
        connection = await self._connect(0)
        if connection is None:
            raise ConnectionError("the load has ended")
        started = CLOCK.monotonic()
        try:
            response = await connection.post(ask.body)
        finally:
            connection.close()
        end, detail = judge(ask, response)
        replica = response.headers.get("x-cairn-replica", "")
        self.records.append(Record(end, started, CLOCK.monotonic(), connection.port, 0, replica, ask, detail))
        return response

    async def _client(self, number: int) -> None:
        chooser = random.Random(f"{self._seed}/{number}")
        connection: Connection | None = None
        turn = 0
        while not self._stop.is_set():
            if connection is None or not connection.usable:
                connection = await self._connect(number % len(self._ports))
                if connection is None:
                    return
            turn += 1
            ask = dialogue.ask(
                chooser.randrange(_CONVERSATIONS),
                f"{self._seed}/{number}/{turn}",
                stream=chooser.random() < 0.5,
                asks_usage=chooser.random() < 0.3,
            )
            record, keep = await self._one(connection, ask)
            self.records.append(record)
            if not keep or chooser.random() > _KEPT_SHARE:
                connection.close()
                connection = None
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), chooser.uniform(*_PAUSE_SECONDS))
        if connection is not None:
            connection.close()

    async def _connect(self, proxy: int) -> Connection | None:
        """Return a connection, tried again while it is refused; None if the load ends meanwhile."""
        deadline = CLOCK.monotonic() + CONNECT_LIMIT_SECONDS
        while not self._stop.is_set():
            try:
                return Connection(proxy, *await asyncio.open_connection("127.0.0.1", self._ports[proxy]))
            except OSError:
                if CLOCK.monotonic() > deadline:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)
        return None

    async def _one(self, connection: Connection, ask: Ask) -> tuple[Record, bool]:
        started, headers, keep = CLOCK.monotonic(), dict[str, str](), False
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                response = await connection.post(ask.body)
        except TimeoutError:
            end, detail = End.HUNG, f"no whole answer within {LIMIT_SECONDS:.0f} s"
        except (OSError, EOFError) as error:
            end, detail = End.BROKEN, type(error).__name__
        else:
            end, detail = judge(ask, response)
            headers = response.headers
            keep = response.whole and headers.get("connection", "").lower() != "close"
        replica = headers.get("x-cairn-replica", "")
        ended = CLOCK.monotonic()
        return Record(end, started, ended, connection.port, connection.proxy, replica, ask, detail), keep

"""Send requests to one sick and one well replica, and count the errors that reach the client."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec

from benchmarks.failover.upstreams import CUT, ERROR_EVENT, RESET, RESET_IN_HEAD, WELL, Upstreams

REFUSES: Final = "refuses"
RETRIED_STATUSES = (408, 429, 500, 502, 503, 504, 529)
PASSED_ON_STATUSES = (400, 401, 403, 404, 413, 422)

FAILURES: Final = {
    REFUSES: "connection refused",
    RESET: "reset after the request",
    RESET_IN_HEAD: "reset within the head",
    CUT: "reset after the head of a stream",
    ERROR_EVENT: "200, and an error as the first event",
    **{str(status): f"status {status}" for status in RETRIED_STATUSES},
    **{str(status): f"status {status} (not tried elsewhere)" for status in PASSED_ON_STATUSES},
}
_STREAMS_ONLY = frozenset({CUT, ERROR_EVENT})

BODIES: Final[dict[str, dict[str, Any]]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "responses": {"input": "hi"},
    "messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    "embeddings": {"input": "hi"},
}
SHAPES: Final = (
    ("chat/completions", False), ("chat/completions", True), ("responses", False), ("responses", True),
    ("messages", False), ("messages", True), ("embeddings", False),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """A failure, and the requests that meet it: a separate pool, named by the model."""

    failure: str
    path: str
    stream: bool

    @property
    def model(self) -> str:
        """The model, which only this pool serves."""
        return f"{self.failure}-{self.path.replace('/', '-')}{'-stream' if self.stream else ''}"

    @property
    def sick(self) -> str:
        """The name of the sick replica."""
        return f"sick-{self.model}"


@dataclass(frozen=True, slots=True)
class Result:
    """Errors that reached the client, and requests that reached the sick replica."""

    errors: int
    asked: int
    tried: int  # responses that name the sick replica as tried before


def cells() -> Iterator[Cell]:
    """Yield all meaningful cells of the table."""
    for failure in FAILURES:
        for path, stream in SHAPES:
            if stream or failure not in _STREAMS_ONLY:
                yield Cell(failure, path, stream)


def pools(upstreams: Upstreams, closed_port: int) -> list[dict[str, Any]]:
    """Return the configuration's pools: one for each cell."""
    made = []
    for cell in cells():
        refused = f"http://127.0.0.1:{closed_port}/{cell.sick}/{WELL}/v1"
        sick = refused if cell.failure == REFUSES else upstreams.url(cell.sick, cell.failure)
        well = f"well-{cell.model}"
        replicas = [{"url": sick, "name": cell.sick}, {"url": upstreams.url(well, WELL), "name": well}]
        made.append({"name": cell.model, "models": [cell.model], "replicas": replicas})
    return made


async def measure(http: aiohttp.ClientSession, url: str, upstreams: Upstreams, cell: Cell, requests: int) -> Result:
    """Send `requests` one after another, each with its own prompt."""
    seen: Counter[str] = Counter()
    for number in range(requests):
        body = json.loads(json.dumps(BODIES[cell.path]).replace("hi", f"hi {number}"))
        body |= {"model": cell.model} | ({"stream": True} if cell.stream else {})
        try:
            async with http.post(f"{url}/{cell.path}", json=body) as response:
                text = await response.read()
                well = response.status == 200 and b"sick" not in text and (b"well" in text or b"embedding" in text)
                seen["tried"] += cell.sick in response.headers.get("x-cairn-tried", "")
        except aiohttp.ClientError:
            well = False
        seen["errors"] += not well
    return Result(seen["errors"], upstreams.asked[cell.sick], seen["tried"])


async def measure_all(
    http: aiohttp.ClientSession, url: str, upstreams: Upstreams, requests: int, among: Iterable[Cell]
) -> dict[Cell, Result]:
    """Measure cells one after another."""
    return {cell: await measure(http, url, upstreams, cell, requests) for cell in among}


def as_markdown(results: dict[Cell, Result], requests: int) -> str:
    """Return the table: errors that reached the client, and in brackets requests that the sick replica saw."""
    names = [f"{path}{', stream' if stream else ''}" for path, stream in SHAPES]
    rows = [f"| of {requests} requests | {' | '.join(names)} |", "|---" * (len(SHAPES) + 1) + "|"]
    for failure, words in FAILURES.items():
        found = [results.get(Cell(failure, path, stream)) for path, stream in SHAPES]
        shown = ["" if each is None else f"{each.errors} ({each.asked})" for each in found]
        rows.append(f"| {words} | {' | '.join(shown)} |")
    return "\n".join(rows)


class ClosedLater:
    """A port that accepts connections at first, so that the replica counts as up, and refuses them after `close`."""

    def __init__(self) -> None:
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        """Listen, and answer every request with an empty list."""
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Refuse connections from now on, and end those that are open."""
        self._server.close()
        for writer in tuple(self._writers):
            writer.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = msgspec.json.encode({"object": "list", "data": []})
        self._writers.add(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
        finally:
            self._writers.discard(writer)

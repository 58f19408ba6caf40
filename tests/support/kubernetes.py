"""A scripted API server of Kubernetes: it lists slices, and streams the events of a watch as the test says."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

_END = object()
_RESET = object()


@dataclass(frozen=True)
class Asked:
    """A request: `query` has one value a name."""

    path: str
    query: dict[str, str]
    token: str

    @property
    def is_watch(self) -> bool:
        """True if it asked for events."""
        return self.query.get("watch") == "true"


def slice_of(
    name: str,
    *addresses: str,
    version: str = "1",
    ready: bool | None = True,
    terminating: bool | None = None,
    zone: str | None = None,
    ports: Sequence[dict[str, Any]] | None = ({"name": "http", "port": 8000, "protocol": "TCP"},),
    family: str = "IPv4",
) -> dict[str, Any]:
    """An EndpointSlice as the API has it."""
    conditions = {"ready": ready, "serving": ready, "terminating": terminating}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "resourceVersion": version, "labels": {"kubernetes.io/service-name": "vllm"}},
        "addressType": family,
        "endpoints": [{"addresses": [a], "conditions": conditions, "zone": zone} for a in addresses],
        "ports": ports,
    }


class ApiServer:
    """Lists `slices` at `version`. Statuses in `statuses` are used up one a request, None for an answer.

    Events of watches are put in by the test; all watches share them, one at a time being open.
    """

    def __init__(self, *slices: dict[str, Any], context: ssl.SSLContext | None = None) -> None:
        self.slices = list(slices)
        self.version = "10"
        self.page_size = 500
        self.statuses: list[int | None] = []
        self.location: str | None = None
        self.asked: list[Asked] = []
        self.watching = asyncio.Event()
        self._context = context
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._connections: set[asyncio.StreamWriter] = set()
        self.port = 0

    @property
    def url(self) -> str:
        """Its URL."""
        return f"{'http' if self._context is None else 'https'}://localhost:{self.port}"

    @property
    def lists(self) -> list[Asked]:
        """The requests that were no watches."""
        return [asked for asked in self.asked if not asked.is_watch]

    @property
    def watches(self) -> list[Asked]:
        """The requests for events."""
        return [asked for asked in self.asked if asked.is_watch]

    def send(self, kind: str, thing: dict[str, Any]) -> None:
        """Put an event into the watch."""
        self._events.put_nowait(json.dumps({"type": kind, "object": thing}).encode() + b"\n")

    def send_raw(self, piece: bytes) -> None:
        """Put bytes into the watch, as one chunk."""
        self._events.put_nowait(piece)

    def end(self) -> None:
        """End the watch as the API server does when its time is over."""
        self._events.put_nowait(_END)

    def reset(self) -> None:
        """Break the watch's connection."""
        self._events.put_nowait(_RESET)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in tuple(self._connections):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(writer)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *fields = head.split("\r\n")
        headers = dict(field.lower().split(": ", 1) for field in fields if field)
        target = urlsplit(line.split()[1])
        query = {name: values[0] for name, values in parse_qs(target.query).items()}
        asked = Asked(target.path, query, headers.get("authorization", ""))
        self.asked.append(asked)
        status = self.statuses.pop(0) if self.statuses else None
        if status is not None:
            place = f"location: {self.location}\r\n" if self.location else ""
            writer.write(f"HTTP/1.1 {status} X\r\n{place}content-length: 2\r\n\r\n{{}}".encode())
            return True
        if not asked.is_watch:
            body = json.dumps(self._page(query)).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            return True
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        self.watching.set()
        try:
            return await self._stream(writer)
        finally:
            self.watching.clear()

    def _page(self, query: dict[str, str]) -> dict[str, Any]:
        start = int(query.get("continue", "0"))
        following = start + self.page_size
        metadata = {"resourceVersion": self.version}
        if following < len(self.slices):
            metadata["continue"] = str(following)
        return {"kind": "EndpointSliceList", "metadata": metadata, "items": self.slices[start:following]}

    async def _stream(self, writer: asyncio.StreamWriter) -> bool:
        while True:
            event = await self._events.get()
            if event is _END:
                writer.write(b"0\r\n\r\n")
                return True
            if event is _RESET:
                return False
            writer.write(b"%x\r\n" % len(event) + event + b"\r\n")
            await writer.drain()

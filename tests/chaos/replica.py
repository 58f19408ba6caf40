"""A replica in its own process, to be killed and frozen: python -m tests.chaos.replica PORT

It keeps prefixes of 256 bytes like an engine, so that routing has something to learn. SIGUSR1 makes it late, SIGUSR2
prompt again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import sys
from typing import Any, cast

import httptools
import uvloop

from tests.chaos import dialogue

PLAIN_SECONDS, WORD_SECONDS = 0.03, 0.015
LATE_SECONDS = 1.5  # before the first byte; the chaos configuration waits for two
_BLOCK_BYTES = 256


class Replica:
    """State that all connections share: the prefix cache and the present delay."""

    def __init__(self) -> None:
        self.late_seconds = 0.0
        self._blocks: set[bytes] = set()

    def cached_tokens(self, messages: Any, prompt_tokens: int) -> int:
        """Return how many tokens of the prompt were cached; from now on all of its whole blocks are."""
        text = json.dumps(messages).encode()
        running, known, broken = hashlib.blake2b(digest_size=8), 0, False
        for start in range(0, len(text) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
            running.update(text[start : start + _BLOCK_BYTES])
            block = running.digest()
            broken = broken or block not in self._blocks
            known += not broken
            self._blocks.add(block)
        return min(known * _BLOCK_BYTES // dialogue.BYTES_PER_TOKEN, prompt_tokens - 1)


class Connection(asyncio.Protocol):
    """One connection of a proxy: one request at a time."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._parser = httptools.HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # not isinstance: transports of uvloop are no subclasses
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def on_url(self, url: bytes) -> None:
        self._url, self._body = url, bytearray()

    def on_body(self, piece: bytes) -> None:
        self._body += piece

    def on_message_complete(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._respond(self._url.decode(), bytes(self._body)))

    async def _respond(self, url: str, body: bytes) -> None:
        if url == "/v1/models":
            listed = {"object": "list", "data": [{"id": dialogue.MODEL, "object": "model"}]}
            return self._send_whole(200, json.dumps(listed).encode())
        if url != dialogue.PATH:
            return self._send_whole(404, b"{}")
        tree = json.loads(body)
        answer = dialogue.answer_to(tree["messages"])
        cached = self._replica.cached_tokens(tree["messages"], answer.prompt_tokens)
        await asyncio.sleep(self._replica.late_seconds)
        if not tree.get("stream"):
            await asyncio.sleep(PLAIN_SECONDS)
            return self._send_whole(200, dialogue.whole(answer, cached))
        usage = bool((tree.get("stream_options") or {}).get("include_usage"))
        await self._send_stream(dialogue.events(answer, cached, usage=usage))
        return None

    def _send_whole(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)

    async def _send_stream(self, events: list[bytes]) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        self._transport.write(head)
        for event in events:
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
            await asyncio.sleep(WORD_SECONDS)
        self._transport.write(b"0\r\n\r\n")


async def serve(port: int) -> None:
    """Serve on loopback until killed."""
    replica, loop = Replica(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, setattr, replica, "late_seconds", LATE_SECONDS)
    loop.add_signal_handler(signal.SIGUSR2, setattr, replica, "late_seconds", 0.0)
    server = await loop.create_server(lambda: Connection(replica), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))

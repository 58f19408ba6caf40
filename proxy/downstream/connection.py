"""A client's connection: aiohttp's own, with its parser, limits and timers, but one task for all of its requests.

aiohttp makes a task, a request object of fifty parts and a writer for each request, of which a proxy uses nothing:
a tenth of what a short request costs. Everything that is not the plain course of requests (what its parser refuses, a
client that leaves, pipelining, keep-alive, the end) stays aiohttp's. What is taken from inside of it is named in
`tests/proxy/test_session.py`, so that another version cannot change it unseen.

It must not know limits, prompts or replicas.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import EMPTY_PAYLOAD, StreamReader, web
from aiohttp.http import HttpVersion, RawRequestMessage

from proxy.downstream.body import IncomingRequest
from proxy.downstream.body_ahead import BodyAhead
from proxy.downstream.reader import ROOM_BYTES, Reader
from proxy.downstream.response import ClientResponse

log = logging.getLogger("cairn.session")


class Request:
    """The parsed head of a request, and its body as it comes."""

    __slots__ = (
        "content",
        "headers",
        "keep_alive",
        "method",
        "protocol",
        "raw_headers",
        "raw_path",
        "version",
    )

    def __init__(self, message: RawRequestMessage, content: StreamReader, protocol: web.RequestHandler) -> None:
        self.method: str = message.method
        self.raw_path: str = message.path
        self.version: HttpVersion = message.version
        self.headers = message.headers
        self.raw_headers = message.raw_headers
        self.keep_alive = not message.should_close
        self.content = content
        self.protocol = protocol

    @property
    def content_length(self) -> int | None:
        """Bytes of the body where the client declared them; the parser has checked the number."""
        declared = self.headers.get("Content-Length")
        return None if declared is None else int(declared)

    @property
    def body_exists(self) -> bool:
        """True where the head says that a body follows."""
        return self.content is not EMPTY_PAYLOAD


Handle = Callable[[IncomingRequest], Awaitable[ClientResponse]]


class SessionServer(web.Server):
    """aiohttp's low-level server, whose connections are `Session`s. `handle` answers a request and never raises but
    for cancellation and a lost connection."""

    def __init__(self, handle: Handle, **options: Any) -> None:
        # a client that leaves stops its request, whose tokens nobody would read
        super().__init__(handle, handler_cancellation=True, access_log=None, **options)  # type: ignore[arg-type]
        self._room = bytearray(ROOM_BYTES)

    def __call__(self) -> Reader:  # type: ignore[override]  # the loop asks for any protocol
        return Reader(Session(self, loop=self._loop, **self._kwargs), self._room)


class Session(BodyAhead):
    """One connection. It is subclassed and not wrapped, since aiohttp tells its own connection what happens to it."""

    __slots__ = ()

    async def start(self) -> None:
        """Answer requests in their order until the connection ends."""
        handle = cast(Handle, self._request_handler)
        try:
            while not self._force_close:
                if not self._messages:
                    await self._next_message()
                first = self._messages[0][0]
                if not isinstance(first, RawRequestMessage) or first.upgrade:
                    await super().start()  # what the parser refused, or stopped behind
                    return
                content = self._messages.popleft()[1]
                self._make_way()
                self._request_in_progress = True
                try:
                    answer = await handle(Request(first, content, self))
                finally:
                    self._request_in_progress = False
                    if self._handler_waiter is not None and not self._handler_waiter.done():
                        self._handler_waiter.set_result(None)
                if not await self._goes_on(answer, content):
                    break
        except ConnectionError:
            log.debug("a client left before its answer was whole")
        except BaseException:
            self.force_close()
            raise
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    async def _next_message(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _make_way(self) -> None:
        """Let the parser go on where it stopped behind too many requests sent ahead."""
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()

    async def _goes_on(self, answer: ClientResponse, content: StreamReader) -> bool:
        """Whether another request may follow on the connection, whose timer begins then."""
        self._keepalive = answer.keep_alive
        if not content.is_eof():
            await self._leave_body(content)
        if not self._keepalive or self._close or self._force_close:
            return False
        closes_at = self._loop.time() + self._keepalive_timeout
        self._next_keepalive_close_time = closes_at
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(closes_at, self._process_keepalive)
        return True

    async def _leave_body(self, content: StreamReader) -> None:
        """Read what is left of a body that nobody wants, for a while: a close at once would cut the answer off."""
        self.give_back_ahead()
        if self._lingering_time and not self._force_close:
            try:
                async with asyncio.timeout(self._lingering_time):
                    while not content.is_eof():
                        await content.readany()
            except TimeoutError:
                log.debug("a client went on sending a body that was not read")
        if not content.is_eof() and not self._force_close:
            self.close()

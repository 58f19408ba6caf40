"""A client's connection that keeps the part of a long body which came together with its head, instead of parsing it.

aiohttp's parser copies what it is given, and hands it out through a reader made for bodies that come bit by bit. Of
a body whose length the head declares it has nothing to judge. So the parser is given the head alone; who reads the
body takes the rest as it came (`take_ahead`), and whoever does not gives it to the parser after all
(`give_back_ahead`): then everything is as if it had come a moment later. Chunked bodies never come here.

It must not know limits, prompts or answers. Not compiled: it extends a class with slots.
"""

from __future__ import annotations

from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http import HttpRequestParser, RawRequestMessage

_PARSER_BUFFER_BYTES = 64 * 1024  # aiohttp's own default
_PIPELINED_MOST = 10  # requests that aiohttp's parser lets wait on one connection, its own default


class BodyAhead(web.RequestHandler):
    """See the module."""

    __slots__ = ("_ahead",)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ahead: bytes | None = None

    def data_received(self, data: bytes) -> None:
        """What a read from the socket gave."""
        if self._ahead is not None and data:
            self.give_back_ahead()
        super().data_received(data)

    @property
    def awaits_head(self) -> bool:
        """True between two requests."""
        return self._waiter is not None and self._ahead is None

    def head_came(self, head: bytes, ahead: bytes) -> None:
        """A read gave a whole head and what came behind it. Only while `awaits_head`."""
        super().data_received(head)
        if ahead:
            self._keep(ahead)

    @property
    def ahead_bytes(self) -> int:
        """How much is here of the body that the last head announced, and the parser has not seen."""
        return 0 if self._ahead is None else len(self._ahead)

    def take_whole(self, content: StreamReader, length: int) -> bytes:
        """The body, all `length` bytes of which are here."""
        ahead = self.take_ahead()
        self.body_taken(content, ahead[length:])
        return ahead[:length]

    def take_ahead(self) -> bytes:
        """What is here of it, while nothing more is read.

        Reading must be resumed, and `body_taken` be said once the body is whole, or the connection be closed.
        """
        ahead, self._ahead = self._ahead, None
        return ahead or b""

    def give_back_ahead(self) -> None:
        """Let the parser have it. May come at any time."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            super().data_received(ahead)
            if not self._reading_paused and not self._buffer_paused:
                self._resume_transport_reading()

    def body_taken(self, content: StreamReader, beyond: bytes = b"") -> None:
        """The body was read past the parser, which still waits for it: a new one goes on with what came `beyond`."""
        content.feed_eof()
        self._parser = HttpRequestParser(
            self,
            self._loop,
            _PARSER_BUFFER_BYTES,
            max_line_size=self.max_line_size,
            max_field_size=self.max_field_size,
            max_headers=self.max_headers,
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=_PIPELINED_MOST,
        )
        if beyond:
            super().data_received(beyond)

    def _keep(self, ahead: bytes) -> None:
        """Keep what came behind a head, or give it to the parser where that has a say in it."""
        length = self._announced_bytes()
        if length is None:
            super().data_received(ahead)
            return
        self._ahead = ahead
        if len(ahead) < length:
            self._pause_transport_reading()  # or the loop goes on filling its own buffer before anybody takes this

    def _announced_bytes(self) -> int | None:
        """The length of the body of the head that the parser has just come to the end of, where it declares one."""
        if len(self._messages) != 1 or self._parser is None:
            return None
        message, content = self._messages[0]
        if not isinstance(message, RawRequestMessage) or message.chunked or message.upgrade:
            return None
        length = message.headers.get("Content-Length")
        return None if length is None or content.is_eof() or content.total_bytes else int(length)

"""Check an uploaded file while it passes, line by line, so that it can be the input of a batch.

Such a file is a list of requests that the upstream will send to itself. What a client may not send, it may not let a
batch send either. Only a file whose lines were all read becomes the input of a batch; any other passes as it comes.
One that is uploaded for a batch, and has a line that may not be sent, is broken off before its end and refused.

One piece of the body is in memory at a time, and a line that has not ended.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

from proxy.errors import BadRequest, CairnError, UnknownObject
from proxy.pipeline.dispatch import Room
from proxy.wire.batch_lines import LINE_BYTES_MOST, LineReader
from proxy.wire.multipart import FieldPiece, FormReader, UnreadableForm

INLINE_BYTES_MOST: Final = 4 * 1024
"""Most bytes of lines that are checked on the event loop; more are checked in a thread. They take less than 1 ms, and
up to 10 ms if they are nothing but empty items of an input."""

_FIELD_BYTES_MOST: Final = 64 * 1024  # of a field that is not the file, such as the purpose
_FILE = re.compile(r"(?i)files?(?:\[.*)?")  # the names of fields that servers take for the file
_BATCH: Final = b"batch"  # how a purpose begins: some providers say batch-api


class CheckedFile:
    """The pieces of an uploaded form, each passed on after the lines that end in it were checked.

    Args:
        pieces: the form as it comes.
        content_type: its content type.
        check: raises CairnError if the client may not send the request of a line.
        on_checked: called at the end of a file all of whose lines were checked.
        unreadable: the error for a form that cannot be read.
        must_be_read: refuse such a form, whatever its purpose.
        room: counts the bytes of the line that has not ended.
        news: waits until objects that were created at other workers are known here.
        aside: allows one thread at a time.
    """

    def __init__(  # noqa: PLR0913 - what a check needs of the phases around it
        self,
        pieces: AsyncIterator[bytes],
        content_type: bytes,
        check: Callable[[bytes], None],
        on_checked: Callable[[], None],
        *,
        unreadable: CairnError,
        must_be_read: bool,
        room: Room | None,
        news: Callable[[], Awaitable[None]],
        aside: asyncio.Semaphore,
    ) -> None:
        self._pieces = pieces
        self._check_line = check
        self._on_checked = on_checked
        self._unreadable = unreadable
        self._must_be_read = must_be_read
        self._room = room
        self._news = news
        self._aside = aside
        self._form: FormReader | None = None  # None if it cannot be read
        self._lines = LineReader()
        self._lines_read = 0
        self._field = b""  # the value of a field that is not the file, as far as it has come
        self._failure: CairnError | None = None  # why the file cannot be the input of a batch
        self._is_batch = False
        try:
            self._form = FormReader(content_type)
        except UnreadableForm:
            self._fail(unreadable)

    def __aiter__(self) -> CheckedFile:
        return self

    async def __anext__(self) -> bytes:
        """Return the next piece. Raises the errors of the pieces and of the rules."""
        try:
            piece = await anext(self._pieces)
        except StopAsyncIteration:
            self._end()
            raise
        if self._form is not None:
            await self._check(self._form, piece)
        self._refuse()
        return piece

    async def _check(self, form: FormReader, piece: bytes) -> None:
        lines: list[bytes] = []
        try:
            for each in form.feed(piece):
                lines += self._read(each)
        except UnreadableForm:
            self._form = None
            self._fail(self._unreadable)
        if self._failure is None and lines:
            failure = await self._failure_of(lines)
            if isinstance(failure, UnknownObject):
                await self._news()
                failure = await self._failure_of(lines)
            if failure is not None:
                self._fail(failure)
            self._lines_read += len(lines)
        if self._room is not None:
            self._room.hold(self._lines.held_bytes)

    def _read(self, each: FieldPiece) -> list[bytes]:
        """Take a piece of a field; return the lines of the file that end in it. Raises UnreadableForm."""
        if _FILE.fullmatch(each.name):
            return self._read_file(each)
        self._field += each.value
        if len(self._field) > _FIELD_BYTES_MOST:
            raise UnreadableForm
        if each.is_last:
            value, self._field = self._field.strip().lower(), b""
            self._is_batch = self._is_batch or (each.name.casefold() == "purpose" and value.startswith(_BATCH))
        return []

    def _read_file(self, each: FieldPiece) -> list[bytes]:
        if self._failure is not None:
            return []
        lines = self._lines.feed(each.value)
        if each.is_last:
            lines += self._lines.close()
        if self._lines.held_bytes > LINE_BYTES_MOST:
            self._fail(BadRequest(f"A line of the file has more than {LINE_BYTES_MOST:,} bytes.", param="file"))
        return lines

    async def _failure_of(self, lines: Sequence[bytes]) -> CairnError | None:
        if sum(map(len, lines)) <= INLINE_BYTES_MOST:
            return self._first_failure(lines)
        async with self._aside:
            return await asyncio.to_thread(self._first_failure, lines)

    def _first_failure(self, lines: Sequence[bytes]) -> CairnError | None:
        number = self._lines_read
        try:
            for line in lines:
                number += 1
                self._check_line(line)
        except CairnError as error:
            error.message = f"Line {number:,} of the file: {error.message}"
            error.param = error.param or "file"
            return error
        return None

    def _fail(self, failure: CairnError) -> None:
        self._failure = failure
        self._lines.drop()

    def _refuse(self) -> None:
        """Raise the failure if no such file may be created."""
        if self._failure is not None and (self._is_batch or (self._must_be_read and self._form is None)):
            raise self._failure

    def _end(self) -> None:
        """Handle the end of the body. Raises the failure if the form has not ended."""
        if self._form is not None and not self._form.is_complete:
            self._form = None
            self._fail(self._unreadable)
            self._refuse()
        if self._failure is None and self._lines_read:
            self._on_checked()

"""A file is checked line by line as it passes, and only one that was checked to its end is noted."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from proxy.errors import BadRequest, Forbidden, Overloaded, UnknownObject
from proxy.pipeline.batch_files import INLINE_BYTES_MOST, CheckedFile
from proxy.wire.batch_lines import LINE_BYTES_MOST
from tests.scenarios.test_batch_files import field

TYPE = b"multipart/form-data; boundary=b"
END = b"--b--\r\n"
BATCH = field("purpose", b"batch")
UNREADABLE = Forbidden("unreadable")


class Upload:
    """An upload of a form, the rules of its lines, and what was asked of them.

    Lines that begin with `bad` may not be sent, and those that begin with `new` may from the second time on.
    """

    def __init__(self, pieces: Iterable[bytes], *, must_be_read: bool = False, content_type: bytes = TYPE) -> None:
        self.lines: list[bytes] = []
        self.threads: set[int] = set()
        self.held: list[int] = []
        self.room_bytes = 10**9
        self.waits = 0
        self.is_checked = False
        self.passed: list[bytes] = []
        self.file = CheckedFile(
            given(pieces),
            content_type,
            self.check,
            self.checked,
            unreadable=UNREADABLE,
            must_be_read=must_be_read,
            room=self,
            news=self.news,
            aside=asyncio.Semaphore(1),
        )

    def check(self, line: bytes) -> None:
        self.threads.add(threading.get_ident())
        if line.startswith(b"bad"):
            raise BadRequest("it is bad")
        if line.startswith(b"new") and line not in self.lines:
            self.lines.append(line)
            raise UnknownObject("it is new")
        self.lines.append(line)

    def checked(self) -> None:
        self.is_checked = True

    def hold(self, nbytes: int) -> None:
        self.held.append(nbytes)
        if nbytes > self.room_bytes:
            raise Overloaded("no room")

    async def news(self) -> None:
        self.waits += 1

    async def run(self) -> bytes:
        """Return what reaches the upstream."""
        async for piece in self.file:
            self.passed.append(piece)
        return b"".join(self.passed)


async def given(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def form(content: bytes, purpose: bytes = b"batch") -> bytes:
    return field("purpose", purpose) + field("file", content) + END


def cut(body: bytes, size: int) -> list[bytes]:
    return [body[at : at + size] for at in range(0, len(body), size)]


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_file_passes_unchanged_and_each_of_its_lines_is_checked_once(size: int) -> None:
    """In pieces of any size; at the end it is noted."""
    body = form(b"one\n\ntwo\r\nthree")
    upload = Upload(cut(body, size))
    assert await upload.run() == body
    assert upload.lines == [b"one", b"two\r", b"three"]
    assert upload.is_checked
    assert upload.held[-1] == 0


@pytest.mark.parametrize(
    "body",
    [
        BATCH + field("file", b"one\nbad\ntwo") + END,
        field("file", b"one\nbad\ntwo") + field("purpose", b"Batch_API") + END,
        BATCH + field("file", b"one") + field("File[]", b"bad") + END,
        BATCH + field("files", b"one\nbad") + END,
        field("purpose", b"user_data") + BATCH + field("file", b"one\nbad") + END,
    ],
)
@pytest.mark.parametrize("size", [1, 10_000])
async def test_a_batch_with_a_line_that_may_not_be_sent_breaks_off_before_its_end(body: bytes, size: int) -> None:
    """Whether its purpose comes before or after the file."""
    upload = Upload(cut(body, size))
    with pytest.raises(BadRequest) as refused:
        await upload.run()
    assert (refused.value.message, refused.value.param) == ("Line 2 of the file: it is bad", "file")
    assert b"--b--" not in b"".join(upload.passed)
    assert upload.lines == [b"one"]
    assert not upload.is_checked


async def test_a_file_of_another_purpose_passes_whatever_is_in_it_and_is_not_noted() -> None:
    """After the first line that is no request, none is looked at."""
    body = form(b"bad\n" + b"x" * 1000, b"user_data")
    upload = Upload(cut(body, 100))
    assert await upload.run() == body
    assert (upload.lines, upload.is_checked, upload.held[-1]) == ([], False, 0)


async def test_an_object_that_is_not_known_yet_is_waited_for_once() -> None:
    """Another worker may just have announced it."""
    upload = Upload([form(b"new")])
    await upload.run()
    assert (upload.waits, upload.is_checked) == (1, True)


@pytest.mark.parametrize(("nbytes", "aside"), [(INLINE_BYTES_MOST, False), (INLINE_BYTES_MOST + 1, True)])
async def test_long_lines_are_checked_in_a_thread(nbytes: int, aside: bool) -> None:
    """The loop goes on meanwhile."""
    upload = Upload([form(b"x" * nbytes)])
    await upload.run()
    assert (threading.get_ident() not in upload.threads) is aside


async def test_the_bytes_of_a_line_that_has_not_ended_need_room() -> None:
    """They are held in memory until it has."""
    upload = Upload(cut(form(b"x" * 3000 + b"\n" + b"y" * 2000), 500))
    upload.room_bytes = 3000
    await upload.run()
    assert max(upload.held) > 2000
    upload = Upload(cut(form(b"x" * 4000), 500))
    upload.room_bytes = 3000
    with pytest.raises(Overloaded):
        await upload.run()


async def test_a_line_without_an_end_is_given_up() -> None:
    upload = Upload([BATCH + field("file", b"")[:-2], *[b"x" * 2**20] * 40])
    with pytest.raises(BadRequest, match=f"more than {LINE_BYTES_MOST:,} bytes"):
        await upload.run()
    assert len(upload.passed) == 33


BROKEN: list[tuple[bytes, Any]] = [
    (b"x", TYPE),
    (form(b"one")[:-6], TYPE),
    (form(b"one") + b"x", TYPE),
    (field("other", b"x" * 70_000) + form(b"one"), TYPE),
    (form(b"one", b"user_data"), b"multipart/form-data"),
    (form(b"one", b"user_data"), b""),
]


@pytest.mark.parametrize(("body", "content_type"), BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("must_be_read", [False, True])
async def test_a_form_that_cannot_be_read_is_not_noted(body: bytes, content_type: bytes, must_be_read: bool) -> None:
    """It is refused if it is known to be a batch, or if its client's models must all be known."""
    upload = Upload(cut(body, 50), must_be_read=must_be_read, content_type=content_type)
    with pytest.raises(Forbidden) if must_be_read or body.startswith(BATCH) else contextlib.nullcontext():
        assert await upload.run() == body
    assert not upload.is_checked


async def test_a_form_without_lines_is_not_noted() -> None:
    """It brought no file, so that the upstream may have taken it from elsewhere."""
    for body in (form(b"\n \n"), BATCH + END):
        upload = Upload([body])
        assert await upload.run() == body
        assert not upload.is_checked

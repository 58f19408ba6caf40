"""What a stored context names: its objects and the models of its tools, read once."""

from __future__ import annotations

import asyncio
import threading
from array import array

import pytest

from cache import Content
from proxy.pipeline import inserted_names
from proxy.pipeline.inserted_names import LONG_IF_DECODED_BYTES, InsertedNames, Names
from proxy.wire.references import Reference

TOOLS = b'[{"type":"image_generation","model":"one"},{"type":"file_search","vector_store_ids":["vs_1"]}]'
MESSAGES = b'{"role":"user","content":[{"type":"file","file":{"file_id":"file-1"}}]}'
NAMED = Names(frozenset({Reference("vector_stores", "vs_1"), Reference("files", "file-1")}), ("one",))


def content(tools: bytes = TOOLS, messages: bytes = MESSAGES, digest: bytes = b"d") -> Content:
    return Content(digest, tools, messages, array("I", (0, len(messages))))


async def test_tools_name_models_and_objects_and_messages_name_objects() -> None:
    """Of either there may be none."""
    assert await InsertedNames().of(content()) == NAMED
    assert await InsertedNames().of(content(tools=b"")) == Names(frozenset({Reference("files", "file-1")}), ())
    assert await InsertedNames().of(content(messages=b"")) == Names(
        frozenset({Reference("vector_stores", "vs_1")}), ("one",)
    )
    assert await InsertedNames().of(content(b"[", b"")) == Names(frozenset(), None)


@pytest.mark.parametrize(("size_bytes", "aside"), [(LONG_IF_DECODED_BYTES - 1, False), (LONG_IF_DECODED_BYTES, True)])
async def test_a_long_context_is_read_in_a_thread_and_each_only_once(
    monkeypatch: pytest.MonkeyPatch, size_bytes: int, aside: bool
) -> None:
    """By its digest, until many others were read."""
    threads = []
    read = inserted_names._names  # noqa: SLF001

    def noting(each: Content) -> Names:
        threads.append(threading.current_thread())
        return read(each)

    monkeypatch.setattr(inserted_names, "_names", noting)
    monkeypatch.setattr(inserted_names, "REMEMBERED_AT_MOST", 3)
    names = InsertedNames()
    long = content(messages=MESSAGES + b" " * (size_bytes - len(TOOLS) - len(MESSAGES)))
    for _ in range(2):
        assert await names.of(long) == NAMED
    assert [thread is not threading.main_thread() for thread in threads] == [aside]
    for digest in (b"e", b"f"):
        await names.of(content(digest=digest))
    await names.of(long)
    assert len(threads) == 3
    await names.of(content(digest=b"g"))
    await names.of(long)
    assert len(threads) == 5


async def test_one_long_context_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads would take the interpreter from the event loop in turn."""
    running, most = 0, 0

    async def in_a_thread(read: object, each: Content) -> Names:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return NAMED

    monkeypatch.setattr(asyncio, "to_thread", in_a_thread)
    names = InsertedNames()
    long = b" " * LONG_IF_DECODED_BYTES
    await asyncio.gather(*[names.of(content(messages=long, digest=digest)) for digest in (b"1", b"2", b"3")])
    assert most == 1

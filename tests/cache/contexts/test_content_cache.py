"""Contents in memory: bounded in bytes, read once however many wait."""

from __future__ import annotations

import asyncio
from array import array

from cache.contexts.content_cache import ENTRY_BYTES, ContentCache
from cache.contexts.segments import Content
from cache.errors import StoreUnavailable
from proxy.tasks import Tasks


def content(size: int) -> Content:
    return Content(b"", b"", bytes(size), array("I"))


async def test_the_least_recently_used_go_when_the_bytes_are_over_the_bound() -> None:
    """A use keeps; what is over the bound by itself is not kept at all."""
    kept = ContentCache(3 * (1000 + ENTRY_BYTES), Tasks())
    for name in "abc":
        kept.put(name, content(1000))
    assert kept.peek("a") is not None
    kept.put("d", content(1000))
    assert [kept.peek(name) is not None for name in "abcd"] == [True, False, True, True]
    kept.put("a", content(1000))
    assert kept.size_bytes == 3 * (1000 + ENTRY_BYTES)
    kept.put("huge", content(1_000_000))
    assert (kept.peek("huge"), len(kept)) == (None, 3)


async def test_many_who_wait_are_served_by_one_read_and_one_that_leaves_takes_nothing() -> None:
    """The first of them is cancelled; the others get what it began to read."""
    go, reads = asyncio.Event(), 0

    async def read() -> Content:
        nonlocal reads
        reads += 1
        await go.wait()
        return content(10)

    kept, tasks = ContentCache(10_000, Tasks()), Tasks()
    waiting = [tasks.start(kept.get("x", read), "wait") for _ in range(50)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    go.set()
    found = await asyncio.gather(*waiting[1:])
    assert len(set(map(id, found))) == 1
    assert reads == 1


async def test_a_failed_read_is_told_to_all_and_tried_again_by_the_next() -> None:
    """Nothing of it is kept."""
    answers: list[Content | Exception] = [StoreUnavailable("away"), content(5)]

    async def read() -> Content:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    kept = ContentCache(10_000, Tasks())
    results = await asyncio.gather(kept.get("x", read), kept.get("x", read), return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * 2
    assert kept.peek("x") is None
    assert (await kept.get("x", read)).size_bytes == 5


async def test_a_smaller_bound_holds_at_once() -> None:
    """The content that was unused for longest is dropped; a larger budget keeps more again."""
    kept = ContentCache(3 * (1000 + ENTRY_BYTES), Tasks())
    for name in "abc":
        kept.put(name, content(1000))
    kept.limit(1000 + ENTRY_BYTES)
    assert (kept.peek("c") is not None, len(kept)) == (True, 1)
    kept.limit(2 * (1000 + ENTRY_BYTES))
    kept.put("d", content(1000))
    assert len(kept) == 2


async def test_what_is_in_memory_is_not_read_again() -> None:
    """And counts as a hit."""

    async def read() -> Content:
        raise AssertionError("it is in memory")

    kept, known = ContentCache(10_000, Tasks()), content(10)
    kept.put("x", known)
    assert await kept.get("x", read) is known
    assert kept.hits == 1

"""Contents in memory: bounded in bytes, read once however many wait."""

from __future__ import annotations

import asyncio
import tracemalloc
from array import array

import pytest

from cache.contexts.content_cache import ContentCache
from cache.contexts.segments import CHAINS_AT_MOST, CONTENT_BYTES, Content
from cache.errors import StoreUnavailable
from proxy.tasks import Tasks


def content(size: int) -> Content:
    return Content(b"", b"", bytes(size), array("I"))


async def test_the_least_recently_used_go_when_the_bytes_are_over_the_bound() -> None:
    """A use keeps; what is over the bound by itself is not kept at all."""
    kept = ContentCache(3 * (1000 + CONTENT_BYTES), Tasks())
    for name in "abc":
        kept.put(name, content(1000))
    assert kept.peek("a") is not None
    kept.put("d", content(1000))
    assert [kept.peek(name) is not None for name in "abcd"] == [True, False, True, True]
    kept.put("a", content(1000))
    assert kept.size_bytes == 3 * (1000 + CONTENT_BYTES)
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
    kept = ContentCache(3 * (1000 + CONTENT_BYTES), Tasks())
    for name in "abc":
        kept.put(name, content(1000))
    kept.limit(1000 + CONTENT_BYTES)
    assert (kept.peek("c") is not None, len(kept)) == (True, 1)
    kept.limit(2 * (1000 + CONTENT_BYTES))
    kept.put("d", content(1000))
    assert len(kept) == 2


async def test_chains_that_are_computed_later_count_too() -> None:
    """Up to the most that a content keeps; what is dropped takes its chains along."""
    kept = ContentCache(20_000, Tasks())
    small = [content(10) for _ in range(8)]
    for number, each in enumerate(small):
        kept.put(number, each)
    assert kept.size_bytes == 8 * (10 + CONTENT_BYTES)
    for number, each in enumerate(small):
        for model in range(CHAINS_AT_MOST):
            each.chain(model)
        kept.put("other", content(10))
        assert kept.size_bytes <= 20_000, number
    assert [kept.peek(number) is not None for number in range(8)] == [False] * 4 + [True] * 4
    before = kept.size_bytes
    small[-1].chain(CHAINS_AT_MOST + 1)  # in place of the one that was computed first
    small[0].chain(CHAINS_AT_MOST + 1)  # is not kept any longer
    assert kept.size_bytes == before
    kept.limit(1)
    assert (len(kept), kept.size_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("contents", "size", "messages", "chains"),
    [(500, 300, 1, 8), (500, 3_000, 1, 1), (100, 3_000, 20, 8), (20, 60_000, 200, 1)],
)
async def test_the_size_of_what_is_kept_is_that_of_its_memory(
    contents: int, size: int, messages: int, chains: int
) -> None:
    """Within a fifth, for small contents with chains of many models too."""
    kept, step = ContentCache(1 << 30, Tasks()), size // messages
    tracemalloc.start()
    try:
        for number in range(contents):
            bounds = array("I", [at for k in range(messages) for at in (k * step, (k + 1) * step)])
            each = Content(number.to_bytes(32, "big"), b"", bytes(size), bounds)
            kept.put((f"tenant-{number}", each.digest), each)
            for model in range(chains):
                each.chain(2**62 + model)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.8 * taken < kept.size_bytes < 1.2 * taken


async def test_what_is_in_memory_is_not_read_again() -> None:
    """And counts as a hit."""

    async def read() -> Content:
        raise AssertionError("it is in memory")

    kept, known = ContentCache(10_000, Tasks()), content(10)
    kept.put("x", known)
    assert await kept.get("x", read) is known
    assert kept.hits == 1

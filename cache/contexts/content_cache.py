"""Contents of stored contexts in a worker's memory: the least recently used go when their bytes are over a bound.

What is not there is read once, however many wait for it; one that leaves takes nothing from the others. It knows
neither Redis nor what a content means.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Any

from cache.contexts.segments import Content
from cache.ports import Tasks

ENTRY_BYTES = 512  # what a content takes beside its bytes, at least


class ContentCache:
    """`size_bytes` never exceeds `most_bytes` for longer than a call; a larger content is handed on and not kept."""

    def __init__(self, most_bytes: int, tasks: Tasks) -> None:
        self._most_bytes = most_bytes
        self._tasks = tasks
        self._kept: OrderedDict[Hashable, Content] = OrderedDict()
        self._reading: dict[Hashable, asyncio.Task[Any]] = {}
        self.size_bytes = 0
        self.hits = 0
        self.reads = 0

    def limit(self, most_bytes: int) -> None:
        """From now on keep no more than that."""
        self._most_bytes = most_bytes
        self._let_go()

    def __len__(self) -> int:
        return len(self._kept)

    def peek(self, key: Hashable) -> Content | None:
        """What is there; counts as a use."""
        content = self._kept.get(key)
        if content is not None:
            self._kept.move_to_end(key)
            self.hits += 1
        return content

    async def get(self, key: Hashable, read: Callable[[], Awaitable[Content]]) -> Content:
        """What is there, or what `read` gives; raises what `read` raised to all who wait for it."""
        if (content := self.peek(key)) is not None:
            return content
        task = self._reading.get(key)
        if task is None:
            task = self._reading[key] = self._tasks.start(self._read(key, read), "context-read")
        outcome = await asyncio.shield(task)
        if isinstance(outcome, BaseException):
            raise outcome
        found: Content = outcome
        return found

    def put(self, key: Hashable, content: Content) -> None:
        """Keep `content`, and let go of those that were not used for longest."""
        old = self._kept.pop(key, None)
        if old is not None:
            self.size_bytes -= _size(old)
        if _size(content) > self._most_bytes:
            return
        self._kept[key] = content
        self.size_bytes += _size(content)
        self._let_go()

    def _let_go(self) -> None:
        while self.size_bytes > self._most_bytes:
            _, last = self._kept.popitem(last=False)
            self.size_bytes -= _size(last)

    async def _read(self, key: Hashable, read: Callable[[], Awaitable[Content]]) -> Content | Exception:
        """The content, or what went wrong, which belongs to those who wait and not to the log."""
        self.reads += 1
        try:
            content = await read()
            self.put(key, content)
            return content
        except Exception as error:  # noqa: BLE001 - handed on to whoever waits
            return error
        finally:
            del self._reading[key]


def _size(content: Content) -> int:
    return content.size_bytes + ENTRY_BYTES

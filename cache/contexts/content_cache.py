"""Contents of stored contexts in a worker's memory, bounded in bytes; the least recently used are dropped first.

A content that is not in memory is read once, however many requests wait for it; cancelling one request does not
affect the others.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Any

from cache.contexts.segments import Content, Usage
from cache.ports import Tasks


class ContentCache:
    """Contents by key, of which at most `most_bytes` are kept, with their prefix chains.

    A larger content is returned but not kept. A chain that is computed later makes room at the next call.
    """

    def __init__(self, most_bytes: int, tasks: Tasks) -> None:
        self._most_bytes = most_bytes
        self._tasks = tasks
        self._kept: OrderedDict[Hashable, Content] = OrderedDict()
        self._reading: dict[Hashable, asyncio.Task[Any]] = {}
        self._usage = Usage()
        self.hits = 0
        self.reads = 0

    def limit(self, most_bytes: int) -> None:
        """Change the bound."""
        self._most_bytes = most_bytes
        self._make_room()

    @property
    def size_bytes(self) -> int:
        """Memory of what is kept."""
        return self._usage.size_bytes

    def __len__(self) -> int:
        return len(self._kept)

    def peek(self, key: Hashable) -> Content | None:
        """Return the content if it is in memory, and make it the most recently used."""
        content = self._kept.get(key)
        if content is not None:
            self._kept.move_to_end(key)
            self.hits += 1
            self._make_room()
        return content

    async def get(self, key: Hashable, read: Callable[[], Awaitable[Content]]) -> Content:
        """Return the content from memory or from `read`; all that wait for the same read get its result or error."""
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
        """Keep `content`, and drop the least recently used to make room."""
        old = self._kept.pop(key, None)
        if old is not None:
            old.count_in(None)
        if content.memory_bytes > self._most_bytes:
            return
        self._kept[key] = content
        content.count_in(self._usage)
        self._make_room()

    def _make_room(self) -> None:
        while self._usage.size_bytes > self._most_bytes:
            _, last = self._kept.popitem(last=False)
            last.count_in(None)

    async def _read(self, key: Hashable, read: Callable[[], Awaitable[Content]]) -> Content | Exception:
        """Return the content or the error; the error is raised to the waiting requests and not logged."""
        self.reads += 1
        try:
            content = await read()
            self.put(key, content)
            return content
        except Exception as error:  # noqa: BLE001 - raised by `get`
            return error
        finally:
            del self._reading[key]

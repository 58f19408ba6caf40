"""Contents of stored contexts in a worker's memory, bounded in bytes; the least recently used are dropped first.

A content that is not in memory is read once, however many requests wait for it; cancelling one request does not
affect the others.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Any

from cache.contexts.segments import Content
from cache.ports import Tasks

ENTRY_BYTES = 512  # least memory of an entry in addition to its content's bytes


class ContentCache:
    """Contents by key, at most `most_bytes` between calls; a larger content is returned but not kept."""

    def __init__(self, most_bytes: int, tasks: Tasks) -> None:
        self._most_bytes = most_bytes
        self._tasks = tasks
        self._kept: OrderedDict[Hashable, Content] = OrderedDict()
        self._reading: dict[Hashable, asyncio.Task[Any]] = {}
        self.size_bytes = 0
        self.hits = 0
        self.reads = 0

    def limit(self, most_bytes: int) -> None:
        """Change the bound."""
        self._most_bytes = most_bytes
        self._make_room()

    def __len__(self) -> int:
        return len(self._kept)

    def peek(self, key: Hashable) -> Content | None:
        """Return the content if it is in memory, and make it the most recently used."""
        content = self._kept.get(key)
        if content is not None:
            self._kept.move_to_end(key)
            self.hits += 1
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
            self.size_bytes -= _size(old)
        if _size(content) > self._most_bytes:
            return
        self._kept[key] = content
        self.size_bytes += _size(content)
        self._make_room()

    def _make_room(self) -> None:
        while self.size_bytes > self._most_bytes:
            _, last = self._kept.popitem(last=False)
            self.size_bytes -= _size(last)

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


def _size(content: Content) -> int:
    return content.size_bytes + ENTRY_BYTES

"""Rows and tags of stored contexts in a worker's memory, for as long as the channel says nothing else of them.

What was read while the channel was heard is up to date until a message names it. What was read before, or while a
change came in, serves only where Redis is away. It must not know how anything is read.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

import msgspec

from cache import keys
from cache.contexts.rows import ContextRow, Tag
from cache.store.pubsub import listen
from cache.store.store import Store

ENTRIES_AT_MOST = 8192  # of each, rows and tags

T = TypeVar("T")


class Moment(NamedTuple):
    """When something was begun to be read: after how many messages, and in which hearing of the channel."""

    changes: int
    hearing: int


class Remembered(msgspec.Struct, Generic[T], frozen=True):
    """A row or a tag, and in which hearing it was read; in none where it may have changed meanwhile."""

    value: T
    hearing: int


class Entries(Generic[T]):
    """What is remembered of one kind, by tenant and name; what was read longest ago goes first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, str], Remembered[T]] = OrderedDict()

    def get(self, tenant: str, name: str) -> Remembered[T] | None:
        """What is remembered of `name`."""
        return self._entries.get((tenant, name))

    def put(self, tenant: str, name: str, remembered: Remembered[T]) -> None:
        """Remember it as what was read last."""
        self.drop(tenant, name)
        self._entries[tenant, name] = remembered
        if len(self._entries) > ENTRIES_AT_MOST:
            self._entries.popitem(last=False)

    def drop(self, tenant: str, name: str) -> None:
        """Forget `name`."""
        self._entries.pop((tenant, name), None)


class ContextMemory:
    """One per worker; `run` listens to the channel."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: Entries[ContextRow] = Entries()
        self._tags: Entries[Tag] = Entries()
        self._hearing = 0  # which hearing of the channel this is; 0 while it is not heard
        self._hearings = 0
        self._changes = 0  # messages so far

    @property
    def is_hearing(self) -> bool:
        """True while changes by others are heard of."""
        return self._hearing > 0

    def moment(self) -> Moment:
        """To be taken before a reading whose result is to be remembered."""
        return Moment(self._changes, self._hearing)

    def is_current(self, remembered: Remembered[T]) -> bool:
        """Whether it is what Redis would say now."""
        return self._hearing > 0 and remembered.hearing == self._hearing

    def row(self, tenant: str, context_id: str) -> Remembered[ContextRow] | None:
        """What is remembered of a context."""
        return self._rows.get(tenant, context_id)

    def tag(self, tenant: str, tag: str) -> Remembered[Tag] | None:
        """What is remembered of a tag."""
        return self._tags.get(tenant, tag)

    def keep_row(self, tenant: str, row: ContextRow, since: Moment) -> None:
        """Remember a row whose reading began at `since`."""
        self._rows.put(tenant, row.id, self._read_since(since, row))

    def keep_tag(self, tenant: str, tag: Tag, since: Moment) -> None:
        """Remember a tag whose reading began at `since`."""
        self._tags.put(tenant, tag.tag, self._read_since(since, tag))

    def postpone(self, tenant: str, context_id: str, expires_unix_seconds: float) -> None:
        """A remembered row ends at another time, which Redis will hear of."""
        known = self._rows.get(tenant, context_id)
        if known is not None:
            row = msgspec.structs.replace(known.value, expires_unix_seconds=expires_unix_seconds)
            self._rows.put(tenant, context_id, Remembered(row, known.hearing))

    def drop_row(self, tenant: str, context_id: str) -> None:
        """Forget a context."""
        self._rows.drop(tenant, context_id)

    def drop_tag(self, tenant: str, tag: str) -> None:
        """Forget a tag."""
        self._tags.drop(tenant, tag)

    def receive(self, payload: bytes) -> None:
        """One message of the channel: `tenant c ID` or `tenant t TAG`."""
        self._changes += 1
        try:
            tenant, kind, name = payload.decode().split(" ", 2)
        except ValueError:
            return
        if kind == "c":
            self._rows.drop(tenant, name)
        else:
            self._tags.drop(tenant, name)

    def _read_since(self, since: Moment, value: T) -> Remembered[T]:
        # something changed while it was read: it serves where Redis is away, and is read again
        return Remembered(value, since.hearing if since == self.moment() else 0)

    async def run(self) -> None:
        """Listen until cancelled."""
        await listen(self._store, keys.CONTEXTS_CHANNEL, self.receive, begun=self._begin, ended=self._end)

    def _begin(self) -> None:
        self._hearings += 1
        self._hearing = self._hearings  # what was remembered before is read again: changes went unheard

    def _end(self) -> None:
        self._hearing = 0

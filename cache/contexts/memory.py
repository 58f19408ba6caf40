"""Rows and tags of stored contexts in a worker's memory, valid until a message on the channel names them.

A value that was read while subscribed to the channel is current until a message names it. A value that was read
before, or while a change arrived, is used only while Redis is away.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, NamedTuple, Protocol, TypeVar

import msgspec

from cache import keys
from cache.contexts.rows import ContextRow, Tag
from cache.store.pubsub import listen
from cache.store.store import Store

ENTRIES_BYTES = 16 * 1024 * 1024
"""Memory for rows, and for tags: 13,000 rows with little metadata, or 400 with all that is allowed."""


class Sized(Protocol):
    """A value with an estimate of its memory, which never changes."""

    @property
    def memory_bytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Moment(NamedTuple):
    """The point at which a read began: the number of messages before it, and the subscription."""

    changes: int
    subscription: int


class Remembered(msgspec.Struct, Generic[T], frozen=True):
    """A row or a tag, and the subscription in which it was read; 0 if it may have changed meanwhile."""

    value: T
    subscription: int


class Entries(Generic[T]):
    """Remembered values of one kind, by tenant and name, at most `most_bytes`.

    The one that was read longest ago is dropped first.
    """

    def __init__(self, most_bytes: int = ENTRIES_BYTES) -> None:
        self._most_bytes = most_bytes
        self._entries: OrderedDict[tuple[str, str], Remembered[T]] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, tenant: str, name: str) -> Remembered[T] | None:
        """Return the remembered value."""
        return self._entries.get((tenant, name))

    def put(self, tenant: str, name: str, remembered: Remembered[T]) -> None:
        """Remember a value as the one that was read last."""
        self.drop(tenant, name)
        self._entries[tenant, name] = remembered
        self.size_bytes += remembered.value.memory_bytes
        while self.size_bytes > self._most_bytes:
            self.size_bytes -= self._entries.popitem(last=False)[1].value.memory_bytes

    def drop(self, tenant: str, name: str) -> None:
        """Forget a value."""
        dropped = self._entries.pop((tenant, name), None)
        if dropped is not None:
            self.size_bytes -= dropped.value.memory_bytes


class ContextMemory:
    """Rows and tags of one worker. `run` subscribes to the channel."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: Entries[ContextRow] = Entries()
        self._tags: Entries[Tag] = Entries()
        self._subscription = 0  # number of the present subscription; 0 while there is none
        self._subscriptions = 0
        self._changes = 0  # messages so far
        self.dropped_messages = 0  # messages that could not be read

    @property
    def is_subscribed(self) -> bool:
        """True if changes by other workers are received."""
        return self._subscription > 0

    def moment(self) -> Moment:
        """Return the present moment; take it before a read whose result is to be remembered."""
        return Moment(self._changes, self._subscription)

    def is_current(self, remembered: Remembered[T]) -> bool:
        """Return whether Redis has the same value now."""
        return self._subscription > 0 and remembered.subscription == self._subscription

    def row(self, tenant: str, context_id: str) -> Remembered[ContextRow] | None:
        """Return the remembered row of a context."""
        return self._rows.get(tenant, context_id)

    def tag(self, tenant: str, tag: str) -> Remembered[Tag] | None:
        """Return a remembered tag."""
        return self._tags.get(tenant, tag)

    def keep_row(self, tenant: str, row: ContextRow, since: Moment) -> None:
        """Remember a row whose read began at `since`."""
        self._rows.put(tenant, row.id, self._read_since(since, row))

    def keep_tag(self, tenant: str, tag: Tag, since: Moment) -> None:
        """Remember a tag whose read began at `since`."""
        self._tags.put(tenant, tag.tag, self._read_since(since, tag))

    def postpone(self, tenant: str, context_id: str, expires_unix_seconds: float) -> None:
        """Change the expiry of a remembered row; it is written to Redis later."""
        known = self._rows.get(tenant, context_id)
        if known is not None:
            row = msgspec.structs.replace(known.value, expires_unix_seconds=expires_unix_seconds)
            self._rows.put(tenant, context_id, Remembered(row, known.subscription))

    def drop_row(self, tenant: str, context_id: str) -> None:
        """Forget a context."""
        self._rows.drop(tenant, context_id)

    def drop_tag(self, tenant: str, tag: str) -> None:
        """Forget a tag."""
        self._tags.drop(tenant, tag)

    def receive(self, payload: bytes) -> None:
        """Handle one message of the channel: `tenant c ID` or `tenant t TAG`."""
        self._changes += 1
        try:
            tenant, kind, name = payload.decode().split(" ", 2)
        except ValueError:
            self.dropped_messages += 1
            return
        if kind == "c":
            self._rows.drop(tenant, name)
        else:
            self._tags.drop(tenant, name)

    async def run(self) -> None:
        """Listen until cancelled."""
        await listen(self._store, keys.CONTEXTS_CHANNEL, self.receive, begun=self._begin, ended=self._end)

    def _read_since(self, since: Moment, value: T) -> Remembered[T]:
        # a value that may have changed while it was read is used only while Redis is away
        return Remembered(value, since.subscription if since == self.moment() else 0)

    def _begin(self) -> None:
        self._subscriptions += 1
        self._subscription = self._subscriptions  # older values are read again: changes were missed

    def _end(self) -> None:
        self._subscription = 0

"""Reads the totals that workers keep in Redis, for the admin port and for `cairn savings`.

It opens a connection of its own when it is first asked, so that neither a worker that stands still nor one that is
not there is in the way.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime

from cache import CacheError, Store, StoreState, open_store, read_totals
from proxy.accounting.savings import By, SavingsReport, first_day, report
from proxy.clock import Clock
from proxy.tasks import Tasks


class Unreadable(Exception):
    """There are no totals to be had; the text says why, in one line."""


class TotalsReader:
    """One Redis's totals. `close` when done."""

    def __init__(self, url: str | None, clock: Clock, tasks: Tasks) -> None:
        self._url = url
        self._clock = clock
        self._tasks = tasks
        self._store: Store | None = None
        self._opening = asyncio.Lock()

    async def read(self, since: str, by: By) -> SavingsReport:
        """The savings since `since` (see `savings.first_day`) to today (UTC).

        Raises:
            ValueError: `since` is no day.
            Unreadable: Redis is away, or none is configured.
        """
        today = self._today()
        first = first_day(since, today)
        try:
            rows = await read_totals(await self._opened(), first, today)
        except CacheError as error:
            raise Unreadable(f"the totals cannot be read: {error}") from None
        return report(rows, by, first, today)

    async def close(self) -> None:
        """Close the connection."""
        if self._store is not None:
            await self._store.close()

    async def _opened(self) -> Store:
        async with self._opening:
            if self._store is None:
                self._store = open_store(self._url, clock=self._clock, tasks=self._tasks)
                await self._store.start()
        if self._store.state is StoreState.OFF:
            raise Unreadable("no Redis is configured, so no totals are kept")
        return self._store

    def _today(self) -> date:
        return datetime.fromtimestamp(self._clock.unix(), UTC).date()

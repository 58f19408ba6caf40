"""Read the totals that workers keep in Redis, for the admin port and for `cairn savings`.

The connection is opened at the first read and is independent of any worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime

from cache import CacheError, RowKey, Store, StoreState, open_store, read_totals
from proxy.accounting.savings import By, SavingsReport, first_day, report
from proxy.clock import Clock
from proxy.tasks import Tasks

_MERGED: Mapping[By, Callable[[RowKey], RowKey]] = {
    By.DAY: lambda key: RowKey(key.day, "", "", ""),
    By.MODEL: lambda key: RowKey("", key.model, "", ""),
    By.UPSTREAM: lambda key: RowKey("", "", key.upstream, ""),
    By.TENANT: lambda key: RowKey("", "", "", key.tenant),
}
"""The key of all rows that are added up to one line of a report."""


class Unreadable(Exception):
    """The totals cannot be read; the message gives the reason in one line."""


class TotalsReader:
    """The totals in one Redis. Call `close` at the end."""

    def __init__(self, url: str | None, clock: Clock, tasks: Tasks) -> None:
        self._url = url
        self._clock = clock
        self._tasks = tasks
        self._store: Store | None = None
        self._opening = asyncio.Lock()

    async def read(self, since: str, by: By) -> SavingsReport:
        """Return the savings from `since` (see `savings.first_day`) to today (UTC).

        Raises:
            ValueError: `since` is not a day.
            Unreadable: Redis is not available, or none is configured.
        """
        today = self._today()
        first = first_day(since, today)
        try:
            rows = await read_totals(await self._opened(), first, today, _MERGED[by])
        except CacheError as error:
            raise Unreadable(f"the totals cannot be read from Redis: {error}") from None
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

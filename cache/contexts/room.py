"""What all stored contexts take, which of them go when room is needed, and which are worth most.

Budgets are those in force (`Access.limits`); the rule of what is worth least is `cache.contexts.retention`'s. What a
tenant's contexts take is renewed at every change and set right by a sweep. It must not know what a context holds.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence

from cache import keys
from cache.contexts import scripts
from cache.contexts.access import Access
from cache.contexts.listing import Listing
from cache.contexts.retention import choose
from cache.contexts.rows import ContextRow
from cache.errors import CacheError, QuotaFull

log = logging.getLogger("cairn.contexts")

SWEEP_SECONDS = 60.0
SURVEY_SECONDS = 10.0  # how often it is looked which contexts are worth most, for whoever watches
SURVEYED_AT_MOST = 500  # contexts, of the tenants that have most
SHOWN_AT_MOST = 20


class ContextRoom:
    """One per worker. `evicted` is told why (a word) and how many."""

    def __init__(self, access: Access, listing: Listing, evicted: Callable[[str, int], None]) -> None:
        self._access = access
        self._listing = listing
        self._evicted = evicted
        self.total_bytes = 0
        self.total_contexts = 0
        self.most_worth: tuple[ContextRow, ...] = ()

    async def make(self, tenant: str, needed_bytes: int) -> None:
        """Discard of this tenant's contexts what is worth least. Raises QuotaFull."""
        rows = await self._listing.rows(tenant)
        victims = choose([(row.id, row.kept) for row in rows], needed_bytes)
        if not victims:
            raise QuotaFull("The budget of stored contexts is full, and what is in it is pinned or would not do.")
        await self._discard(tenant, rows, victims)

    async def make_over_all(self, extra_bytes: int) -> None:
        """Discard what is worth least of all tenants' where all of them together would be over the budget.

        Raises QuotaFull.
        """
        if not extra_bytes:
            return
        totals = await self.renew()
        over = sum(size for size, _ in totals.values()) + extra_bytes - self._access.limits.total_bytes
        if over <= 0:
            return
        rows = {tenant: await self._listing.rows(tenant) for tenant in totals}
        things = [((tenant, row.id), row.kept) for tenant, listed in rows.items() for row in listed]
        victims = choose(things, over)
        if not victims:
            raise QuotaFull("The budget of all stored contexts is full, and what is in it is pinned or would not do.")
        for tenant in dict.fromkeys(tenant for tenant, _ in victims):
            await self._discard(tenant, rows[tenant], [name for owner, name in victims if owner == tenant])

    async def _discard(self, tenant: str, rows: Iterable[ContextRow], victims: Sequence[str]) -> None:
        expired = {row.id for row in rows if row.kept.expired}
        for reason, ids in (
            ("expired", [name for name in victims if name in expired]),
            ("room", [name for name in victims if name not in expired]),
        ):
            if ids:
                await self.drop(tenant, "unpinned", ids, reason)

    async def drop(self, tenant: str, which: str, ids: Sequence[str], reason: str) -> int:
        """Take contexts away, `any` or those that are `unpinned` still; how many were there."""
        dropped, totals = await self._access.run(scripts.DROP, tenant, which, *ids)
        if int(dropped):
            self._evicted(reason, int(dropped))
            await self.changed(tenant, totals)
        return int(dropped)

    async def changed(self, tenant: str, totals: Sequence[int] | None) -> None:
        """Write what a tenant's contexts take now. What fails here the next sweep sets right."""
        if totals is None:
            return
        try:
            await self._write(tenant, *totals)
            await self.renew()
        except CacheError as error:
            log.debug("the total of contexts was not renewed: %s", error)

    async def renew(self) -> dict[str, tuple[int, int]]:
        """Bytes and number of each tenant's contexts."""
        totals = {name.decode(): _pair(value) for name, value in await self._access.hash(keys.CONTEXTS_TOTALS)}
        self.total_bytes = sum(size for size, _ in totals.values())
        self.total_contexts = sum(count for _, count in totals.values())
        return totals

    async def _write(self, tenant: str, size: int, count: int) -> None:
        if count:
            await self._access.many([("HSET", keys.CONTEXTS_TOTALS, tenant, f"{size}:{count}")])
        else:
            await self._access.many([("HDEL", keys.CONTEXTS_TOTALS, tenant)])

    # --- what is looked at now and then

    async def run_sweeps(self) -> None:
        """Have contexts swept, by one worker for all, until cancelled."""
        await self._again_and_again(self._sweep_or_renew, SWEEP_SECONDS, "swept")

    async def run_surveys(self) -> None:
        """See which contexts are worth most until cancelled."""
        await self._again_and_again(self.survey, SURVEY_SECONDS, "surveyed")

    async def _again_and_again(self, work: Callable[[], Awaitable[object]], seconds: float, done: str) -> None:
        while True:
            await self._access.store.wait_available()
            try:
                await work()
            except CacheError as error:
                log.debug("contexts were not %s: %s", done, error)
            await asyncio.sleep(seconds * random.uniform(0.8, 1.2))

    async def _sweep_or_renew(self) -> None:
        sweeping = ("SET", keys.CONTEXTS_SWEEPER, "1", "NX", "EX", round(SWEEP_SECONDS / 2))
        await (self.sweep() if (await self._access.many([sweeping]))[0] else self.renew())

    async def sweep(self) -> None:
        """Take away what is past its grace time, and renew the totals."""
        for tenant, before in (await self.renew()).items():
            swept, (size, count) = await self._access.run(scripts.SWEEP, tenant)
            if swept:
                self._evicted("expired", int(swept))
            if (size, count) != before:
                await self._write(tenant, size, count)
        await self.renew()

    async def survey(self) -> None:
        """See which contexts are worth most."""
        totals = await self.renew()
        rows: list[ContextRow] = []
        for tenant in sorted(totals, key=lambda tenant: totals[tenant], reverse=True):
            rows += await self._listing.rows(tenant)
            if len(rows) >= SURVEYED_AT_MOST:
                break
        rows.sort(key=lambda row: row.worth, reverse=True)
        self.most_worth = tuple(rows[:SHOWN_AT_MOST])


def _pair(value: bytes) -> tuple[int, int]:
    size, _, count = value.partition(b":")
    return int(size), int(count)

"""Keep stored contexts within their budgets: discard those worth least, and count the bytes of all tenants.

There is a budget per tenant and one for all tenants together. Tenants that the configuration does not list share two
more limits: one of pinned bytes, and one of bytes for tenants with unchecked keys. Room in the total and in these
shares is reserved in Redis before it is used, so that requests at several workers cannot exceed them together. The
bytes of a tenant are written after every change; a sweep corrects them and deletes expired contexts.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from heapq import nlargest
from typing import Any

from cache import keys
from cache.contexts import scripts
from cache.contexts.access import Access, Trust
from cache.contexts.listing import DAMAGED, Listing
from cache.contexts.retention import Choice, Kept, choose, least_at_once
from cache.contexts.rows import ContextRow
from cache.errors import CacheError, QuotaFull, StoreCorrupt, StoreRefused
from cache.store.replies import parsed

log = logging.getLogger("cairn.contexts")

SWEEP_SECONDS = 60.0
SURVEY_SECONDS = 10.0  # how often the contexts that are worth most are determined, for the status page
SURVEYED_AT_MOST = 500  # contexts, of the tenants with the most bytes
SHOWN_AT_MOST = 20
UNCHECKED_TENANTS_AT_MOST = 1000  # most unchecked tenants with stored contexts
UNCHECKED_TENANTS_SEARCHED = 50  # searched for contexts to discard: the tenants with the most bytes
ROOM_TRIES = 5
PARSED_AT_ONCE = 500  # tenants' totals read between two turns of the loop, in about a millisecond

Totals = tuple[int, int, int]  # bytes, contexts, pinned bytes
_Victim = tuple[str, bool]  # the id of a context, and whether it has expired
_MARKS = {Trust.LISTED: "", Trust.ACCEPTED: "1", Trust.UNCHECKED: "0"}  # as the script `context-note` takes them


class ContextRoom:
    """Room for contexts. One per worker. `evicted` is called with a reason and a number of contexts."""

    def __init__(self, access: Access, listing: Listing, evicted: Callable[[str, int], None]) -> None:
        self._access = access
        self._listing = listing
        self._evicted = evicted
        self.total_bytes = 0
        self.total_contexts = 0
        self.dropped_totals = 0  # damaged entries of tenants' totals
        self.most_worth: tuple[ContextRow, ...] = ()
        # one search among all tenants' contexts at a time: together they would read the same rows, and discard more
        self._search = asyncio.Lock()

    # --- making room

    async def make(self, tenant: str, needed_bytes: int) -> None:
        """Discard contexts of this tenant, those worth least first. Raises QuotaFull and other CacheErrors."""
        kept = [each async for some in self._listing.kept(tenant) for each in some]
        if await self._drop_damaged(tenant, kept):
            return  # the caller tries again; there may be enough room now
        victims = choose([((name, each.expired), each) for name, each in kept], needed_bytes)
        if not victims:
            raise QuotaFull(
                f"The limit of {self._access.limits.tenant_bytes:,} bytes of stored contexts is reached, and "
                "discarding all that are not pinned would not make enough room; delete or unpin one, or raise "
                "contexts.tenant_bytes."
            )
        await self._discard(tenant, victims)

    async def reserve_over_all(self, reservation: str, size_bytes: int) -> None:
        """Reserve room in the total budget; discard contexts of any tenant if needed, those worth least first.

        A second call with the same name replaces the first reservation. End it by `changed` with its name, or by
        `release`; otherwise it expires after half a minute. Raises QuotaFull and other CacheErrors.
        """
        limit = self._access.limits.total_bytes
        args = (reservation, size_bytes, limit)
        if await self._bytes_over(args) <= 0:
            return
        async with self._search:
            for _ in range(ROOM_TRIES):  # the first only looks whether another search has made room
                over = await self._bytes_over(args)
                if over <= 0:
                    return
                if not await self._discard_of(await self._counts(), over):
                    break
        raise QuotaFull(
            f"The limit of {limit:,} bytes for stored contexts of all clients is reached, and discarding all that "
            "are not pinned would not make enough room; try later, or raise contexts.total_bytes."
        )

    async def _bytes_over(self, args: tuple[str, int, int]) -> int:
        """Try to reserve room in the total budget; return the bytes that are lacking, 0 or less if it is reserved."""
        return parsed(int, await self._access.store.run_script(scripts.RESERVE_TOTAL, scripts.OVERALL_KEYS, args))

    async def release(self, reservation: str) -> None:
        """Give up a reservation in the total budget that was not used. If this fails, it expires."""
        try:
            await self._access.store.run_script(scripts.RELEASE_TOTAL, scripts.OVERALL_KEYS, (reservation,))
        except CacheError as error:
            log.debug("a reservation for stored contexts stays until it expires: %s", error)

    async def reserve(self, tenant: str, size_bytes: int, pinned_bytes: int, trust: Trust) -> None:
        """Reserve room in the shares of unlisted tenants. Call `refresh` if the room is not used after all.

        Raises QuotaFull and other CacheErrors.
        """
        if trust is Trust.LISTED:
            return
        limits = self._access.limits
        accepted = int(trust is Trust.ACCEPTED)
        shares = (limits.unchecked_bytes, limits.unlisted_pinned_bytes, UNCHECKED_TENANTS_AT_MOST)
        args = (tenant, size_bytes, pinned_bytes, accepted, *shares)
        if await self._bytes_over_share(args) <= 0:
            return
        async with self._search:
            for _ in range(ROOM_TRIES):  # the first only looks whether another search has made room
                over = await self._bytes_over_share(args)
                if over <= 0:
                    return
                if not await self._discard_of(await self._unchecked(tenant), over):
                    break
        raise QuotaFull(
            f"The limit of {limits.unchecked_bytes:,} bytes of stored contexts for clients whose keys no upstream "
            "has accepted yet is reached; send a request with this key first, list this client under clients, or "
            "raise contexts.unchecked_bytes."
        )

    async def _bytes_over_share(self, args: tuple[str | int, ...]) -> int:
        """Try to reserve room in the share; return the bytes that are lacking, 0 if it is reserved.

        Raises QuotaFull if the pinned bytes exceed their share, for which nothing is discarded.
        """
        reply = await self._access.store.run_script(scripts.RESERVE, scripts.OVERALL_KEYS, args)
        word, over = parsed(_read_reserved, reply)
        if word == b"pins":
            raise QuotaFull(
                f"The limit of {self._access.limits.unlisted_pinned_bytes:,} bytes of pinned contexts for all "
                "unlisted clients together is reached; unpin one, list this client under clients, or raise "
                "contexts.unlisted_pinned_bytes."
            )
        return 0 if word == b"ok" else max(over, 1)

    async def _counts(self) -> dict[str, int]:
        """Return the number of each tenant's contexts."""
        return {tenant: count for tenant, (_, count) in (await self.renew()).items()}

    async def _unchecked(self, asking: str) -> dict[str, int]:
        """Return the number of contexts of the unchecked tenants with most bytes, and of the one that asks."""
        sizes: dict[str, int] = {}
        for name, value in await self._access.hash(keys.CONTEXTS_UNLISTED):
            try:
                tenant, (size, _, accepted, _) = _tenant_name(name), parsed(_read_numbers, value)
            except (StoreCorrupt, ValueError):
                self.dropped_totals += 1
                continue
            if not accepted:
                sizes[tenant] = size
        largest = sorted(sizes, key=lambda tenant: sizes[tenant], reverse=True)[:UNCHECKED_TENANTS_SEARCHED]
        counts = await self._counts()
        return {tenant: counts.get(tenant, 0) for tenant in {*largest, *({asking} & sizes.keys())}}

    async def _discard_of(self, counts: Mapping[str, int], needed_bytes: int) -> bool:
        """Discard contexts of several tenants, those worth least first; return False if that would not free enough.

        `counts` has the number of each tenant's contexts. If there are damaged ones, only those are discarded, and
        the caller tries again.
        """
        choice: Choice[tuple[str, _Victim]] = Choice(needed_bytes, least_at_once(sum(counts.values())))
        damaged = 0
        for tenant in counts:
            async for some in self._listing.kept(tenant):
                damaged += await self._drop_damaged(tenant, some)
                for name, each in some:
                    choice.consider((tenant, (name, each.expired)), each)
        if damaged:
            return True
        by_tenant: defaultdict[str, list[_Victim]] = defaultdict(list)
        for tenant, victim in choice.chosen() or ():
            by_tenant[tenant].append(victim)
        for tenant, victims in by_tenant.items():
            await self._discard(tenant, victims)
        return bool(by_tenant)

    async def _drop_damaged(self, tenant: str, kept: Iterable[tuple[str, Kept]]) -> int:
        """Delete damaged contexts, whose size is not known; return how many there were."""
        damaged = [name for name, each in kept if each is DAMAGED]
        return await self.drop(tenant, "any", damaged, "damaged") if damaged else 0

    async def _discard(self, tenant: str, victims: Sequence[_Victim]) -> None:
        for reason, ids in (
            ("expired", [name for name, expired in victims if expired]),
            ("room", [name for name, expired in victims if not expired]),
        ):
            if ids:
                await self.drop(tenant, "unpinned", ids, reason)

    async def drop(self, tenant: str, which: str, ids: Sequence[str], reason: str) -> int:
        """Delete contexts: `any` of `ids`, or those that are still `unpinned`. Return how many existed."""
        existed = 0
        for start in range(0, len(ids), scripts.DROPPED_AT_ONCE):
            some = ids[start : start + scripts.DROPPED_AT_ONCE]
            dropped, totals = await self._access.run(scripts.DROP, tenant, which, *some, read=_read_counted)
            if dropped:
                existed += dropped
                self._evicted(reason, dropped)
                await self.changed(tenant, totals)
        return existed

    # --- totals

    async def changed(
        self, tenant: str, totals: Totals | None, trust: Trust = Trust.LISTED, reservation: str = ""
    ) -> None:
        """Write the totals of a tenant's contexts, and end a reservation of `reserve_over_all`.

        If this fails, the next sweep corrects it.
        """
        if totals is None:
            if reservation:
                await self.release(reservation)
            return
        try:
            await self._write(tenant, totals, _MARKS[trust], *([reservation] if reservation else []))
        except CacheError as error:
            log.debug("the total of stored contexts was not updated: %s", error)

    async def refresh(self, tenant: str) -> None:
        """Write the real totals of a tenant's contexts, after a reservation that was not used."""
        try:
            totals = await self._access.run(scripts.TOTALS, tenant, read=read_totals)
        except CacheError as error:
            log.debug("a reservation for stored contexts stays until the next sweep: %s", error)
            return
        await self.changed(tenant, totals)

    async def renew(self) -> dict[str, tuple[int, int]]:
        """Return bytes and number of each tenant's contexts. Raises CacheError."""
        totals: dict[str, tuple[int, int]] = {}
        for at, (name, value) in enumerate(await self._access.hash(keys.CONTEXTS_TOTALS), 1):
            if at % PARSED_AT_ONCE == 0:
                await asyncio.sleep(0)
            try:
                size, count = parsed(_read_numbers, value)
                totals[_tenant_name(name)] = size, count
            except (StoreCorrupt, ValueError):
                self.dropped_totals += 1
        self.total_bytes = sum(size for size, _ in totals.values())
        self.total_contexts = sum(count for _, count in totals.values())
        return totals

    async def _write(self, tenant: str, totals: Totals, mark: str, *rest: str | bytes) -> None:
        reply = await self._access.store.run_script(
            scripts.NOTE, scripts.OVERALL_KEYS, (tenant, *totals, mark, *rest)
        )
        self.total_bytes, self.total_contexts = parsed(_read_sums, reply)

    # --- in the background

    async def run_sweeps(self) -> None:
        """Sweep from time to time, in one worker at a time, until cancelled."""
        await self._repeat(self._sweep_or_renew, SWEEP_SECONDS, "swept")

    async def run_surveys(self) -> None:
        """Determine from time to time which contexts are worth most, until cancelled."""
        await self._repeat(self.survey, SURVEY_SECONDS, "surveyed")

    async def _repeat(self, work: Callable[[], Awaitable[object]], seconds: float, done: str) -> None:
        while True:
            await self._access.store.wait_available()
            try:
                await work()
            except CacheError as error:
                log.debug("stored contexts were not %s: %s", done, error)
            await asyncio.sleep(seconds * random.uniform(0.8, 1.2))

    async def _sweep_or_renew(self) -> None:
        swept_keys = (keys.CONTEXTS_SWEEPER, *scripts.OVERALL_KEYS)
        args = (round(SWEEP_SECONDS * 500),)
        sweeps = parsed(int, await self._access.store.run_script(scripts.BEGIN_SWEEP, swept_keys, args))
        await (self.sweep() if sweeps else self.renew())

    async def sweep(self) -> None:
        """Delete contexts whose grace time is over, and correct the totals. Raises CacheError."""
        unlisted = [name for name, _ in await self._access.hash(keys.CONTEXTS_UNLISTED)]
        tenants = dict.fromkeys(await self.renew())
        for name in unlisted:
            try:
                tenants[_tenant_name(name)] = None
            except ValueError:
                self.dropped_totals += 1
        for tenant in tenants:
            try:
                await self._sweep_one(tenant)
            except (StoreCorrupt, StoreRefused):  # damaged data of one tenant must not keep others from being swept
                self.dropped_totals += 1
        await self.renew()

    async def _sweep_one(self, tenant: str) -> None:
        entries = [("HGET", key, tenant) for key in (keys.CONTEXTS_TOTALS, keys.CONTEXTS_UNLISTED)]
        before = [value or b"" for value in await self._access.many(entries)]
        swept, totals = await self._access.run(scripts.SWEEP, tenant, read=_read_counted)
        await self._write(tenant, totals, "sweep", *before)
        if swept:
            self._evicted("expired", swept)

    async def survey(self) -> None:
        """Determine which contexts are worth most. Raises CacheError."""
        totals = await self.renew()
        rows: list[ContextRow] = []
        for tenant in nlargest(SURVEYED_AT_MOST, totals, key=totals.__getitem__):  # each has one context or more
            rows += await self._listing.rows(tenant)
            if len(rows) >= SURVEYED_AT_MOST:
                break
        rows.sort(key=lambda row: row.worth, reverse=True)
        self.most_worth = tuple(rows[:SHOWN_AT_MOST])


def read_totals(reply: Any) -> Totals:
    """Read the script's `totals()`."""
    size, count, pinned = reply
    return max(0, int(size)), max(0, int(count)), max(0, int(pinned))


def _read_sums(reply: Any) -> tuple[int, int]:
    size, count = reply
    return int(size), int(count)


def _read_counted(reply: Any) -> tuple[int, Totals]:
    count, totals = reply
    return int(count), read_totals(totals)


def _read_reserved(reply: Any) -> tuple[bytes, int]:
    word, over = reply
    return bytes(word), int(over)


def _read_numbers(value: bytes) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in value.split(b":"))
    if not all(0 <= number < 2**53 for number in numbers):
        raise ValueError("out of range")
    return numbers


def _tenant_name(name: bytes) -> str:
    """Return a tenant's keyed hash. Raises ValueError if it cannot be one."""
    tenant = name.decode()
    keys.tenant(tenant)
    return tenant

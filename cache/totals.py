"""Sums that outlive every process: per day, model, upstream and tenant, one hash a day in Redis.

A row is added to in memory; what came since the last time goes to Redis in one script about once a second, so that a
crash costs a second at most. A batch has a number, and the script notes the last number of each writer: sent twice,
because an answer was lost, it counts once. With Redis away rows gather, bounded, and are written when it is back. It
knows integers and names, and nothing of prices, requests or metrics.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from datetime import date, timedelta
from typing import NamedTuple

import msgspec

from cache import keys
from cache.errors import CacheError, StoreRefused
from cache.store.replies import hash_pairs
from cache.store.store import Script, Store

FLUSH_SECONDS = 0.9  # with the write itself a crash loses no more than a second
WRITE_LIMIT_SECONDS = 1.0  # of one batch; nobody waits for it
READ_LIMIT_SECONDS = 5.0
ROWS_PENDING = 4096  # while Redis is away; beyond them tenants are no longer told apart
TENANTS_A_DAY = 1000  # that a writer tells apart; keys may be made up, and each costs a row
BATCH_ROWS = 256  # some 3,000 increments, 2 ms of Redis's time
KEPT_DAYS = 400
WRITER_SECONDS = 86_400  # how long a writer's last number is known; it sends again within seconds
READ_DAYS = 31  # in one round trip
OTHER = "other"

log = logging.getLogger("cairn.totals")


class Sums(msgspec.Struct):
    """What is added up. Amounts of money are integers of 1e-12 USD, in which every list price per token is whole.

    `prompt_tokens` includes cached and written ones; `unknown_tokens` are those of answers that could not say what
    was cached. `missing` counts answers cut before their usage, `unpriced` those with usage and without a price.
    """

    answers: int = 0
    missing: int = 0
    unpriced: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    output_tokens: int = 0
    unknown_tokens: int = 0
    input_picos: int = 0  # had nothing been cached or written
    output_picos: int = 0
    saving_picos: int = 0
    surcharge_picos: int = 0
    routing_gain_tokens: int = 0  # cached beyond what round robin would have had
    prefill_micros: int = 0  # seconds of prefill that cached tokens spared, in 1e-6

    def add(self, other: Sums) -> None:
        """Add another's figures to these."""
        for field in _FIGURES:
            setattr(self, field, getattr(self, field) + getattr(other, field))


_FIGURES = Sums.__struct_fields__


class RowKey(NamedTuple):
    """What a row is about; `day` is an ISO date."""

    day: str
    model: str
    upstream: str
    tenant: str


class _Batch(msgspec.Struct, frozen=True):
    number: int
    days: tuple[str, ...]
    args: tuple[str | int, ...]  # for each day the number of its increments, then field and amount of each


_ADD = Script(
    "add-totals",
    """
local number = tonumber(ARGV[1])
if tonumber(redis.call('GET', KEYS[1]) or '0') >= number then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
local at = 4
for day = 2, #KEYS do
  local last = at + 2 * tonumber(ARGV[at])
  for field = at + 1, last, 2 do redis.call('HINCRBY', KEYS[day], ARGV[field], ARGV[field + 1]) end
  redis.call('EXPIRE', KEYS[day], ARGV[3])
  at = last + 1
end
return 1
""",
)
"""1 where the batch counted, 0 where it had before. The number is noted first: what fails half-way is lost, not
counted twice."""


class Totals:
    """The writer's side; one per worker. `writer_id` is unlike any other's."""

    def __init__(self, store: Store, writer_id: str) -> None:
        self._store = store
        self._writer = keys.totals_writer(writer_id)
        self._pending: dict[RowKey, Sums] = {}
        self._sending: _Batch | None = None
        self._written = 0
        self._tenants: tuple[str, set[str]] = ("", set())
        self._flushing = asyncio.Lock()
        self.refused_batches = 0  # that Redis would not take, and that are lost

    def row(self, day: str, model: str, upstream: str, tenant: str) -> Sums:
        """The row to add to, now and without waiting in between; the next one may be another object."""
        key = RowKey(day, model, upstream, tenant)
        row = self._pending.get(key)
        return self._new_row(key) if row is None else row

    @property
    def pending_rows(self) -> int:
        """Rows that are not in a batch yet."""
        return len(self._pending)

    async def run(self) -> None:
        """Write about once a second until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> bool:
        """Write what is there; False where Redis took not all of it, which is then tried again."""
        async with self._flushing:
            while batch := self._next_batch():
                try:
                    await self._write(batch)
                except StoreRefused as error:
                    self.refused_batches += 1
                    log.error("totals of %d increments are lost: %s", len(batch.args) // 2, error)  # noqa: TRY400
                except CacheError:  # the store has counted it; the same batch goes again
                    return False
                self._sending = None
        return True

    async def _write(self, batch: _Batch) -> None:
        args = (batch.number, WRITER_SECONDS, KEPT_DAYS * 86_400, *batch.args)
        days = [keys.totals_day(day) for day in batch.days]
        await self._store.run_script(_ADD, [self._writer, *days], args, WRITE_LIMIT_SECONDS)

    def _new_row(self, key: RowKey) -> Sums:
        if not self._may_tell_apart(key):
            key = key._replace(tenant=OTHER)
        return self._pending.setdefault(key, Sums())

    def _may_tell_apart(self, key: RowKey) -> bool:
        day, tenants = self._tenants
        if day != key.day:
            tenants = set()
            self._tenants = (key.day, tenants)
        if len(self._pending) >= ROWS_PENDING:
            return False
        if len(tenants) < TENANTS_A_DAY:
            tenants.add(key.tenant)
        return key.tenant in tenants

    def _next_batch(self) -> _Batch | None:
        """The one that is under way, which stays as it is until it is known to have arrived, or a new one."""
        if self._sending is None and self._pending:
            taken = [(key, self._pending.pop(key)) for key in list(self._pending)[:BATCH_ROWS]]
            self._written += 1
            by_day: dict[str, list[str | int]] = {}
            for key, sums in taken:
                by_day.setdefault(key.day, []).extend(_increments(key, sums))
            args = [part for each in by_day.values() for part in (len(each) // 2, *each)]
            self._sending = _Batch(self._written, tuple(by_day), tuple(args))
        return self._sending


def _increments(key: RowKey, sums: Sums) -> Iterator[str | int]:
    for figure in _FIGURES:
        if amount := getattr(sums, figure):
            yield msgspec.json.encode((figure, key.model, key.upstream, key.tenant)).decode()
            yield amount


# --- reading


async def read_totals(store: Store, first: date, last: date) -> dict[RowKey, Sums]:
    """The rows of all days from `first` to `last`; no more than the `KEPT_DAYS` before `last`. Raises CacheError."""
    count = min((last - first).days + 1, KEPT_DAYS + 1)
    days = [(last - timedelta(days=back)).isoformat() for back in range(count - 1, -1, -1)]
    rows: dict[RowKey, Sums] = {}
    for start in range(0, len(days), READ_DAYS):
        chunk = days[start : start + READ_DAYS]
        commands = [("HGETALL", keys.totals_day(day)) for day in chunk]
        for day, reply in zip(chunk, await store.execute_many(commands, READ_LIMIT_SECONDS), strict=True):
            for field, amount in hash_pairs(reply):
                _take_in(rows, day, field, amount)
            await asyncio.sleep(0)
    return rows


def _take_in(rows: dict[RowKey, Sums], day: str, field: bytes, amount: bytes) -> None:
    """One field of a day's hash; what this version does not know is passed over."""
    try:
        figure, model, upstream, tenant = _decode_field(field)
        value = int(amount)
    except (msgspec.MsgspecError, ValueError):
        return
    if figure in _FIGURES:
        sums = rows.setdefault(RowKey(day, model, upstream, tenant), Sums())
        setattr(sums, figure, getattr(sums, figure) + value)


_decode_field = msgspec.json.Decoder(tuple[str, str, str, str]).decode

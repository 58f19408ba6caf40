"""Totals that outlive every process: sums per day, model, upstream and tenant, in one Redis hash per day.

Amounts are added to rows in memory. About once a second one script adds them in Redis, so a crash loses at most a
second. Each batch has a number, and the script stores the last number of each writer: a batch that is sent twice,
because a reply was lost, counts once. While Redis is away or refuses writes the rows wait, up to a bound.

This module handles integers and names only, not prices, requests or metrics.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import date, timedelta
from typing import Any, NamedTuple

import msgspec

from cache import keys
from cache.errors import CacheError, ErrorKind, StoreRefused
from cache.store.lua import DROP_UNLESS
from cache.store.replies import hash_pairs, parsed
from cache.store.store import Script, Store, StoreState

FLUSH_SECONDS = 0.9  # with the write itself, a crash loses at most a second
WRITE_LIMIT_SECONDS = 1.0  # of one batch; nothing waits for it
CLOSE_SECONDS = 1.5  # for the last rows; a worker that has drained for as long as it may is killed after two
CLOSE_PAUSE_SECONDS = 0.05  # between two tries to write them
READ_LIMIT_SECONDS = 5.0
ROWS_PENDING = 4096  # rows that may wait for Redis; beyond, new rows are counted under the tenant `other`
TENANTS_A_DAY = 1000  # counted separately by one writer: keys can be made up, and each costs a row
BATCH_ROWS = 256  # about 3,000 increments, 2 ms of Redis's time
KEPT_DAYS = 400
WRITER_SECONDS = 86_400  # how long a writer's last number is kept; it sends again within seconds
READ_DAYS = 4  # read in one round trip: a day may have tens of thousands of fields, which are in memory until added
MAX_AMOUNT = 2**63 - 1  # Redis counts in signed 64 bits
OTHER = "other"

log = logging.getLogger("cairn.totals")


class Sums(msgspec.Struct):
    """The figures of a row. Amounts of money are integers of 1e-12 USD, in which every list price is whole.

    `prompt_tokens` includes cached and written ones; `unknown_tokens` belong to responses that did not report cached
    tokens. `missing` counts responses that ended before their usage, `unpriced` those without a price.
    """

    answers: int = 0
    missing: int = 0
    unpriced: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    output_tokens: int = 0
    unknown_tokens: int = 0
    input_picos: int = 0  # cost of the input if nothing had been cached or written
    output_picos: int = 0
    saving_picos: int = 0
    surcharge_picos: int = 0
    routing_gain_tokens: int = 0  # cached tokens in excess of those that round robin would have had
    prefill_micros: int = 0  # prefill time that cached tokens saved, in 1e-6 s

    def add(self, other: Sums) -> None:
        """Add the figures of `other`."""
        for field in _FIGURES:
            setattr(self, field, getattr(self, field) + getattr(other, field))


_FIGURES = Sums.__struct_fields__


class RowKey(NamedTuple):
    """Key of a row of totals. `day` is an ISO date."""

    day: str
    model: str
    upstream: str
    tenant: str


class _Batch(msgspec.Struct, frozen=True):
    number: int
    days: tuple[str, ...]
    args: tuple[str | int, ...]  # for each day the number of increments, then each one's field and amount


# Reply: the number of increments that Redis could not add, -1 if the batch had been counted before. The number is
# stored first: an error in the middle loses the rest instead of counting twice. A day of the wrong type and a field
# that is not a number are replaced.
_ADD = Script(
    "add-totals",
    DROP_UNLESS
    + """
local number = tonumber(ARGV[1])
local last_number = redis.pcall('GET', KEYS[1])
if type(last_number) == 'string' and (tonumber(last_number) or 0) >= number then return -1 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
local at, failed = 4, 0
local function add(key, field, amount)
  local reply = redis.pcall('HINCRBY', key, field, amount)
  return type(reply) ~= 'table' or not reply.err
end
for day = 2, #KEYS do
  drop_unless('hash', KEYS[day])
  local last = at + 2 * tonumber(ARGV[at])
  for field = at + 1, last, 2 do
    if not add(KEYS[day], ARGV[field], ARGV[field + 1]) then
      local found = redis.call('HGET', KEYS[day], ARGV[field])
      if found and not string.match(found, '^-?%d+$') then redis.call('HDEL', KEYS[day], ARGV[field]) end
      if not add(KEYS[day], ARGV[field], ARGV[field + 1]) then failed = failed + 1 end
    end
  end
  redis.call('EXPIRE', KEYS[day], ARGV[3])
  at = last + 1
end
return failed
""",
)


class Totals:
    """Sums amounts and writes them to Redis. One per worker; `writer_id` must be unique.

    `lost_increments` counts amounts that Redis could not add; `merged_rows` counts rows that were counted under the
    tenant `other` because too many waited for Redis.
    """

    def __init__(self, store: Store, writer_id: str) -> None:
        self._store = store
        self._writer = keys.totals_writer(writer_id)
        self._pending: dict[tuple[str, str, str, str], Sums] = {}  # by `RowKey`
        self._sending: _Batch | None = None
        self._written = 0
        self._tenants: tuple[str, set[str]] = ("", set())
        self._flushing = asyncio.Lock()
        self.refused_batches = 0
        self.lost_increments = 0
        self.merged_rows = 0

    def row(self, day: str, model: str, upstream: str, tenant: str) -> Sums:
        """Return the row to add to. Use it before the next await: later calls may return another object."""
        row = self._pending.get((day, model, upstream, tenant))  # a RowKey equals it and takes far longer to make
        return self._new_row(RowKey(day, model, upstream, tenant)) if row is None else row

    @property
    def pending_rows(self) -> int:
        """Number of rows that are not in a batch yet."""
        return len(self._pending)

    @property
    def dropped(self) -> dict[str, int]:
        """Numbers of amounts that were lost, and of rows that lost their tenant."""
        return {"total_lost": self.lost_increments, "total_without_tenant": self.merged_rows}

    async def run(self) -> None:
        """Write about once a second until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> bool:
        """Write all pending rows. Return False if Redis did not take all; the rest is tried again."""
        async with self._flushing:
            while batch := self._next_batch():
                refused: StoreRefused | None = None
                try:
                    self._note_failures(await self._write(batch))
                except StoreRefused as error:
                    refused = error
                except CacheError:  # due to Redis: the store has counted it, and the same batch is sent again
                    return False
                if refused is not None:
                    if not await self._is_served():
                        return False
                    self.refused_batches += 1  # due to this batch: it would be refused again
                    self._note_failures(len(batch.args) // 2, refused)
                self._sending = None
        return True

    async def _is_served(self) -> bool:
        """Return whether Redis answers a command that it has no reason to refuse."""
        try:
            await self._store.execute("EXISTS", self._writer)
        except CacheError:
            return False
        return True

    async def close(self) -> None:
        """Write what is pending, and try again for `CLOSE_SECONDS` as long as Redis does not take it."""
        is_written = self._store.state is StoreState.OFF
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                while not is_written:
                    is_written = await self.flush()
                    await asyncio.sleep(0 if is_written else CLOSE_PAUSE_SECONDS)
        if not is_written:
            log.error("the totals of the last requests were not written: Redis did not take them in time")

    async def _write(self, batch: _Batch) -> int:
        args = (batch.number, WRITER_SECONDS, KEPT_DAYS * 86_400, *batch.args)
        days = [keys.totals_day(day) for day in batch.days]
        return parsed(int, await self._store.run_script(_ADD, [self._writer, *days], args, WRITE_LIMIT_SECONDS))

    def _note_failures(self, count: int, error: CacheError | None = None) -> None:
        if count > 0:
            self.lost_increments += count
            log.error("Redis did not add %d increments of totals: %s", count, error or "damaged fields")

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
            self.merged_rows += 1
            return False
        if len(tenants) < TENANTS_A_DAY:
            tenants.add(key.tenant)
        return key.tenant in tenants

    def _next_batch(self) -> _Batch | None:
        """Return the batch that is being sent, until it is known to have arrived; otherwise a new one."""
        if self._sending is None and self._pending:
            taken = [(RowKey(*key), self._pending.pop(key)) for key in list(self._pending)[:BATCH_ROWS]]
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
            yield max(-MAX_AMOUNT, min(amount, MAX_AMOUNT))


# --- reading


async def read_totals(
    store: Store, first: date, last: date, merge: Callable[[RowKey], RowKey] = lambda key: key
) -> dict[RowKey, Sums]:
    """Return the rows of all days from `first` to `last`, at most `KEPT_DAYS` + 1 days. Raises CacheError.

    Rows for which `merge` returns the same key are added up while they are read, so that fewer are in memory.
    """
    count = min((last - first).days + 1, KEPT_DAYS + 1)
    days = [(last - timedelta(days=back)).isoformat() for back in range(count - 1, -1, -1)]
    rows: dict[RowKey, Sums] = {}
    for start in range(0, len(days), READ_DAYS):
        chunk = days[start : start + READ_DAYS]
        for day, reply in zip(chunk, await _read_days(store, chunk), strict=True):
            for field, amount in parsed(hash_pairs, reply):
                _add_field(rows, day, field, amount, merge)
            await asyncio.sleep(0)
    return rows


async def _read_days(store: Store, days: Sequence[str]) -> list[Any]:
    """Return the reply for each day, an empty one for a day of the wrong type. Raises CacheError."""
    commands = [("HGETALL", keys.totals_day(day)) for day in days]
    try:
        return await store.execute_many(commands, READ_LIMIT_SECONDS)
    except StoreRefused as error:
        if error.kind is not ErrorKind.WRONGTYPE:
            raise
        if len(days) == 1:
            log.warning("the totals of %s are damaged and are left out", days[0])
            return [()]
        return [reply for day in days for reply in await _read_days(store, [day])]


def _add_field(
    rows: dict[RowKey, Sums], day: str, field: bytes, amount: bytes, merge: Callable[[RowKey], RowKey]
) -> None:
    """Add one field of a day's hash; ignore one that this version does not know or that is damaged."""
    try:
        figure, model, upstream, tenant = _decode_field(field)
        value = int(amount)
    except (msgspec.MsgspecError, ValueError, TypeError):
        return
    if figure in _FIGURES and abs(value) <= MAX_AMOUNT:
        sums = rows.setdefault(merge(RowKey(day, model, upstream, tenant)), Sums())
        setattr(sums, figure, getattr(sums, figure) + value)


_decode_field = msgspec.json.Decoder(tuple[str, str, str, str]).decode

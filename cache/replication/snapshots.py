"""The lease, the snapshots and the trimming of the stream, in Redis.

One script maintains the lease once a second. Another commits a snapshot: its parts are written before, with an
expiry, and count only once the commit names them. Keys of the journal with a wrong type, or with a value that Cairn
does not write, are replaced, so that damage repairs itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from cache import keys
from cache.errors import StoreCorrupt
from cache.store.lua import DROP_UNLESS
from cache.store.replies import parsed, text, text_or_none
from cache.store.store import Script, Store

PARTS_AT_ONCE = 8  # in one round trip, about 500 KB: a busy worker takes milliseconds for each
CHUNK_LIMIT_SECONDS = 1.0  # of reading or writing so many
CHUNK_EXPIRY_SECONDS = 120  # of a part that no commit has named yet
PRESENCE_SECONDS = 5  # a writer that is silent for longer no longer counts
TRIM_AGE_SECONDS = 10.0  # younger entries are not trimmed: only a reader that stalls for longer falls behind
MAX_PARTS = 100_000  # the largest index has about 20,000

# Reply: 1 if the lease is ours, the generation, the id up to which the stream was trimmed, the number of live
# writers, the stream's last id, 1 if there is a snapshot. It runs while Redis refuses writes, whose errors are
# ignored, so that readers still learn what they can.
_TICK = Script(
    "tick",
    DROP_UNLESS
    + """
for i, kind in ipairs({'string', 'hash', 'string', 'zset', 'stream'}) do
  pcall(drop_unless, kind, KEYS[i])
end
local function get(command, ...)
  local reply = redis.pcall(command, ...)
  if type(reply) == 'table' and reply.err then return false end
  return reply
end
local holder = get('GET', KEYS[1])
if not holder then
  redis.pcall('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  holder = get('GET', KEYS[1])
else
  local left = redis.call('PTTL', KEYS[1])
  if holder == ARGV[1] or left < 0 or left > 2 * ARGV[2] then redis.pcall('PEXPIRE', KEYS[1], ARGV[2]) end
end
redis.pcall('SET', KEYS[3], ARGV[3], 'NX')
local now = tonumber(redis.call('TIME')[1])
redis.pcall('ZADD', KEYS[4], now, ARGV[1])
redis.pcall('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - ARGV[4])
redis.pcall('ZREMRANGEBYSCORE', KEYS[4], now + ARGV[4], '+inf')
local tip = '0-0'
if redis.call('EXISTS', KEYS[5]) == 1 then
  local facts = get('XINFO', 'STREAM', KEYS[5]) or {}
  for i = 1, #facts, 2 do
    if facts[i] == 'last-generated-id' then tip = facts[i + 1] end
  end
  if tip == '18446744073709551615-18446744073709551615' then
    redis.pcall('UNLINK', KEYS[5]) -- nothing can be appended to a stream with the last possible id
    tip = '0-0'
  end
end
return {
  holder == ARGV[1] and 1 or 0,
  get('GET', KEYS[3]) or '',
  get('HGET', KEYS[2], 'trimmed') or '0-0',
  get('ZCARD', KEYS[4]) or 1,
  tip,
  redis.call('EXISTS', KEYS[2]),
}
""",
    writes=False,
)

# KEYS: lease, snapshot, stream, then the new parts. ARGV: writer, snapshot's id, stream id, trim id.
# Reply: 1, or 0 if another writer has the lease or a part has expired.
_COMMIT = Script(
    "commit-snapshot",
    f"local most = {MAX_PARTS}"
    """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for i = 4, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then return 0 end
end
for i = 4, #KEYS do redis.call('PERSIST', KEYS[i]) end
local old = redis.call('HMGET', KEYS[2], 'id', 'parts')
redis.call('HSET', KEYS[2], 'id', ARGV[2], 'stream_id', ARGV[3], 'trimmed', ARGV[4], 'parts', #KEYS - 3)
if old[1] and old[1] ~= ARGV[2] then
  for i = 0, math.min(tonumber(old[2]) or 0, most) - 1 do
    redis.call('UNLINK', KEYS[2] .. ':' .. old[1] .. ':' .. i)
  end
end
redis.call('XTRIM', KEYS[3], 'MINID', ARGV[4])
return 1
""",
)

_LEAVE = Script(
    "leave",
    """
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
""",
)

StreamId = tuple[int, int]
START: StreamId = (0, 0)


def parse_id(written: bytes) -> StreamId:
    """Return a stream's id as two numbers, which compare as Redis orders them. Raises StoreCorrupt."""
    milliseconds, _, number = written.partition(b"-")
    try:
        found = int(milliseconds), int(number or b"0")
    except ValueError as error:
        raise StoreCorrupt("a stream id is damaged") from error
    if not (0 <= found[0] < 2**64 and 0 <= found[1] < 2**64):
        raise StoreCorrupt("a stream id is out of range")
    return found


def format_id(stream_id: StreamId) -> bytes:
    """Return a stream's id as Redis writes it."""
    return b"%d-%d" % stream_id


class Tick(msgspec.Struct, frozen=True, gc=False):
    """The state of lease and stream. `generation` is empty if Redis had no room for it."""

    holds_lease: bool
    generation: bytes
    trimmed: StreamId
    writers: int
    tip: StreamId
    has_snapshot: bool = True


class SnapshotHead(msgspec.Struct, frozen=True, gc=False):
    """The committed snapshot. It contains the stream up to `stream_id`."""

    id: str
    stream_id: StreamId
    parts: int


class LeaseAndSnapshots:
    """The lease and the snapshots, for one writer."""

    def __init__(self, store: Store, writer_id: str, *, lease_seconds: float) -> None:
        self._store = store
        self._writer = writer_id
        self._lease_ms = max(1, round(lease_seconds * 1000))

    async def tick(self, new_generation: str) -> Tick:
        """Take or renew the lease, announce this writer, and return the state. Raises CacheError."""
        script_keys = (keys.LEASE, keys.SNAPSHOT, keys.GENERATION, keys.WRITERS, keys.JOURNAL)
        args = (self._writer, self._lease_ms, new_generation, PRESENCE_SECONDS)
        return parsed(_read_tick, await self._store.run_script(_TICK, script_keys, args))

    async def leave(self) -> None:
        """Give up the lease, if it is ours, so that another writer gets it at once. Raises CacheError."""
        await self._store.run_script(_LEAVE, (keys.LEASE, keys.WRITERS), (self._writer,))

    async def put_parts(self, snapshot: str, first: int, parts: Sequence[bytes]) -> None:
        """Write parts of a snapshot that is not committed yet, numbered from `first` on. Raises CacheError."""
        commands = [
            ("SET", keys.snapshot_chunk(snapshot, number), part, "EX", CHUNK_EXPIRY_SECONDS)
            for number, part in enumerate(parts, first)
        ]
        await self._store.execute_many(commands, CHUNK_LIMIT_SECONDS)

    async def commit(self, snapshot: str, parts: int, stream_id: StreamId, now_unix_seconds: float) -> bool:
        """Commit a snapshot, delete the previous one, and trim the stream to it.

        Returns False if another writer has the lease. Raises CacheError.
        """
        oldest_kept = (max(0, int((now_unix_seconds - TRIM_AGE_SECONDS) * 1000)), 0)
        trimmed = min(stream_id, oldest_kept)
        script_keys = [keys.LEASE, keys.SNAPSHOT, keys.JOURNAL]
        script_keys += [keys.snapshot_chunk(snapshot, number) for number in range(parts)]
        args = (self._writer, snapshot, format_id(stream_id), format_id(trimmed))
        reply = await self._store.run_script(_COMMIT, script_keys, args, limit_seconds=CHUNK_LIMIT_SECONDS)
        return bool(reply)

    async def head(self) -> SnapshotHead | None:
        """Return the committed snapshot, None if there is none. Raises StoreCorrupt and other CacheErrors."""
        reply = await self._store.execute("HMGET", keys.SNAPSHOT, "id", "stream_id", "parts")
        return parsed(_read_head, reply)

    async def fetch(self) -> tuple[SnapshotHead, list[bytes | None]] | None:
        """Return the committed snapshot and its parts in order, None for a lost part; None if there is no snapshot.

        If a newer snapshot replaces it meanwhile, the newer one is fetched. Raises CacheError.
        """
        head = await self.head()
        while head is not None:
            parts: list[bytes | None] = []
            while len(parts) < head.parts:
                parts += await self._parts(head, len(parts))
            again = head if None not in parts else await self.head()
            if again == head:
                return head, parts
            head = again
        return None

    async def _parts(self, head: SnapshotHead, first: int) -> list[bytes | None]:
        numbers = range(first, min(first + PARTS_AT_ONCE, head.parts))
        commands = [("GET", keys.snapshot_chunk(head.id, number)) for number in numbers]
        replies = await self._store.execute_many(commands, CHUNK_LIMIT_SECONDS)
        return [parsed(text_or_none, reply) for reply in replies]


def _read_tick(reply: Any) -> Tick:
    ours, generation, trimmed, writers, tip, snapshots = reply
    tip_id, has_snapshot = parse_id(tip), bool(snapshots)
    try:
        trimmed_id = parse_id(trimmed)
    except StoreCorrupt:
        trimmed_id, has_snapshot = START, False
    if trimmed_id > tip_id:  # the snapshot is damaged, or of a stream that was lost; the next one replaces it
        trimmed_id, has_snapshot = START, False
    return Tick(bool(ours), text(generation), trimmed_id, int(writers), tip_id, has_snapshot)


def _read_head(reply: Any) -> SnapshotHead | None:
    if None in reply:
        return None
    head = SnapshotHead(reply[0].decode(), parse_id(reply[1]), int(reply[2]))
    if not 0 <= head.parts <= MAX_PARTS:
        raise StoreCorrupt("the snapshot's head has an impossible number of parts")
    return head

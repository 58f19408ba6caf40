"""The journal's keeping: who holds the lease, whole copies of the index, and how far the stream may be trimmed.

It knows Redis's side alone; what a snapshot holds is rows to it. One script looks after the lease once a second, one
commits a snapshot: the parts are written before, with an expiry, and count only once the commit names them.
"""

from __future__ import annotations

import msgspec

from cache import keys
from cache.errors import StoreCorrupt
from cache.store.store import Script, Store

CHUNK_LIMIT_SECONDS = 1.0  # of reading or writing one part, off the path
CHUNK_EXPIRY_SECONDS = 120  # of a part that no commit has named yet
PRESENCE_SECONDS = 5  # of silence, then a writer is not counted any more
TRIM_AGE_SECONDS = 10.0  # entries younger than this stay: only a reader that stood still so long can fall behind

# Replies: 1 where the lease is ours, the generation, up to where the stream was trimmed, writers alive, the stream's
# last id. Writes that may fail for want of memory are swallowed, so that the lease is renewed nevertheless.
_TICK = Script(
    "tick",
    """
local holder = redis.call('GET', KEYS[1])
if not holder then
  redis.pcall('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  holder = redis.call('GET', KEYS[1])
elseif holder == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
redis.pcall('SET', KEYS[3], ARGV[3], 'NX')
local now = tonumber(redis.call('TIME')[1])
redis.pcall('ZADD', KEYS[4], now, ARGV[1])
redis.pcall('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - ARGV[4])
local tip = '0-0'
if redis.call('EXISTS', KEYS[5]) == 1 then
  local facts = redis.call('XINFO', 'STREAM', KEYS[5])
  for i = 1, #facts, 2 do
    if facts[i] == 'last-generated-id' then tip = facts[i + 1] end
  end
end
return {
  holder == ARGV[1] and 1 or 0,
  redis.call('GET', KEYS[3]) or '',
  redis.call('HGET', KEYS[2], 'trimmed') or '0-0',
  redis.call('ZCARD', KEYS[4]),
  tip,
}
""",
)

# KEYS: lease, snapshot, stream, then the new parts. ARGV: writer, snapshot's id, stream id, trim id.
# Replies 1, or 0 where the lease is another's or a part has gone.
_COMMIT = Script(
    "commit-snapshot",
    """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for i = 4, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then return 0 end
end
for i = 4, #KEYS do redis.call('PERSIST', KEYS[i]) end
local old = redis.call('HMGET', KEYS[2], 'id', 'parts')
redis.call('HSET', KEYS[2], 'id', ARGV[2], 'stream_id', ARGV[3], 'trimmed', ARGV[4], 'parts', #KEYS - 3)
if old[1] then
  for i = 0, tonumber(old[2]) - 1 do redis.call('UNLINK', KEYS[2] .. ':' .. old[1] .. ':' .. i) end
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


def parse_id(text: bytes) -> StreamId:
    """A stream's id as numbers, which compare as Redis orders them. Raises StoreCorrupt."""
    milliseconds, _, number = text.partition(b"-")
    try:
        return int(milliseconds), int(number or b"0")
    except ValueError as error:
        raise StoreCorrupt("a stream id is damaged") from error


def format_id(stream_id: StreamId) -> bytes:
    """As Redis writes it."""
    return b"%d-%d" % stream_id


class Tick(msgspec.Struct, frozen=True, gc=False):
    """What one look at the keeping told. `generation` is empty where Redis had no room for it."""

    holds_lease: bool
    generation: bytes
    trimmed: StreamId
    writers: int
    tip: StreamId


class SnapshotHead(msgspec.Struct, frozen=True, gc=False):
    """The snapshot that counts: it holds what the stream said up to `stream_id`."""

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
        """Take or renew the lease, say that we live, and see how things stand. Raises CacheError."""
        script_keys = (keys.LEASE, keys.SNAPSHOT, keys.GENERATION, keys.WRITERS, keys.JOURNAL)
        args = (self._writer, self._lease_ms, new_generation, PRESENCE_SECONDS)
        ours, generation, trimmed, writers, tip = await self._store.run_script(_TICK, script_keys, args)
        return Tick(bool(ours), generation, parse_id(trimmed), writers, parse_id(tip))

    async def leave(self) -> None:
        """Give up the lease, if it is ours, so that the next one need not wait for its end. Raises CacheError."""
        await self._store.run_script(_LEAVE, (keys.LEASE, keys.WRITERS), (self._writer,))

    async def put_part(self, snapshot: str, number: int, part: bytes) -> None:
        """Write one part of a snapshot that is not committed yet. Raises CacheError."""
        key = keys.snapshot_chunk(snapshot, number)
        await self._store.execute("SET", key, part, "EX", CHUNK_EXPIRY_SECONDS, limit_seconds=CHUNK_LIMIT_SECONDS)

    async def commit(self, snapshot: str, parts: int, stream_id: StreamId, now_unix_seconds: float) -> bool:
        """Let the snapshot count, drop the one before, trim the stream to it. False where the lease is another's."""
        oldest_kept = (int((now_unix_seconds - TRIM_AGE_SECONDS) * 1000), 0)
        trimmed = min(stream_id, oldest_kept)
        script_keys = [keys.LEASE, keys.SNAPSHOT, keys.JOURNAL]
        script_keys += [keys.snapshot_chunk(snapshot, number) for number in range(parts)]
        args = (self._writer, snapshot, format_id(stream_id), format_id(trimmed))
        reply = await self._store.run_script(_COMMIT, script_keys, args, limit_seconds=CHUNK_LIMIT_SECONDS)
        return bool(reply)

    async def head(self) -> SnapshotHead | None:
        """The snapshot that counts now. Raises CacheError."""
        reply = await self._store.execute("HMGET", keys.SNAPSHOT, "id", "stream_id", "parts")
        if None in reply:
            return None
        try:
            return SnapshotHead(reply[0].decode(), parse_id(reply[1]), int(reply[2]))
        except ValueError as error:
            raise StoreCorrupt("the snapshot's head is damaged") from error

    async def fetch(self) -> tuple[SnapshotHead, list[bytes | None]] | None:
        """The snapshot that counts, with its parts in order, None for one that is lost; None where there is none yet.

        Where a newer one took its place meanwhile that one is fetched. Raises CacheError.
        """
        head = await self.head()
        while head is not None:
            parts = [await self._part(head, number) for number in range(head.parts)]
            again = head if None not in parts else await self.head()
            if again == head:
                return head, parts
            head = again
        return None

    async def _part(self, head: SnapshotHead, number: int) -> bytes | None:
        key = keys.snapshot_chunk(head.id, number)
        part: bytes | None = await self._store.execute("GET", key, limit_seconds=CHUNK_LIMIT_SECONDS)
        return part

"""Claims on replicas for cold turns, respected by all workers of all proxies, and each worker's oldest waiting turn.

A worker that wants to send a cold turn to a replica asks Redis once. It gets the replica if it is not claimed and no
other worker has a turn that comes first. A claim is released at the turn's first token, and otherwise expires, or
ends when its worker is known to be gone or asks for the same replica again: then it did not learn that it got it,
because Redis answered too late. Turns that do not wait do not ask.

A worker is known to be gone if this one heard it fall silent, or if it has ceased to announce itself in Redis: those
of a proxy that was killed as a whole are gone before others hear them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf

from cache import keys
from cache.errors import CacheError
from cache.ports import Clock, Tasks
from cache.store.lua import DROP_UNLESS
from cache.store.replies import parsed
from cache.store.store import Script, Store

HEAD_SECONDS = 2.0
"""Time for which a worker's oldest turn counts after the worker last named it, which it does twice a second.

An entry with a later end is damaged, or was written before Redis's clock was set back.
"""

PART_TAKEN = ""
"""The answer for a tenant that has as many claims as it may have. Another tenant's turn may get a replica."""

GONE_SECONDS = 1.0
"""Age from which the claim of a worker that is gone ends: a younger one shows that the worker has come back."""

LOOK_SECONDS = 1.0
"""Least time between two looks for claims whose workers do not announce themselves, while a pool's turns get none."""

TAKE = Script(
    "cold-take",
    DROP_UNLESS
    + """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local heads, claims, lasts, writer, order, tenant = KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2], ARGV[3]
local head_ms, claim_ms, most = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local gone_ms, number, tokens = tonumber(ARGV[7]), ARGV[8], tonumber(ARGV[9])
-- by the clock of Redis: those of the workers' machines may differ
order = order .. ':' .. string.format('%017.3f', now / 1000 - tonumber(ARGV[10]))
local gone, first = {}, 12 + tonumber(ARGV[11])
for i = 12, first - 1 do gone[ARGV[i]] = true end
local offered = {}
for i = first, #ARGV, 2 do offered[ARGV[i]] = true end
local longest_ms = 3600000 -- no claim lasts longer, so a later end is damage
local ahead_ms = 300000 -- a claim made later, or at an unknown time, is damage or of a clock that was set back
for _, key in ipairs(KEYS) do drop_unless('hash', key) end
local held, own = {}, 0
local all = redis.call('HGETALL', claims)
for i = 1, #all, 2 do
  local ends, holder, whose = string.match(all[i + 1], '^(%d+)|([^|]*)|%d+|(.*)$')
  local taken = holder and tonumber(redis.call('HGET', lasts, all[i]) or '')
  local is_over = not taken or taken > now + ahead_ms or (gone[holder] and now - taken >= gone_ms)
  is_over = is_over or (holder == writer and offered[all[i]])
  if is_over or tonumber(ends) < now or tonumber(ends) > now + longest_ms then
    redis.call('HDEL', claims, all[i])
  else
    held[all[i]] = true
    if whose == tenant then own = own + 1 end
  end
end
if own >= most then return '' end
local most_owed = 262144 -- no turn must save up more
local function place(text, owed, needed) -- a lower priority that has saved up its floor stands with the highest
  if owed > 0 and owed >= math.min(needed, most_owed) then return '0' .. string.sub(text, 2) end
  return text
end
local function name(whose, ends, owed, needed, text)
  redis.call('HSET', heads, whose, string.format('%.0f|%.1f|%.1f|%s', ends, owed, needed, text))
end
local form, class, saved = '^(%d+)|([%d.]+)|([%d.]+)|(.*)$', string.sub(order, 1, 1), 0
local _, was_owed, _, before = string.match(redis.call('HGET', heads, writer) or '', form)
if before and string.sub(before, 1, 1) == class then saved = tonumber(was_owed) or 0 end
name(writer, now + head_ms, saved, tokens, order)
redis.call('PEXPIRE', heads, head_ms * 10)
local own_place, lower, lower_heads = place(order, saved, tokens), {}, 0
all = redis.call('HGETALL', heads)
for i = 1, #all, 2 do
  local ends, owed, needed, theirs = string.match(all[i + 1], form)
  ends, owed, needed = tonumber(ends or ''), tonumber(owed or ''), tonumber(needed or '')
  if not (ends and owed and needed) or ends < now or ends > now + head_ms then
    redis.call('HDEL', heads, all[i])
  elseif all[i] ~= writer then
    if place(theirs, owed, needed) < own_place then return false end
    if string.sub(theirs, 1, 1) > class then
      lower_heads = lower_heads + 1
      lower[lower_heads] = {all[i], ends, owed, needed, theirs}
    end
  end
end
for i = first, #ARGV, 2 do
  local rest_ms = tonumber(ARGV[i + 1]) -- 0 if it is quiet
  local last = rest_ms > 0 and tonumber(redis.call('HGET', lasts, ARGV[i]) or '')
  local must_rest = last and last <= now and now - last < rest_ms
  if not held[ARGV[i]] and not must_rest then
    redis.call('HSET', lasts, ARGV[i], now)
    redis.call('PEXPIRE', lasts, longest_ms)
    redis.call('HSET', claims, ARGV[i], (now + claim_ms) .. '|' .. writer .. '|' .. number .. '|' .. tenant)
    redis.call('PEXPIRE', claims, longest_ms)
    redis.call('HDEL', heads, writer)
    for _, each in ipairs(lower) do -- a twentieth of the work for all that wait with a lower priority
      name(each[1], each[2], math.min(each[3] + 0.05 * tokens / lower_heads, most_owed), each[4], each[5])
    end
    return ARGV[i]
  end
end
return false
""",
)

RELEASE = Script(
    "cold-release",
    """
local value = redis.call('HGET', KEYS[1], ARGV[1])
if value and string.match(value, '^%d+|([^|]*|%d+)|') == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
return 0
""",
)


class ColdClaims:
    """The claims of one worker, named `writer_id`. `gone` returns the names of workers that have just died."""

    def __init__(
        self,
        store: Store,
        writer_id: str,
        *,
        clock: Clock,
        tasks: Tasks,
        gone: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._store = store
        self._writer_id = writer_id
        self._clock = clock
        self._tasks = tasks
        self._unannounced: dict[str, list[str]] = {}  # workers with claims that were found to be gone, by pool
        self._next_look_seconds: dict[str, float] = {}  # by pool: otherwise one that asks more often takes all looks
        self._gone = gone
        self._taken = 0
        self._numbers: dict[tuple[str, str], int] = {}  # of the last claim, by pool and replica
        self.failed = 0

    async def take(
        self,
        pool: str,
        replicas: Sequence[str],
        *,
        busy: Mapping[str, float] | None = None,
        order: tuple[str, float],
        tenant: str,
        claim_seconds: float,
        most: int,
        tokens: float = 0.0,
    ) -> str | None:
        """Claim the first of `replicas` that is free for `claim_seconds`, and return it.

        Args:
            pool: the pool's name; turns for different pools do not compete.
            replicas: names, best first; empty only to name this worker's oldest turn. This worker believes that it
                holds none of them.
            busy: those of them that are not quiet, with seconds; these are free only if not claimed for so long.
            order: the place of this worker's oldest turn: a text, of which lower ones come first, and the seconds for
                which it has waited. The first letter is the priority: a lower one gets a twentieth of the work while
                it waits for higher ones of other workers.
            tenant: the tenant of the turn.
            claim_seconds: the time after which the claim expires.
            most: the claims that the tenant may have at once.
            tokens: the work of the turn.

        Returns:
            None if no replica is free, or if another worker's turn comes first; `PART_TAKEN` if the tenant has `most`
            claims: then the turn does not count as this worker's oldest, and another one may be asked for.

        Raises:
            CacheError: Redis did not answer.
        """
        gone, rest = {*self._gone(), *self._unannounced.pop(pool, ())}, busy or {}
        self._taken += 1
        number = self._taken
        place, waited_seconds = order
        got = await self._store.run_script(
            TAKE,
            [keys.cold_heads(pool), keys.cold_claims(pool), keys.cold_last(pool)],
            [
                self._writer_id,
                place,
                tenant,
                round(HEAD_SECONDS * 1000),
                round(claim_seconds * 1000),
                most,
                round(GONE_SECONDS * 1000),
                number,
                tokens,
                waited_seconds,
                len(gone),
                *gone,
                *[part for replica in replicas for part in (replica, round(rest.get(replica, 0.0) * 1000))],
            ],
        )
        replica: str | None = None if got is None else parsed(bytes.decode, got)
        if replica:
            self._numbers[pool, replica] = number
        else:
            self._look_for_gone(pool)
        return replica

    def release(self, pool: str, replica: str) -> None:
        """Give a claim back, in the background; one that Redis does not receive expires."""
        number = self._numbers.pop((pool, replica), None)
        if number is not None:
            self._tasks.start(self._release(pool, replica, number), "cold claim release")

    def withdraw(self, pool: str) -> None:
        """Withdraw this worker's oldest turn, in the background: no turn waits any more."""
        self._unannounced.pop(pool, None)  # who is gone now may be back when the next turn waits
        self._tasks.start(self._withdraw(pool), "cold turn withdrawal")

    def _look_for_gone(self, pool: str) -> None:
        now_seconds = self._clock.monotonic()
        if now_seconds >= self._next_look_seconds.get(pool, -inf):
            self._next_look_seconds[pool] = now_seconds + LOOK_SECONDS
            self._tasks.start(self._find_gone(pool), "cold claims of gone workers")

    async def _find_gone(self, pool: str) -> None:
        """Find workers with claims that do not announce themselves; their claims end when this one asks again."""
        try:
            claims = parsed(_texts, await self._store.execute("HVALS", keys.cold_claims(pool)))
            announced = parsed(_texts, await self._store.execute("ZRANGE", keys.WRITERS, 0, -1))
        except CacheError:
            self.failed += 1
            return
        if self._writer_id in announced:  # else Redis has just lost them, or this one is not heard either
            holders = {claim.split("|")[1] for claim in claims if claim.count("|") >= 2}
            self._unannounced[pool] = sorted(holders.difference(announced))

    async def _release(self, pool: str, replica: str, number: int) -> None:
        claim = f"{self._writer_id}|{number}"
        try:
            await self._store.run_script(RELEASE, [keys.cold_claims(pool)], [replica, claim])
        except CacheError:
            self.failed += 1

    async def _withdraw(self, pool: str) -> None:
        try:
            await self._store.execute("HDEL", keys.cold_heads(pool), self._writer_id)
        except CacheError:
            self.failed += 1


def _texts(values: Sequence[bytes]) -> list[str]:
    return [value.decode(errors="replace") for value in values]

"""The Lua scripts that change stored contexts, each atomic. `cache.contexts.store` and `room` read their replies.

Keys of a tenant, all in one slot (T is `cairn:{keyed hash}`; times are milliseconds of Redis's own clock):

    T:context:ID     hash: head, manifest, metadata, pin, expires, status, tokens, error, bytes, uses, used, value
    T:segment:HEX    one compressed segment; it expires ten minutes after it was written unless committed
    T:ids            sorted set: ids by creation        T:gone   sorted set: ids by the end of their grace time
    T:held           hash: id to `bytes:pin:digests`, to be released when the context is dropped
    T:refs, T:sizes  hashes: the number of contexts with a segment, and its stored bytes
    T:sum            hash: bytes and pinned bytes       T:tags   hash: tag to `id ms`
    T:accepted       exists while an upstream is known to accept the tenant's key

The scripts make the names of keys themselves; these are in the slot of KEYS[1], as a Cluster requires. Stored numbers
may be damaged: a value that is not a number, or not an exact double, counts as 0. Keys of the wrong type are deleted.
"""

from __future__ import annotations

from cache import keys
from cache.contexts.retention import MEMORY_SECONDS
from cache.store.lua import DROP_UNLESS
from cache.store.store import Script

UPLOAD_SECONDS = 600
"""Expiry of an uploaded segment that no commit refers to."""

_CONTAINERS_MS = 86_400_000  # the tenant's own keys outlive the last context by a day
DROPPED_AT_ONCE = 32  # contexts; each has up to a few hundred segments, and Redis serves no one else during a script

_PRELUDE = f"""
local T = KEYS[1]
local tenant = string.match(T, '{{(.-)}}')
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function ms(at) return string.format('%.0f', at) end
local function say(kind, name)
  redis.call('PUBLISH', '{keys.CONTEXTS_CHANNEL}', tenant .. ' ' .. kind .. ' ' .. name)
end
local function context(id) return T .. ':context:' .. id end
local function segment(digest) return T .. ':segment:' .. digest end
local function number(value)
  local read = tonumber(value or 0)
  return read and math.abs(read) < 9007199254740992 and read or 0
end
local function later(key, at)
  if redis.call('PTTL', key) < at - now then redis.call('PEXPIREAT', key, ms(at)) end
end
local function keep(id, at)
  redis.call('ZADD', T .. ':gone', ms(at), id)
  redis.call('PEXPIREAT', context(id), ms(at))
  for _, name in ipairs({{':ids', ':gone', ':held', ':refs', ':sizes', ':sum', ':tags'}}) do
    later(T .. name, at + {_CONTAINERS_MS})
  end
end
local function digests_of(id)
  local held = redis.call('HGET', T .. ':held', id)
  if not held then return nil end
  local own, pin, digests = string.match(held, '^(%d+):(%d):(.*)$')
  own, pin, digests = own or '0', pin or '0', digests or ''
  local listed = {{}}
  for at = 1, #digests, 64 do listed[#listed + 1] = string.sub(digests, at, at + 63) end
  return listed, tonumber(own), pin, digests
end
local tagged
local function tags_of(id) -- read once for all that a script drops: there may be thousands
  if not tagged then
    tagged = {{}}
    local tags = redis.call('HGETALL', T .. ':tags')
    for at = 1, #tags, 2 do
      local of = string.match(tags[at + 1], '^%S+') or ''
      tagged[of] = tagged[of] or {{}}
      table.insert(tagged[of], tags[at])
    end
  end
  return tagged[id] or {{}}
end
local function drop(id)
  local digests, own, pin = digests_of(id)
  if not digests then return 0 end
  local whole, freed = own, own
  for _, digest in ipairs(digests) do
    local size = number(redis.call('HGET', T .. ':sizes', digest))
    whole = whole + size
    if redis.call('HINCRBY', T .. ':refs', digest, -1) <= 0 then
      redis.call('HDEL', T .. ':refs', digest)
      redis.call('HDEL', T .. ':sizes', digest)
      redis.call('UNLINK', segment(digest))
      freed = freed + size
    end
  end
  redis.call('HINCRBY', T .. ':sum', 'bytes', -freed)
  if pin == '1' then redis.call('HINCRBY', T .. ':sum', 'pinned', -whole) end
  redis.call('HDEL', T .. ':held', id)
  redis.call('ZREM', T .. ':ids', id)
  redis.call('ZREM', T .. ':gone', id)
  redis.call('UNLINK', context(id))
  for _, name in ipairs(tags_of(id)) do
    redis.call('HDEL', T .. ':tags', name)
    say('t', name)
  end
  say('c', id)
  return 1
end
{DROP_UNLESS}
local function repair()
  for _, name in ipairs({{':ids', ':gone'}}) do drop_unless('zset', T .. name) end
  for _, name in ipairs({{':held', ':refs', ':sizes', ':sum', ':tags'}}) do drop_unless('hash', T .. name) end
end
local function sweep()
  local over = redis.call('ZRANGEBYSCORE', T .. ':gone', '-inf', ms(now), 'LIMIT', 0, {DROPPED_AT_ONCE})
  for _, id in ipairs(over) do drop(id) end
  return #over
end
local function sum(name)
  local value = redis.call('HGET', T .. ':sum', name)
  if value and not string.match(value, '^-?%d+$') then redis.call('HDEL', T .. ':sum', name) end
  return number(value)
end
local function totals() return {{sum('bytes'), redis.call('ZCARD', T .. ':ids'), sum('pinned')}} end
"""

COMMIT = Script(
    "context-commit",
    _PRELUDE
    + """
local id, head, manifest, digests, metadata, pin, expires, ttl, grace = unpack(ARGV, 1, 9)
local room, pin_room, ids_most, tags_most, status, tokens, value, warming, tags, extra = unpack(ARGV, 10, 19)
if redis.call('EXISTS', context(id)) == 1 then return {'ok', now} end
repair()
sweep()
local missing, own, fresh, whole = {}, #head + #manifest + #metadata, 0, 0
for at = 1, #digests, 64 do
  local digest = string.sub(digests, at, at + 63)
  local size = redis.pcall('STRLEN', segment(digest))
  if type(size) == 'table' then
    redis.call('UNLINK', segment(digest))
    size = 0
  end
  if size == 0 then missing[#missing + 1] = digest end
  whole = whole + size
  if redis.call('HEXISTS', T .. ':refs', digest) == 0 then fresh = fresh + size end
end
local ends = tonumber(expires)
if tonumber(ttl) > 0 then ends = now + tonumber(ttl) end
if ends <= now then return {'past'} end
if redis.call('ZCARD', T .. ':ids') >= tonumber(ids_most) then return {'many'} end
local names = {}
for name in string.gmatch(tags, '%S+') do names[#names + 1] = name end
if redis.call('HLEN', T .. ':tags') + #names > tonumber(tags_most) then return {'tags'} end
local over = sum('bytes') + own + fresh + tonumber(extra) - tonumber(room)
if over > 0 then return {'full', over} end
if pin == '1' and sum('pinned') + own + whole + tonumber(extra) > tonumber(pin_room) then return {'pins'} end
if #missing > 0 then return {'missing', missing} end
local gone = ends + tonumber(grace)
for at = 1, #digests, 64 do
  local digest = string.sub(digests, at, at + 63)
  redis.call('HINCRBY', T .. ':refs', digest, 1)
  redis.call('HSET', T .. ':sizes', digest, redis.call('STRLEN', segment(digest)))
  later(segment(digest), gone)
end
redis.call('HINCRBY', T .. ':sum', 'bytes', own + fresh)
if pin == '1' then redis.call('HINCRBY', T .. ':sum', 'pinned', own + whole) end
redis.call('HSET', T .. ':held', id, own .. ':' .. pin .. ':' .. digests)
redis.call('ZADD', T .. ':ids', ms(clock[1] * 1000000 + clock[2]), id)
redis.call('HSET', context(id), 'head', head, 'manifest', manifest, 'metadata', metadata, 'pin', pin,
  'created', ms(now), 'expires', ms(ends), 'status', status, 'tokens', tokens, 'bytes', own + whole,
  'uses', '1', 'used', ms(now), 'value', value, 'warming', ms(now + tonumber(warming)))
for _, name in ipairs(names) do
  redis.call('HSET', T .. ':tags', name, id .. ' ' .. ms(now))
  say('t', name)
end
keep(id, gone)
say('c', id)
return {'ok', now, totals()}
""",
)

READ = Script(
    "context-read",
    _PRELUDE
    + """
local rows = {}
for at, id in ipairs(ARGV) do
  local row = redis.pcall('HMGET', context(id), 'head', 'metadata', 'created', 'expires', 'status', 'tokens', 'error',
    'bytes', 'uses', 'used', 'value', 'warming', 'pin')
  rows[at] = row.err and {'a key of another type'} or row
end
return {now, rows}
""",
    writes=False,
)

IDS = Script(
    "context-ids",
    _PRELUDE
    + """
local found = redis.pcall('ZRANGE', T .. ':ids', 0, -1)
return {now, found.err and {} or found}
""",
    writes=False,
)

UPDATE = Script(
    "context-update",
    _PRELUDE
    + """
repair()
local id, metadata, pin, expires, ttl, grace, pin_room = unpack(ARGV)
local digests, own, was, packed = digests_of(id)
if redis.call('EXISTS', context(id)) == 0 or not digests then return {'unknown'} end
local ends = number(redis.call('HGET', context(id), 'expires'))
if tonumber(ttl) > 0 then ends = now + tonumber(ttl) elseif tonumber(expires) > 0 then ends = tonumber(expires) end
if (tonumber(ttl) > 0 or tonumber(expires) > 0) and ends <= now then return {'past'} end
if pin ~= '' and pin ~= was then
  local whole = own
  for _, digest in ipairs(digests) do whole = whole + number(redis.call('HGET', T .. ':sizes', digest)) end
  if pin == '1' then
    if sum('pinned') + whole > tonumber(pin_room) then return {'pins'} end
    redis.call('HINCRBY', T .. ':sum', 'pinned', whole)
  else
    redis.call('HINCRBY', T .. ':sum', 'pinned', -whole)
  end
  redis.call('HSET', T .. ':held', id, own .. ':' .. pin .. ':' .. packed)
  redis.call('HSET', context(id), 'pin', pin)
end
if metadata ~= '' then redis.call('HSET', context(id), 'metadata', metadata) end
redis.call('HSET', context(id), 'expires', ms(ends))
for _, digest in ipairs(digests) do later(segment(digest), ends + tonumber(grace)) end
keep(id, ends + tonumber(grace))
say('c', id)
return {'ok', now, totals()}
""",
)

USED = Script(
    "context-used",
    _PRELUDE
    + f"""
local grace = tonumber(ARGV[1])
for at = 2, #ARGV, 3 do
  local id, times, ttl = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local was = redis.call('HMGET', context(id), 'uses', 'used', 'expires')
  if was[1] then
    local elapsed = math.max(0, now - number(was[2])) / 1000
    local uses = number(was[1]) * math.exp(-elapsed / {MEMORY_SECONDS}) + times
    redis.call('HSET', context(id), 'uses', string.format('%.9g', uses), 'used', ms(now))
    if ttl > 0 then
      local ends = now + ttl
      redis.call('HSET', context(id), 'expires', ms(ends))
      for _, digest in ipairs(digests_of(id) or {{}}) do later(segment(digest), ends + grace) end
      keep(id, ends + grace)
      if math.abs(ends - number(was[3])) > 1000 then say('c', id) end
    end
  end
end
return now
""",
)

FINISH = Script(
    "context-finish",
    _PRELUDE
    + """
local id, status, tokens, value, problem = unpack(ARGV)
if redis.call('EXISTS', context(id)) == 0 then return 0 end
redis.call('HSET', context(id), 'status', status, 'error', problem)
if tonumber(tokens) > 0 then redis.call('HSET', context(id), 'tokens', tokens, 'value', value) end
say('c', id)
return 1
""",
)

DROP = Script(
    "context-drop",
    _PRELUDE
    + """
repair()
local dropped = 0
for at = 2, #ARGV do
  local id = ARGV[at]
  if ARGV[1] ~= 'unpinned' or redis.call('HGET', context(id), 'pin') ~= '1' then dropped = dropped + drop(id) end
end
return {dropped, totals()}
""",
)

SWEEP = Script("context-sweep", _PRELUDE + "repair() local swept = sweep() return {swept, totals()}")

TOTALS = Script("context-totals", _PRELUDE + "return totals()", writes=False)

WHOLE = Script(
    "context-whole",
    _PRELUDE
    + """
local digests, own, pin = digests_of(ARGV[1])
if not digests then return {0, 0} end
local whole = own
for _, digest in ipairs(digests) do whole = whole + number(redis.call('HGET', T .. ':sizes', digest)) end
return {whole, pin == '1' and 1 or 0}
""",
    writes=False,
)

TAG = Script(
    "context-tag",
    _PRELUDE
    + """
repair()
local tag, id, most = unpack(ARGV)
if redis.call('EXISTS', context(id)) == 0 then return {'unknown'} end
if redis.call('HEXISTS', T .. ':tags', tag) == 0 and redis.call('HLEN', T .. ':tags') >= tonumber(most) then
  return {'tags'}
end
redis.call('HSET', T .. ':tags', tag, id .. ' ' .. ms(now))
later(T .. ':tags', number(redis.call('ZSCORE', T .. ':gone', id)) + 86400000)
say('t', tag)
return {'ok', now}
""",
)

UNTAG = Script(
    "context-untag",
    _PRELUDE
    + """
local gone = redis.call('HDEL', T .. ':tags', ARGV[1])
if gone == 1 then say('t', ARGV[1]) end
return gone
""",
)


# --- over all tenants: KEYS are `OVERALL_KEYS`. The last of them has the sums, which change with what
# they are of, so that no creation reads the values of all tenants.

OVERALL_KEYS = (keys.CONTEXTS_TOTALS, keys.CONTEXTS_UNLISTED, keys.CONTEXTS_RESERVED, keys.CONTEXTS_SUMS)

RESERVED_MS = 30_000
"""Time for which a reservation holds before a sweep may replace it by the tenant's real bytes."""

RECOUNT_MS = 30_000
"""Age at which the sums are counted again: a proxy of an older version changes totals without them."""

_OVERALL = f"""
{DROP_UNLESS}
for _, key in ipairs(KEYS) do drop_unless('hash', key) end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function number(value)
  local read = tonumber(value or 0)
  return read and math.abs(read) < 9007199254740992 and read or 0
end
local function parse(value) return string.match(value or '', '^(%d+):(%d+):(%d):(%d+)$') end
local function total(value)
  local bytes, contexts = string.match(value or '', '^(%d+):(%d+)$')
  return number(bytes), number(contexts)
end
local NAMES = {{'bytes', 'contexts', 'pinned', 'unchecked', 'tenants'}}
local function recount()
  local sums = {{bytes = 0, contexts = 0, pinned = 0, unchecked = 0, tenants = 0}}
  for _, value in ipairs(redis.call('HVALS', KEYS[1])) do
    local bytes, contexts = total(value)
    sums.bytes, sums.contexts = sums.bytes + bytes, sums.contexts + contexts
  end
  local all = redis.call('HGETALL', KEYS[2])
  for at = 1, #all, 2 do
    local bytes, pinned, accepted = parse(all[at + 1])
    if not bytes then
      redis.call('HDEL', KEYS[2], all[at])
    else
      sums.pinned = sums.pinned + number(pinned)
      if accepted ~= '1' then
        sums.unchecked, sums.tenants = sums.unchecked + number(bytes), sums.tenants + 1
      end
    end
  end
  for _, name in ipairs(NAMES) do redis.call('HSET', KEYS[4], name, string.format('%.0f', sums[name])) end
  redis.call('HSET', KEYS[4], 'at', string.format('%.0f', now))
  return sums
end
local function sums()
  local found = redis.call('HMGET', KEYS[4], 'at', unpack(NAMES))
  for at = 1, #NAMES + 1 do
    if not string.match(found[at] or '', '^%d+$') or #found[at] > 15 then return recount() end
  end
  if math.abs(now - found[1]) > {RECOUNT_MS} then return recount() end
  local read = {{}}
  for at, name in ipairs(NAMES) do read[name] = tonumber(found[at + 1]) end
  return read
end
local function move(name, by)
  if by ~= 0 then redis.call('HINCRBY', KEYS[4], name, string.format('%.0f', by)) end
end
local function entry(tenant)
  local bytes, pinned, accepted, reserved_until = parse(redis.call('HGET', KEYS[2], tenant) or '')
  return number(bytes), number(pinned), accepted, number(reserved_until)
end
local function put(tenant, bytes, pinned, accepted, reserved_until)
  local had, had_pinned, was = entry(tenant)
  move('pinned', pinned - had_pinned)
  move('unchecked', (accepted ~= '1' and bytes or 0) - (was ~= '1' and had or 0))
  move('tenants', (accepted and accepted ~= '1' and 1 or 0) - (was and was ~= '1' and 1 or 0))
  if accepted then
    redis.call('HSET', KEYS[2], tenant,
      string.format('%.0f:%.0f:%s:%.0f', bytes, pinned, accepted, reserved_until))
  else
    redis.call('HDEL', KEYS[2], tenant)
  end
end
"""
"""Call `sums()` before any change of what they are of: then they are valid and can be moved."""

RESERVE = Script(
    "context-reserve",
    _OVERALL
    + f"""
local tenant, add, add_pinned, accepted = ARGV[1], number(ARGV[2]), number(ARGV[3]), ARGV[4]
local most_unchecked, most_pinned, most_tenants = number(ARGV[5]), number(ARGV[6]), number(ARGV[7])
local all = sums()
local bytes, own_pinned, was = entry(tenant)
local unchecked, tenants = all.unchecked, all.tenants
if was and was ~= '1' then unchecked, tenants = unchecked - bytes, tenants - 1 end
if add_pinned > 0 and all.pinned + add_pinned > most_pinned then return {{'pins', 0}} end
if accepted ~= '1' then
  local over = unchecked + bytes + add - most_unchecked
  if tenants >= most_tenants and over < 1 then over = 1 end
  if over > 0 then return {{'unchecked', over}} end
end
put(tenant, bytes + add, own_pinned + add_pinned, accepted, now + {RESERVED_MS})
return {{'ok', 0}}
""",
)
"""Reserve room in the shares of unlisted tenants before it is used. ARGV: tenant, bytes, pinned bytes, 1 if an
upstream accepted the tenant's key, the two shares in bytes, the most unchecked tenants."""

RESERVE_TOTAL = Script(
    "context-reserve-total",
    _OVERALL
    + f"""
local reservation, size, most = ARGV[1], number(ARGV[2]), number(ARGV[3])
local taken = sums().bytes
local reserved = redis.call('HGETALL', KEYS[3])
for at = 1, #reserved, 2 do
  local bytes, reserved_until = string.match(reserved[at + 1], '^(%d+):(%d+)$')
  if not bytes or number(reserved_until) <= now then
    redis.call('HDEL', KEYS[3], reserved[at])
  elseif reserved[at] ~= reservation then
    taken = taken + number(bytes)
  end
end
local over = taken + size - most
if over > 0 then return over end
redis.call('HSET', KEYS[3], reservation, string.format('%.0f:%.0f', size, now + {RESERVED_MS}))
redis.call('PEXPIRE', KEYS[3], {RESERVED_MS})
return 0
""",
)
"""Reserve room in the total budget before it is used. ARGV: name of the reservation, which replaces an earlier
one of that name, its bytes, the budget in bytes. Returns the bytes by which the budget would be exceeded.
"""

RELEASE_TOTAL = Script("context-release-total", _OVERALL + "return redis.call('HDEL', KEYS[3], ARGV[1])")
"""Give up a reservation in the total budget. ARGV: its name."""

NOTE = Script(
    "context-note",
    _OVERALL
    + """
local tenant, bytes, count, pinned = ARGV[1], number(ARGV[2]), number(ARGV[3]), number(ARGV[4])
local all = sums()
local was = redis.call('HGET', KEYS[1], tenant)
if ARGV[5] == 'sweep' then
  local was_unlisted = redis.call('HGET', KEYS[2], tenant)
  if (was or '') ~= ARGV[6] or (was_unlisted or '') ~= ARGV[7] then return {all.bytes, all.contexts} end
elseif ARGV[6] then
  redis.call('HDEL', KEYS[3], ARGV[6])
end
local _, _, accepted, reserved_until = entry(tenant)
local had, had_count = total(was)
if count > 0 then
  redis.call('HSET', KEYS[1], tenant, string.format('%.0f:%.0f', bytes, count))
else
  redis.call('HDEL', KEYS[1], tenant)
  bytes = 0
end
move('bytes', bytes - had)
move('contexts', count - had_count)
local written = {all.bytes + bytes - had, all.contexts + count - had_count}
if ARGV[5] == 'sweep' and reserved_until > now then return written end
if ARGV[5] == '0' or ARGV[5] == '1' then accepted = ARGV[5] end
if count == 0 then
  put(tenant, 0, 0, nil, 0)
elseif accepted then
  put(tenant, bytes, pinned, accepted, 0)
end
return written
""",
)
"""Write the totals of a tenant's contexts. ARGV: tenant, bytes, number of contexts, pinned bytes; then 0 or 1 for
an unlisted tenant whose key is unchecked or accepted, or nothing; then the name of the reservation in the total
budget that this replaces, if there is one. Or, after the totals, `sweep` to keep a reservation in the shares, and the
tenant's values in both hashes before the totals were read: if they have changed since, newer totals stay. Returns
bytes and number of all tenants' contexts.
"""

ACCEPT = Script(
    "context-accept",
    _OVERALL
    + """
local bytes, pinned, accepted, reserved_until = entry(ARGV[1])
if accepted then
  sums()
  put(ARGV[1], bytes, pinned, '1', reserved_until)
end
return 1
""",
)
"""Count a tenant as one whose key an upstream accepted. ARGV: tenant."""

BEGIN_SWEEP = Script(
    "context-begin-sweep",
    DROP_UNLESS
    + """
drop_unless('string', KEYS[1])
for at = 2, #KEYS do drop_unless('hash', KEYS[at]) end
local left = redis.call('PTTL', KEYS[1])
if left == -1 or left > tonumber(ARGV[1]) then redis.call('UNLINK', KEYS[1]) end
return redis.call('SET', KEYS[1], '1', 'NX', 'PX', ARGV[1]) and 1 or 0
""",
)
"""Return 1 if this worker is to sweep now, 0 if another one does or did lately. KEYS: `cache.keys.CONTEXTS_SWEEPER`,
then those of all tenants. ARGV: milliseconds for which no other worker sweeps."""

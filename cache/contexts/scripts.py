"""The scripts that change a tenant's contexts, each atomic. Beside `cache.contexts.store`, which reads their replies.

Keys of a tenant, all in one slot (T is `cairn:{keyed hash}`; times are milliseconds of Redis's own clock):

    T:context:ID     hash: head, manifest, metadata, pin, expires, status, tokens, error, bytes, uses, used, value
    T:segment:HEX    one compressed segment; without a commit it goes ten minutes after it was written
    T:ids            sorted set: ids by creation        T:gone   sorted set: ids by the end of their grace time
    T:held           hash: id to `bytes:pin:digests`, what to give back when it goes, however it goes
    T:refs, T:sizes  hashes: how many contexts have a segment, and its stored bytes
    T:sum            hash: bytes and pinned bytes       T:tags   hash: tag to `id ms`

Names of keys are made inside the scripts; they share the slot of KEYS[1], and so a Cluster runs them.
"""

from __future__ import annotations

from cache import keys
from cache.contexts.retention import MEMORY_SECONDS
from cache.store.store import Script

UPLOAD_SECONDS = 600
"""How long an uploaded segment waits for its commit, then it goes by itself."""

_CONTAINERS_MS = 86_400_000  # the tenant's own keys outlive the last context by a day
_SWEPT_AT_ONCE = 32  # contexts; each has some hundred segments, and a script holds everybody up

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
  local listed = {{}}
  for at = 1, #digests, 64 do listed[#listed + 1] = string.sub(digests, at, at + 63) end
  return listed, tonumber(own), pin, digests
end
local function drop(id)
  local digests, own, pin = digests_of(id)
  if not digests then return 0 end
  local whole, freed = own, own
  for _, digest in ipairs(digests) do
    local size = tonumber(redis.call('HGET', T .. ':sizes', digest) or 0)
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
  local tags = redis.call('HGETALL', T .. ':tags')
  for at = 1, #tags, 2 do
    if string.match(tags[at + 1], '^%S+') == id then
      redis.call('HDEL', T .. ':tags', tags[at])
      say('t', tags[at])
    end
  end
  say('c', id)
  return 1
end
local function sweep()
  local over = redis.call('ZRANGEBYSCORE', T .. ':gone', '-inf', ms(now), 'LIMIT', 0, {_SWEPT_AT_ONCE})
  for _, id in ipairs(over) do drop(id) end
  return #over
end
local function sum(name) return tonumber(redis.call('HGET', T .. ':sum', name) or 0) end
local function totals() return {{sum('bytes'), redis.call('ZCARD', T .. ':ids')}} end
"""

COMMIT = Script(
    "context-commit",
    _PRELUDE
    + """
local id, head, manifest, digests, metadata, pin, expires, ttl, grace = unpack(ARGV, 1, 9)
local room, pin_room, ids_most, tags_most, status, tokens, value, warming, tags, extra = unpack(ARGV, 10, 19)
if redis.call('EXISTS', context(id)) == 1 then return {'ok', now} end
sweep()
local missing, own, fresh, whole = {}, #head + #manifest + #metadata, 0, 0
for at = 1, #digests, 64 do
  local digest = string.sub(digests, at, at + 63)
  local size = redis.call('STRLEN', segment(digest))
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
  rows[at] = redis.call('HMGET', context(id), 'head', 'metadata', 'created', 'expires', 'status', 'tokens', 'error',
    'bytes', 'uses', 'used', 'value', 'warming', 'pin')
end
return {now, rows}
""",
)

IDS = Script("context-ids", _PRELUDE + "return {now, redis.call('ZRANGE', T .. ':ids', 0, -1)}")

UPDATE = Script(
    "context-update",
    _PRELUDE
    + """
local id, metadata, pin, expires, ttl, grace, pin_room = unpack(ARGV)
local digests, own, was, packed = digests_of(id)
if redis.call('EXISTS', context(id)) == 0 or not digests then return {'unknown'} end
local ends = tonumber(redis.call('HGET', context(id), 'expires'))
if tonumber(ttl) > 0 then ends = now + tonumber(ttl) elseif tonumber(expires) > 0 then ends = tonumber(expires) end
if (tonumber(ttl) > 0 or tonumber(expires) > 0) and ends <= now then return {'past'} end
if pin ~= '' and pin ~= was then
  local whole = own
  for _, digest in ipairs(digests) do whole = whole + tonumber(redis.call('HGET', T .. ':sizes', digest) or 0) end
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
return {'ok', now}
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
    local elapsed = math.max(0, now - tonumber(was[2])) / 1000
    local uses = tonumber(was[1]) * math.exp(-elapsed / {MEMORY_SECONDS}) + times
    redis.call('HSET', context(id), 'uses', string.format('%.9g', uses), 'used', ms(now))
    if ttl > 0 then
      local ends = now + ttl
      redis.call('HSET', context(id), 'expires', ms(ends))
      for _, digest in ipairs(digests_of(id) or {{}}) do later(segment(digest), ends + grace) end
      keep(id, ends + grace)
      if math.abs(ends - tonumber(was[3])) > 1000 then say('c', id) end
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
local dropped = 0
for at = 2, #ARGV do
  local id = ARGV[at]
  if ARGV[1] ~= 'unpinned' or redis.call('HGET', context(id), 'pin') ~= '1' then dropped = dropped + drop(id) end
end
return {dropped, totals()}
""",
)

SWEEP = Script("context-sweep", _PRELUDE + "local swept = sweep() return {swept, totals()}")

TAG = Script(
    "context-tag",
    _PRELUDE
    + """
local tag, id, most = unpack(ARGV)
if redis.call('EXISTS', context(id)) == 0 then return {'unknown'} end
if redis.call('HEXISTS', T .. ':tags', tag) == 0 and redis.call('HLEN', T .. ':tags') >= tonumber(most) then
  return {'tags'}
end
redis.call('HSET', T .. ':tags', tag, id .. ' ' .. ms(now))
later(T .. ':tags', tonumber(redis.call('ZSCORE', T .. ':gone', id)) + 86400000)
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

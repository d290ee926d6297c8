"""What the event log in Redis does in one step on the server, as Lua. Every key begins with PREFIX.

identity             what tells this log from another one
counter              the number of the last live event
ids                  hash: event_id -> number
log                  stream: live events, id <number>-0
live:<user>          sorted set: score timestamp, member the number in 16 digits and the event as JSON: events of one
                     instant sort by arrival
versions             hash: user_id -> number of the user's last event and, in 9 digits, a hash of the ids of all of
                     them: a replica that took over without the last events gives their numbers to others
last-seed            the number of the log imported last; active: of the one in place
seeds, names         of logs imported or begun: set of numbers; hash: number -> name
seeded:<n>:<user>    the rows of imported log n, as live:<user>; seeded-users:<n>, seeded-count:<n>: whose, and how many
items                hash: item_id -> JSON; item-revisions: sorted set by revision; item-counter: the last revision
"""

from __future__ import annotations

PREFIX = "springtide:"
DIGITS = 16  # of the number before a member's JSON

_P = f"local p = '{PREFIX}'\n"

# ARGV: time of arrival, then event_id, user_id, timestamp, JSON of each event. Returns how many were new.
APPEND = (
    _P
    + """
local new = 0
for i = 2, #ARGV, 4 do
  local id, user, timestamp, event = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  if redis.call('HEXISTS', p .. 'ids', id) == 0 then
    local number = redis.call('INCR', p .. 'counter')
    redis.call('HSET', p .. 'ids', id, number)
    redis.call('XADD', p .. 'log', string.format('%d-0', number),
               'event_id', id, 'user_id', user, 'event', event, 'arrived', ARGV[1])
    redis.call('ZADD', p .. 'live:' .. user, timestamp, string.format('%016d', number) .. event)
    local ids = redis.sha1hex((redis.call('HGET', p .. 'versions', user) or '') .. ' ' .. id)
    redis.call('HSET', p .. 'versions', user, string.format('%d%09d', number, tonumber(string.sub(ids, 1, 7), 16)))
    new = new + 1
  end
end
return new
"""
)

# ARGV: user_id, greatest count, earliest timestamp. Returns the most recent seeded and live members, latest first.
HISTORY = (
    _P
    + """
local function latest(key)
  return redis.call('ZRANGE', key, '+inf', ARGV[3], 'BYSCORE', 'REV', 'LIMIT', 0, ARGV[2])
end
local active = redis.call('GET', p .. 'active')
local seeded = active and latest(p .. 'seeded:' .. active .. ':' .. ARGV[1]) or {}
return {seeded, latest(p .. 'live:' .. ARGV[1])}
"""
)

# ARGV: user_id, greatest count, earliest timestamp, earliest time of arrival that must stay, most rows to remove.
# Removes surplus live events of one user, oldest first, and returns how many.
TRIM_LIVE = (
    _P
    + """
local key = p .. 'live:' .. ARGV[1]
local expired = redis.call('ZCOUNT', key, '-inf', '(' .. ARGV[3])
local surplus = math.max(redis.call('ZCARD', key) - tonumber(ARGV[2]), expired)
local removed = 0
if surplus > 0 then
  for _, member in ipairs(redis.call('ZRANGE', key, 0, math.min(surplus, tonumber(ARGV[5])) - 1)) do
    local place = string.format('%d-0', tonumber(string.sub(member, 1, 16)))
    local fields = redis.call('XRANGE', p .. 'log', place, place)[1][2]
    if tonumber(fields[8]) < tonumber(ARGV[4]) then
      redis.call('XDEL', p .. 'log', place)
      redis.call('HDEL', p .. 'ids', fields[2])
      redis.call('ZREM', key, member)
      removed = removed + 1
    end
  end
end
if removed > 0 and redis.call('EXISTS', key) == 0 then
  redis.call('HDEL', p .. 'versions', ARGV[1])
end
return removed
"""
)

# ARGV: number of the imported log, user_id, greatest count, earliest timestamp. Returns the rows removed.
TRIM_SEEDED = (
    _P
    + """
local key = p .. 'seeded:' .. ARGV[1] .. ':' .. ARGV[2]
local removed = redis.call('ZREMRANGEBYSCORE', key, '-inf', '(' .. ARGV[4])
removed = removed + redis.call('ZREMRANGEBYRANK', key, 0, -1 - tonumber(ARGV[3]))
if removed > 0 then
  redis.call('DECRBY', p .. 'seeded-count:' .. ARGV[1], removed)
end
return removed
"""
)

# ARGV: item_id, JSON, most items or -1. Returns the revision, or nil where another item would be one too many. It is a
# time in ms at least: a replica that takes over without the last items must not give their revisions to others, which
# Scorers that know them would take for known.
PUT_ITEM = (
    _P
    + """
local most = tonumber(ARGV[3])
if most >= 0 and redis.call('HEXISTS', p .. 'items', ARGV[1]) == 0 and redis.call('HLEN', p .. 'items') >= most then
  return nil
end
local now = redis.call('TIME')
local revision = tonumber(redis.call('GET', p .. 'item-counter') or 0) + 1
revision = math.max(revision, tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000))
revision = string.format('%d', revision)
redis.call('SET', p .. 'item-counter', revision)
redis.call('HSET', p .. 'items', ARGV[1], ARGV[2])
redis.call('ZADD', p .. 'item-revisions', revision, ARGV[1])
return revision
"""
)

# ARGV: revision, greatest count. Returns revision and JSON of the first items of a later one.
ITEMS_SINCE = (
    _P
    + """
local found = redis.call('ZRANGE', p .. 'item-revisions', '(' .. ARGV[1], '+inf', 'BYSCORE', 'LIMIT', 0, ARGV[2],
                         'WITHSCORES')
local answer = {}
for i = 1, #found, 2 do
  answer[#answer + 1] = {found[i + 1], redis.call('HGET', p .. 'items', found[i])}
end
return answer
"""
)

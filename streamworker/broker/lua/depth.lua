-- depth: numbers of ready, running, delayed and dead jobs of a queue. The oldest ready job of a stream is the first entry
-- after the last delivered one.
--
-- KEYS[1..3]  streams
-- KEYS[4]     due set
-- KEYS[5]     dead stream
-- KEYS[6]     meta hash
-- ARGV[1]     group
-- ARGV[2]     ms within which a delayed job is due soon
--
-- returns { entries in the streams, pending, delayed, dead, age in ms of the oldest ready entry (-1: none),
--           1 if paused by an operator, 1 if inactive in PostgreSQL, jobs in the lines of order keys, jobs in the lines of tenants,
--           order keys that halt, delayed jobs that are due soon }
local now = now_ms()
local entries, pending, oldest = 0, 0, -1

-- A key of a wrong type counts as empty here: one bad key must not hide the rest, and `check` names it.
local function count(command, key, ...)
  local reply = redis.pcall(command, key, ...)
  return type(reply) == 'number' and reply or 0
end

for k = 1, 3 do
  local stream = KEYS[k]
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  local last = '0-0'
  for _, info in ipairs(groups.err and {} or groups) do
    local group = {}
    for f = 1, #info, 2 do group[info[f]] = info[f + 1] end
    if group['name'] == ARGV[1] then
      pending = pending + group['pending']
      last = group['last-delivered-id']
    end
  end
  local length = count('XLEN', stream)
  if length > 0 then
    entries = entries + length
    local first = redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1)[1]
    if first then oldest = math.max(oldest, now - tonumber(string.match(first[1], '^(%d+)'))) end
  end
end
local waiting, tenants, halted = in_lines(base_of(KEYS[6]))
return {
  entries, pending, count('ZCARD', KEYS[4]), count('XLEN', KEYS[5]), oldest,
  redis.pcall('HEXISTS', KEYS[6], 'paused') == 1 and 1 or 0, redis.pcall('HEXISTS', KEYS[6], 'inactive') == 1 and 1 or 0,
  waiting, tenants, halted, count('ZCOUNT', KEYS[4], '-inf', now + tonumber(ARGV[2])),
}

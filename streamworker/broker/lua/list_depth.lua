-- list_depth: numbers of ready, running, delayed and dead jobs of a queue. Lists have no ages: the oldest element of each
-- is returned, and its document tells its age.
--
-- KEYS[1..3]  lists: high, normal, low
-- KEYS[4]     due set
-- KEYS[5]     dead stream
-- KEYS[6]     meta hash
-- KEYS[7]     lease set
-- ARGV[1]     ms within which a delayed job is due soon
--
-- returns { ready, claimed, delayed, dead, 1 if paused by an operator, 1 if inactive in PostgreSQL,
--           jobs in the lines of order keys, jobs in the lines of tenants, order keys that halt, delayed jobs that are due soon,
--           the server's time in ms, the rightmost element of each list that has one ... }
-- A key of a wrong type counts as empty here: one bad key must not hide the rest, and `check` names it.
local function count(command, key, ...)
  local reply = redis.pcall(command, key, ...)
  return type(reply) == 'number' and reply or 0
end

local now, ready, oldest = now_ms(), 0, {}
for k = 1, 3 do
  local length = count('LLEN', KEYS[k])
  ready = ready + length
  if length > 0 then oldest[#oldest + 1] = redis.call('LINDEX', KEYS[k], -1) end
end
local waiting, tenants, halted = in_lines(base_of(KEYS[6]))
return {
  ready, count('ZCARD', KEYS[7]), count('ZCARD', KEYS[4]), count('XLEN', KEYS[5]),
  redis.pcall('HEXISTS', KEYS[6], 'paused') == 1 and 1 or 0, redis.pcall('HEXISTS', KEYS[6], 'inactive') == 1 and 1 or 0,
  waiting, tenants, halted, count('ZCOUNT', KEYS[4], '-inf', now + tonumber(ARGV[1])), now, unpack(oldest),
}

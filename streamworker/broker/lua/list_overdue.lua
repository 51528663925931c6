-- list_overdue: find claims whose lease has expired: the lease of the worker that holds them (see `lease`), or the
-- longest known one if that worker stored none. One look at a time for each queue: a token in the meta hash holds the
-- moment of the next look, which is when the claim with the oldest renewal can expire.
--
-- KEYS     two a queue: meta hash, lease set
-- ARGV[1]  the worker's lease in ms
-- ARGV[2]  most claims of each queue
-- ARGV[3]  the server's time as the worker expects it, in ms; 0 if it has not read it yet
-- ARGV[4..]  one a queue: the token as this worker saw it last; 0 if it has not, or since a leap that it noticed
--
-- returns the server's time in ms, then one a queue: { ms until the next look, members of the lease set, the error of a key
--         ("": none), the longest lease of the queue's workers in ms (0: not looked up), the token (-1: not looked up),
--         1 if the clock leapt twice since this worker saw it }
local lease = tonumber(ARGV[1])
local now = now_ms()

-- It leapt ahead: all leases look expired. No claim expires before every worker had one lease to renew. Half a lease is
-- no leap yet: a worker that renews every third of a lease is never idle for a whole one by it, and a slow network looks the same.
local leap = tonumber(ARGV[3]) > 0 and now - tonumber(ARGV[3]) or 0

local function look(k)
  if leap > math.max(lease / 2, 1000) then return { lease, {}, '', 0, -1, 0 } end
  local token = redis.pcall('HGET', KEYS[k], 'returns')
  if failed(token) then return { 1000, {}, token.err, 0, -1, 0 } end
  local due = tonumber(token or 0) or 0
  -- A token further away than a lease comes from a server clock that jumped.
  if due > now and due - now <= lease then return { due - now, {}, '', 0, due, 0 } end

  local leases, shortest, longest = leases_of(KEYS[k], lease)
  if leap > math.max(shortest / 2, 1000) then return { longest, {}, '', longest, -1, 0 } end
  if fell(due, tonumber(ARGV[4 + (k - 1) / 2]), shortest, longest) then return { longest, {}, '', longest, due, 1 } end

  -- It leapt back: what was renewed in its future would not age before the clock is there again. Its lease begins now.
  local future = redis.pcall('ZRANGEBYSCORE', KEYS[k + 1], '(' .. string.format('%d', now), '+inf', 'LIMIT', 0, ARGV[2])
  for _, member in ipairs(future.err and {} or future) do
    redis.pcall('ZADD', KEYS[k + 1], string.format('%d', now), member)
  end
  local last, members, offset = string.format('%d', now - shortest), {}, 0
  repeat
    local rows = redis.pcall('ZRANGEBYSCORE', KEYS[k + 1], '-inf', last, 'WITHSCORES', 'LIMIT', string.format('%d', offset), ARGV[2])
    if rows.err then return { 1000, {}, rows.err, longest, -1, 0 } end
    for r = 1, #rows, 2 do
      local its = leases[string.match(rows[r], '^%S+ %d+ (.+)$') or ''] or longest
      if now - tonumber(rows[r + 1]) >= its then members[#members + 1] = rows[r] end
    end
    offset = offset + #rows / 2
  until #rows < 2 * tonumber(ARGV[2]) or #members >= tonumber(ARGV[2])
  local first = redis.call('ZRANGE', KEYS[k + 1], 0, 0, 'WITHSCORES')[2]
  local wait = first and math.min(math.max(tonumber(first) + shortest - now, 20), shortest) or shortest
  if first and shortest < longest then wait = math.min(math.max(wait, 500), math.floor(shortest / 2)) end -- it may not be the next
  if #members > 0 then wait = math.min(500, math.floor(shortest / 2)) end -- the worker that releases them may die meanwhile
  redis.pcall('HSET', KEYS[k], 'returns', string.format('%d', now + wait)) -- out of memory, every worker looks
  return { wait, members, '', longest, now + wait, 0 }
end

local result = { now }
for k = 1, #KEYS, 2 do result[#result + 1] = look(k) end
return result

-- list_overdue: claims whose lease ran out. One look at a time per queue: the token in meta says when the next one is due,
-- which is when the claim that was not renewed for longest could become an orphan.
--
-- KEYS     two a queue: meta hash, lease set
-- ARGV[1]  lease in ms
-- ARGV[2]  most claims of each queue
-- ARGV[3]  what the server's clock should show by the worker's own, in ms; 0 if it has not seen it yet
--
-- returns what the clock shows in ms, then one triple a queue: { ms until the next look, members of the lease set, the error of
--         a key ("": none) }
local lease = tonumber(ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- It leapt ahead: everything looks abandoned. Nobody is taken for dead before everyone had a lease to renew. Half a lease is
-- no leap yet: who renews every third of one is never idle for a whole one by it, and a slow network looks like it.
local leapt = tonumber(ARGV[3]) > 0 and now - tonumber(ARGV[3]) > math.max(lease / 2, 1000)

local function look(k)
  if leapt then return { lease, {}, '' } end
  local token = redis.pcall('HGET', KEYS[k], 'returns')
  if type(token) == 'table' and token.err then return { 1000, {}, token.err } end
  local due = tonumber(token or 0) or 0
  -- A token further away than a lease comes from a server clock that jumped.
  if due > now and due - now <= lease then return { due - now, {}, '' } end
  -- It leapt back: what was renewed in its future would not age before the clock is there again. Its lease begins now.
  local future = redis.pcall('ZRANGEBYSCORE', KEYS[k + 1], '(' .. string.format('%d', now), '+inf', 'LIMIT', 0, ARGV[2])
  for _, member in ipairs(future.err and {} or future) do
    redis.pcall('ZADD', KEYS[k + 1], string.format('%d', now), member)
  end
  local last = string.format('%d', now - lease)
  local members = redis.pcall('ZRANGEBYSCORE', KEYS[k + 1], '-inf', last, 'LIMIT', 0, ARGV[2])
  if members.err then return { 1000, {}, members.err } end
  local first = redis.call('ZRANGE', KEYS[k + 1], 0, 0, 'WITHSCORES')[2]
  local wait = first and math.min(math.max(tonumber(first) + lease - now, 20), lease) or lease
  if #members > 0 then wait = math.min(500, math.floor(lease / 2)) end -- whoever gives them back may die over it
  redis.pcall('HSET', KEYS[k], 'returns', string.format('%d', now + wait)) -- out of memory, everybody looks
  return { wait, members, '' }
end

local result = { now }
for k = 1, #KEYS, 2 do result[#result + 1] = look(k) end
return result

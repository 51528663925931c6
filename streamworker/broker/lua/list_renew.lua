-- list_renew: renew leases, each only if the claim still holds: taking a claim over deletes its member of the lease set.
-- Where the lease set itself was deleted, the worker's claimed list decides. The worker's lease is stored where
-- reclaiming reads it.
--
-- KEYS[1]  lease set of the queue
-- KEYS[2]  claimed list of the worker
-- KEYS[3]  meta hash of the queue
-- ARGV[1]  worker id
-- ARGV[2]  its lease in ms
-- ARGV[3..]  members of the lease set
--
-- returns the members of claims that are lost
local now = string.format('%d', now_ms())
local lost, doubted, some = {}, {}, false

-- A first write that changes nothing: a script that has written may write on when memory is out, and this does not grow.
redis.call('ZREM', KEYS[1], '')
local known = redis.pcall('HGET', KEYS[3], 'leases') or ''
if type(known) == 'string' and not string.find('\n' .. known, '\n' .. ARGV[1] .. ' ', 1, true) then
  redis.pcall('HSET', KEYS[3], 'leases', known .. ARGV[1] .. ' ' .. ARGV[2] .. '\n') -- it was deleted
end
for a = 3, #ARGV do
  local member = ARGV[a]
  if redis.call('ZSCORE', KEYS[1], member) then
    redis.call('ZADD', KEYS[1], now, member)
  else
    doubted[string.match(member, '^%S+ %d+') or member], some = member, true
  end
end
if some then
  for _, wrapper in ipairs(redis.call('LRANGE', KEYS[2], 0, -1)) do
    local token = string.match(wrapper, '^%S+ %d+')
    if token and doubted[token] then
      redis.call('ZADD', KEYS[1], now, doubted[token])
      doubted[token] = nil
    end
  end
end
for _, member in pairs(doubted) do lost[#lost + 1] = member end
return lost

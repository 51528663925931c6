-- list_keep: renew all leases of a worker that is alive and cannot renew by itself, each only if it has not expired.
--
-- KEYS[1]  lease set of the queue
-- KEYS[2]  claimed list of the worker
-- ARGV[1]  worker id
-- ARGV[2]  its lease in ms
--
-- returns the number of leases that were prolonged
local now, kept = now_ms(), 0

-- A first write that changes nothing: a script that has written may write on when memory is out, and this does not grow.
redis.call('ZREM', KEYS[1], '')
for _, wrapper in ipairs(redis.call('LRANGE', KEYS[2], 0, -1)) do
  local token = string.match(wrapper, '^%S+ %d+')
  local member = token and token .. ' ' .. ARGV[1]
  local score = member and redis.call('ZSCORE', KEYS[1], member)
  if score and now - tonumber(score) < tonumber(ARGV[2]) then
    redis.call('ZADD', KEYS[1], string.format('%d', now), member)
    kept = kept + 1
  end
end
return kept

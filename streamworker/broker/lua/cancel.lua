-- cancel: mark a job as cancelled, or delete the mark. Workers check what they claim against the marks while the field
-- "cancelled" of the meta hash is set; workers that hold jobs of the queue are notified.
--
-- KEYS[1]  cancelled set of the queue
-- KEYS[2]  meta hash of the queue
-- KEYS[3]  due set of the queue: notifications are published on the channel named like it
-- ARGV[1]  job id
-- ARGV[2]  ms the mark lives (0: take it back)
--
-- returns 1 changed, 0 it was so already
local ttl = tonumber(ARGV[2])
if ttl == 0 then
  local gone = redis.call('ZREM', KEYS[1], ARGV[1])
  if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('HDEL', KEYS[2], 'cancelled') end
  return gone
end
local now = now_ms()
local added = redis.call('ZADD', KEYS[1], string.format('%d', now + ttl), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ttl)
redis.call('HSET', KEYS[2], 'cancelled', '1')
-- Expired marks of jobs that had ended before they were cancelled: no worker claims them any more.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now), 'LIMIT', 0, 100)) do
  redis.call('ZREM', KEYS[1], id)
end
redis.pcall('PUBLISH', KEYS[3], 'cancel')
return added

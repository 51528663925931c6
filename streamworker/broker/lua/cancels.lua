-- cancels: find the cancelled ones of some jobs. Where no mark is left, the field "cancelled" of the meta hash is
-- deleted, so that workers do not ask again.
--
-- KEYS[1]  cancelled set of the queue
-- KEYS[2]  meta hash of the queue
-- ARGV     job ids
--
-- returns the numbers of those that were, from 1
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HDEL', KEYS[2], 'cancelled')
  return {}
end
local now = now_ms()
local result = {}
for i, id in ipairs(ARGV) do
  local until_ms = redis.call('ZSCORE', KEYS[1], id)
  if until_ms and tonumber(until_ms) > now then result[#result + 1] = i end
end
return result

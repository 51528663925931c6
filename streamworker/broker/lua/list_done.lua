-- list_done: delete finished claims, each only if it still holds. The fence is the exact string in the worker's own list:
-- id, delivery count, level and bytes.
--
-- KEYS[1]  claimed list of the worker
-- KEYS[2]  lease set of the queue
-- KEYS[3]  meta hash of the queue
-- ARGV     two a claim: its member in the lease set, its string in the claimed list
--
-- returns one number a claim: 1 settled, 0 lost; and one more, 1 if a caller waits for jobs of the queue to end
local result, left = {}, 0
for i = 1, #ARGV, 2 do
  local gone = redis.call('LREM', KEYS[1], 1, ARGV[i + 1])
  if gone == 1 then redis.call('ZREM', KEYS[2], ARGV[i]) end
  result[#result + 1], left = gone, left + gone
end
if left > 0 then redis.pcall('HINCRBY', KEYS[3], 'left', left) end
result[#result + 1] = type(redis.pcall('HGET', KEYS[3], 'waits')) == 'string' and 1 or 0
return result

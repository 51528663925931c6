-- list_finish: delete ended claims, as list_done does, and with each the mark that its job was cancelled. A job that was popped
-- lies nowhere: only its mark goes.
--
-- KEYS[1]  claimed list of the worker
-- KEYS[2]  lease set of the queue
-- KEYS[3]  meta hash of the queue
-- KEYS[4]  cancelled set of the queue
-- ARGV     three a claim: its member in the lease set, its string in the claimed list ("": it was popped), job id
--
-- returns one number a claim: 1 settled, 0 lost
local result, left = {}, 0
for i = 1, #ARGV, 3 do
  local gone = ARGV[i + 1] == '' and 1 or redis.call('LREM', KEYS[1], 1, ARGV[i + 1])
  if gone == 1 then
    redis.call('ZREM', KEYS[2], ARGV[i])
    redis.call('ZREM', KEYS[4], ARGV[i + 2])
  end
  result[#result + 1], left = gone, left + gone
end
if left > 0 then redis.pcall('HINCRBY', KEYS[3], 'left', left) end
if left > 0 and redis.call('EXISTS', KEYS[4]) == 0 then redis.call('HDEL', KEYS[3], 'cancelled') end
return result

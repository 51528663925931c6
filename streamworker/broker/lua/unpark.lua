-- unpark: delete a parked job for good, or make it due now. A body given with it replaces the stored one, because a
-- document that says "not before" would be parked again by the worker that reads it. The deduplication key of a deleted
-- job is deleted too, unless another job has it by now, its order key is passed on, and its stored payload is noted.
--
-- KEYS[1]  due set of the queue
-- KEYS[2]  bodies hash of the queue
-- KEYS[3..] deduplication key of a job that is deleted, if it has one
-- ARGV[1]  "forget" or "hasten"
-- ARGV[2]  member
-- ARGV[3]  body to store ("": as it is)
-- ARGV[4]  type of the ready keys: stream or list
-- ARGV[5]  id of the job, if it has such a key
--
-- returns 1 done, 0 it is not parked any more, -1 it has no body and cannot run
if not redis.call('ZSCORE', KEYS[1], ARGV[2]) then return 0 end
if ARGV[1] == 'forget' then
  local body = redis.call('HGET', KEYS[2], ARGV[2]) or ''
  local order, _, id = flow_of(body)
  redis.call('ZREM', KEYS[1], ARGV[2])
  redis.call('HDEL', KEYS[2], ARGV[2])
  unstore(base_of(KEYS[1]), body)
  if KEYS[3] then let_go(KEYS[3], ARGV[5]) end
  if order and order ~= '' then pass_on(ARGV[4], base_of(KEYS[1]), { order }, { id }) end
else
  if ARGV[3] == '' and redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then return -1 end
  if ARGV[3] ~= '' then redis.call('HSET', KEYS[2], ARGV[2], ARGV[3]) end
  redis.call('ZADD', KEYS[1], 0, ARGV[2])
end
return 1

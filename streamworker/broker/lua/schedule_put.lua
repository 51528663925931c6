-- schedule_put: store, change or delete a schedule that is kept as data, and notify who offers its ticks. A schedule keeps its
-- next tick unless another one is given, so that storing it again unchanged misses none.
--
-- KEYS[1]  sorted set of the queue: schedule to the ms of its next tick (inf: it is paused)
-- KEYS[2]  hash of the queue: schedule to its definition
-- KEYS[3]  hash of the queue: schedule to the ms of its last tick, or minus the ms of its removal; the field "" is there if a ledger is
-- KEYS[4]  string: the process that waits for the next tick of the queue
-- ARGV[1]  the schedule
-- ARGV[2]  its definition ("": delete it)
-- ARGV[3]  the definition that is replaced ("": there is none)
-- ARGV[4]  ms of its next tick
-- ARGV[5]  1 if that is to be the next tick even of a schedule that has one
-- ARGV[6]  channel of the notification
--
-- returns 1 done, 0 the definition is another one by now
if (redis.call('HGET', KEYS[2], ARGV[1]) or '') ~= ARGV[3] then return 0 end
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[2], ARGV[1])
  if redis.call('HEXISTS', KEYS[3], '') == 1 then
    redis.call('HSET', KEYS[3], ARGV[1], string.format('-%d', now_ms()))
  else
    redis.call('HDEL', KEYS[3], ARGV[1])
  end
  redis.call('ZREM', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
  local ticked = redis.call('HGET', KEYS[3], ARGV[1])
  if ticked and string.sub(ticked, 1, 1) == '-' then redis.call('HDEL', KEYS[3], ARGV[1]) end
  if ARGV[5] == '1' or not redis.call('ZSCORE', KEYS[1], ARGV[1]) then redis.call('ZADD', KEYS[1], ARGV[4], ARGV[1]) end
end
redis.call('DEL', KEYS[4])
redis.pcall('PUBLISH', ARGV[6], '1')
return 1

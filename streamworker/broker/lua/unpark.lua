-- unpark: delete parked jobs for good, or make them due now.
--
-- KEYS[1]    due set of the queue
-- KEYS[2]    bodies hash of the queue
-- ARGV[1]    "forget" or "hasten"
-- ARGV[2..]  members
--
-- returns the number of members that were still parked
local found = 0
for i = 2, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    found = found + 1
    if ARGV[1] == 'forget' then
      redis.call('ZREM', KEYS[1], ARGV[i])
      redis.call('HDEL', KEYS[2], ARGV[i])
    else
      redis.call('ZADD', KEYS[1], 0, ARGV[i])
    end
  end
end
return found

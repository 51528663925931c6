-- schedule_forget: forget that schedules were removed, which the ledger has noted, and note that there is one: from now on a removed
-- schedule leaves the moment of its removal, so that it is no lost one.
--
-- KEYS[1]  hash of the queue: schedule to the ms of its last tick, or minus the ms of its removal; the field "" is there if a ledger is
-- ARGV[1..]  two a removal: the schedule, what the hash says of it
--
-- returns 1
redis.call('HSET', KEYS[1], '', '1')
for k = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[k]) == ARGV[k + 1] then redis.call('HDEL', KEYS[1], ARGV[k]) end
end
return 1

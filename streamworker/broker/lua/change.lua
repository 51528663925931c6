-- change: change a job that waits: its time, level, queue or document, if it waits as it was read. A worker that has claimed it
-- meanwhile keeps it as it was. The growing write comes first: where it fails, nothing has changed. The stored payload of a job that
-- has another one now is noted.
--
-- KEYS[1]  due set of the queue
-- KEYS[2]  bodies hash of the queue
-- KEYS[3]  key of ready jobs in which it waits
-- KEYS[4]  due set of the queue that it goes to
-- KEYS[5]  bodies hash of that queue
-- KEYS[6]  key of ready jobs that it goes to
-- ARGV[1]  delayed or ready: where it waits
-- ARGV[2]  its member of the due set, or its entry id ("" in a list)
-- ARGV[3]  type of the ready keys: stream or list
-- ARGV[4]  the consumer group
-- ARGV[5]  its document
-- ARGV[6]  its new document
-- ARGV[7]  its new member of the due set ("": it becomes ready)
-- ARGV[8]  ms at which it is due ("": as before)
--
-- returns 1 done, 0 it does not wait as it was read any more, or the error that the server gave
local at = ARGV[8]
if ARGV[1] == 'delayed' then
  local score = redis.call('ZSCORE', KEYS[1], ARGV[2])
  if not score or redis.call('HGET', KEYS[2], ARGV[2]) ~= ARGV[5] then return 0 end
  if at == '' then at = score end
elseif ARGV[3] == 'list' then
  if not redis.call('LPOS', KEYS[3], ARGV[5]) then return 0 end
else
  local entry = redis.call('XRANGE', KEYS[3], ARGV[2], ARGV[2])[1]
  if not entry or job_in(entry[2]) ~= ARGV[5] then return 0 end
  local claimed = redis.pcall('XPENDING', KEYS[3], ARGV[4], ARGV[2], ARGV[2], 1)
  if not failed(claimed) and claimed[1] then return 0 end
end

if ARGV[7] == '' then
  local added
  if ARGV[1] == 'delayed' then
    added = enter(ARGV[3], base_of(KEYS[4]), level_of(KEYS[6]), ARGV[6], 'due')
  else
    added = add(ARGV[3], KEYS[6], ARGV[6])
  end
  if failed(added) then return added end
else
  local stored = redis.pcall('HSET', KEYS[5], ARGV[7], ARGV[6])
  if failed(stored) then return stored end
  stored = redis.pcall('ZADD', KEYS[4], at, ARGV[7])
  if failed(stored) then return stored end
  announce(KEYS[4], ARGV[7], math.max(0, tonumber(at) - now_ms()))
end
unstore(base_of(KEYS[1]), ARGV[5], ARGV[6])
if ARGV[1] == 'delayed' then
  if ARGV[7] == ARGV[2] and KEYS[1] == KEYS[4] then return 1 end
  redis.call('ZREM', KEYS[1], ARGV[2])
  redis.call('HDEL', KEYS[2], ARGV[2])
elseif ARGV[3] == 'list' then
  redis.call('LREM', KEYS[3], -1, ARGV[5])
else
  redis.call('XDEL', KEYS[3], ARGV[2])
end
return 1

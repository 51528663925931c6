-- remove: delete one waiting job for good, wherever it waits, but not if a worker has claimed it meanwhile. Its deduplication key
-- is deleted too, unless another job has it by now, its order key is passed on, and its stored payload is noted.
--
-- KEYS[1]  due set of the queue
-- KEYS[2]  where it waits: a key of ready jobs, a level's tenants' lines, or the line of an order key
-- KEYS[3..] deduplication key of the job, if it has one
-- ARGV[1]  type of the ready keys: stream or list
-- ARGV[2]  "ready", "fair" or "order"
-- ARGV[3]  what is there: the id of an entry of a stream, else the whole element
-- ARGV[4]  the document
-- ARGV[5]  group
-- ARGV[6]  id of the job, if it has such a key
--
-- returns 1 deleted, 0 it is not there any more, or was claimed
local base, gone = base_of(KEYS[1]), 0
if ARGV[2] == 'fair' then
  gone = redis.call('ZREM', KEYS[2], ARGV[3])
elseif ARGV[2] == 'order' or ARGV[1] == 'list' then
  gone = redis.call('LREM', KEYS[2], 1, ARGV[3])
  if gone == 1 and ARGV[2] == 'order' then
    redis.call('HINCRBY', base .. ':meta', 'waiting', -1)
    if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('SREM', base .. ':lines', string.sub(KEYS[2], #base + 8)) end
  end
else
  local claimed, err = pending_entry(KEYS[2], ARGV[5], ARGV[3])
  if err then return redis.error_reply(err) end
  if not claimed then gone = redis.call('XDEL', KEYS[2], ARGV[3]) end
end
if gone == 1 then
  unstore(base, ARGV[4])
  if KEYS[3] then let_go(KEYS[3], ARGV[6]) end
  local order, _, id = flow_of(ARGV[4])
  if order and order ~= '' and ARGV[2] ~= 'order' then pass_on(ARGV[1], base, { order }, { id }) end
end
return gone

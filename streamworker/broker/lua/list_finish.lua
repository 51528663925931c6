-- list_finish: delete ended claims like `list_done`, each only if it still holds, and keep and publish their result
-- notes. The mark of a cancelled job is deleted; so is a deduplication key that is free now, unless another job has it by
-- then. The order key of an ended job is passed on. A job that was popped is stored nowhere.
--
-- KEYS[1]  claimed list of the worker
-- KEYS[2]  lease set of the queue
-- KEYS[3]  meta hash of the queue
-- KEYS[4]  cancelled set of the queue
-- KEYS[5..] two a claim: result note of its job, which is also the channel on which it is published; and
--           key that remembers a minute longer for how long a note was kept. Behind them deduplication keys
-- ARGV     seven a claim: its member in the lease set, its string in the claimed list ("": it was popped), job id, ms to keep
--          the note (0: not at all), note, number of the deduplication key in KEYS (0: none, or it stays), order
--          key ("": none)
--
-- returns one number a claim: 1 settled, 0 lost
local result, left = {}, 0
local marked = redis.pcall('EXISTS', KEYS[4]) == 1

for i = 1, #ARGV, 7 do
  local gone = ARGV[i + 1] == '' and 1 or redis.call('LREM', KEYS[1], 1, ARGV[i + 1])
  if gone == 1 then
    redis.call('ZREM', KEYS[2], ARGV[i])
    if marked then redis.pcall('ZREM', KEYS[4], ARGV[i + 2]) end
    keep(KEYS[5 + 2 * #result], ARGV[i + 3], ARGV[i + 4], KEYS[6 + 2 * #result])
    local k = tonumber(ARGV[i + 5])
    if k > 0 then let_go(KEYS[k], ARGV[i + 2]) end
    if ARGV[i + 6] ~= '' then pass_on('list', base_of(KEYS[3]), { ARGV[i + 6] }, { ARGV[i + 2] }) end
  end
  result[#result + 1], left = gone, left + gone
end
if left > 0 then redis.pcall('HINCRBY', KEYS[3], 'left', left) end
if left > 0 and redis.call('EXISTS', KEYS[4]) == 0 then redis.pcall('HDEL', KEYS[3], 'cancelled') end
return result

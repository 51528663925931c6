-- finish: acknowledge and delete ended entries like `done`, each only if the claim still holds, and keep and publish
-- their result notes. The mark of a cancelled job is deleted; so is a deduplication key that is free now, unless
-- another job has it by then. The order key of an ended job is passed on.
--
-- KEYS[1]    stream
-- KEYS[2]    cancelled set of the queue
-- KEYS[3]    meta hash of the queue
-- KEYS[4..]  two a claim: result note of its job, which is also the channel on which it is published; and
--            key that remembers a minute longer for how long a note was kept. Behind them deduplication keys
-- ARGV[1]    group
-- ARGV[2]    consumer
-- ARGV[3..]  seven a claim: entry id, delivery count, job id, ms to keep the note (0: not at all), note, number of the
--            deduplication key in KEYS (0: none, or it stays), order key ("": none)
--
-- returns one number a claim: 1 settled, 0 lost
local group, consumer = ARGV[1], ARGV[2]
local result, settled = {}, 0
local marked = redis.pcall('EXISTS', KEYS[2]) == 1

for i = 3, #ARGV, 7 do
  local id = ARGV[i]
  local pending, trouble = pending_entry(KEYS[1], group, id)
  if trouble then return redis.error_reply(trouble) end
  if pending and pending[2] == consumer and pending[4] == tonumber(ARGV[i + 1]) then
    redis.call('XACK', KEYS[1], group, id)
    redis.call('XDEL', KEYS[1], id)
    if marked then redis.pcall('ZREM', KEYS[2], ARGV[i + 2]) end
    keep(KEYS[4 + 2 * #result], ARGV[i + 3], ARGV[i + 4], KEYS[5 + 2 * #result])
    local k = tonumber(ARGV[i + 5])
    if k > 0 then let_go(KEYS[k], ARGV[i + 2]) end
    if ARGV[i + 6] ~= '' then pass_on('stream', base_of(KEYS[3]), { ARGV[i + 6] }, { ARGV[i + 2] }) end
    result[#result + 1], settled = 1, settled + 1
  else
    result[#result + 1] = 0
  end
end
if settled > 0 and redis.call('EXISTS', KEYS[2]) == 0 then redis.pcall('HDEL', KEYS[3], 'cancelled') end
return settled < #result and read_only(KEYS[1], group) or result

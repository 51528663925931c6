-- park: settle claims whose jobs go on: write the job's next form to the due set or back to its stream, then acknowledge
-- and delete the old entry, each only if the claim still holds. The growing write comes first: out of memory, nothing
-- changes.
--
-- KEYS[1]    stream
-- KEYS[2]    due set of the queue
-- KEYS[3]    bodies hash of the queue
-- KEYS[4]    calls of the queue: a job that was called for its limit meanwhile goes back to the stream at once
-- ARGV[1]    group
-- ARGV[2..]  six a claim: consumer, entry id, delivery count, delay in ms (negative: back to the stream at once),
--            member for the due set, body
--
-- returns one number a claim: 1 settled, 0 lost; or the error why it was refused
local group = ARGV[1]
local now = now_ms()
local result, settled = {}, 0

for i = 2, #ARGV, 6 do
  local id = ARGV[i + 1]
  local pending, trouble = pending_entry(KEYS[1], group, id)
  if trouble then return redis.error_reply(trouble) end
  if not pending or pending[2] ~= ARGV[i] or pending[4] ~= tonumber(ARGV[i + 2]) then
    result[#result + 1] = 0
  else
    local job = { ARGV[i + 4], ARGV[i + 5] }
    local err = park(job, tonumber(ARGV[i + 3]), now, 'stream', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
    if not err then
      prolong(base_of(KEYS[2]), job[2], tonumber(ARGV[i + 3]))
      redis.call('XACK', KEYS[1], group, id)
      redis.call('XDEL', KEYS[1], id)
      settled = settled + 1
    end
    result[#result + 1] = err or 1
  end
end
-- Last, because a script that has written once is not stopped any more when memory runs out.
return settled < #result and read_only(KEYS[1], group) or result

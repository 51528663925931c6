-- emit: append chunks to the outputs of running jobs, each only if the claim still holds, so that a zombie adds nothing to
-- the output of its successor. Repeating it is safe.
--
-- KEYS[1]    stream
-- KEYS[2..]  output of each job, which is also the channel on which its last position is published
-- ARGV[1]    group
-- ARGV[2]    consumer
-- ARGV[3]    ms an output lives after its last chunk
-- ARGV[4]    most chunks of an output
-- ARGV[5]    most bytes of an output
-- ARGV[6..]  six a job: entry id, delivery count, number of the attempt, chunks that this run stored before, number of these
--            chunks, the chunks as an array of MessagePack
--
-- returns one a job: 1 stored, 0 the claim is lost, or the error why it cannot be stored
local result, lost = {}, false
local bounds = { ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]) }
for i = 6, #ARGV, 6 do
  local pending, trouble = pending_entry(KEYS[1], ARGV[1], ARGV[i])
  if trouble then return redis.error_reply(trouble) end
  if pending and pending[2] == ARGV[2] and pending[4] == tonumber(ARGV[i + 1]) then
    local run = ARGV[i] .. ' ' .. ARGV[i + 1] .. ' ' .. ARGV[2]
    result[#result + 1] = append(KEYS[#result + 2], run, { unpack(ARGV, i + 2, i + 5) }, bounds) or 1
  else
    result[#result + 1], lost = 0, true
  end
end
return lost and read_only(KEYS[1], ARGV[1]) or result

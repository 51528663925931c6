-- list_emit: append chunks to the outputs of running jobs like `emit`, each only if the claim still holds: taking a claim
-- over deletes its member of the lease set. Where the lease set itself was deleted, the worker's claimed list decides.
--
-- KEYS[1]    lease set of the queue
-- KEYS[2]    claimed list of the worker
-- KEYS[3..]  output of each job, which is also the channel on which its last position is published
-- ARGV[1]    ms an output lives after its last chunk
-- ARGV[2]    most chunks of an output
-- ARGV[3]    most bytes of an output
-- ARGV[4..]  six a job: member of the lease set, 1 if it is a claim (0: it was popped, and cannot be lost), number of the
--            attempt, chunks that this run stored before, number of these chunks, the chunks as an array of MessagePack
--
-- returns one a job: 1 stored, 0 the claim is lost, or the error why it cannot be stored
local function holds(member)
  if redis.call('ZSCORE', KEYS[1], member) then return true end
  local token = string.match(member, '^%S+ %d+')
  for _, wrapper in ipairs(redis.call('LRANGE', KEYS[2], 0, -1)) do
    if string.match(wrapper, '^%S+ %d+') == token then return true end
  end
  return false
end

local result, lost = {}, false
local bounds = { ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]) }
for i = 4, #ARGV, 6 do
  if ARGV[i + 1] == '0' or holds(ARGV[i]) then
    result[#result + 1] = append(KEYS[#result + 3], ARGV[i], { unpack(ARGV, i + 2, i + 5) }, bounds) or 1
  else
    result[#result + 1], lost = 0, true
  end
end
return lost and read_only(KEYS[1]) or result

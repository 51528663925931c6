-- list_bury: move claims to the dead letters, each only if it still holds. The growing write comes first: out of memory,
-- nothing changes. A job that was popped is stored nowhere; the last ones of them that became dead letters are remembered
-- with the worker's heartbeat, so that a repeat after a lost reply is a no-op. The order key of a
-- dead job is passed on, or halted: kept by the dead job until that is replayed or deleted.
-- A deduplication key that is held until its job ends is free.
--
-- KEYS[1]    claimed list of the worker
-- KEYS[2]    lease set of the queue
-- KEYS[3]    dead stream of the queue
-- KEYS[4]    meta hash of the queue
-- KEYS[5]    the worker's heartbeat
-- KEYS[6..]  one a claim: result note of its job, and the channel on which it is published
-- ARGV[1]    F, number of values that make a letter
-- ARGV[2..]  6 + F a claim: its member in the lease set, its string in the claimed list ("": it was popped), ms to keep the
--            note (0: not at all), note, job id, 1 if its order key halts, names and values; the document is the second of these
--
-- returns one number a claim: 1 settled, 0 lost; or the error why it was refused
local size, result, left, ended = tonumber(ARGV[1]), {}, 0, {}

local function holds(member, wrapper)
  if wrapper ~= '' then return redis.call('LPOS', KEYS[1], wrapper) end
  local before = redis.call('HGET', KEYS[5], 'buried ' .. KEYS[3]) or ''
  if not string.find(before, member, 1, true) then return true end
  ended[#ended + 1] = member
  return false
end

for i = 2, #ARGV, 6 + size do
  local member, wrapper = ARGV[i], ARGV[i + 1]
  if not holds(member, wrapper) then
    result[#result + 1] = 0
  else
    local added = redis.pcall('XADD', KEYS[3], '*', unpack(ARGV, i + 6, i + 5 + size))
    if failed(added) then
      result[#result + 1] = added.err
    else
      if wrapper == '' then
        ended[#ended + 1] = member
      else
        redis.call('LREM', KEYS[1], 1, wrapper)
        redis.call('ZREM', KEYS[2], member)
      end
      keep(KEYS[6 + #result], ARGV[i + 2], ARGV[i + 3])
      bereave('list', base_of(KEYS[3]), ARGV[i + 7], ARGV[i + 4], ARGV[i + 5] == '1')
      release(base_of(KEYS[3]), ARGV[i + 7])
      result[#result + 1], left = 1, left + 1
    end
  end
end
if #ended > 0 then redis.pcall('HSET', KEYS[5], 'buried ' .. KEYS[3], table.concat(ended, '\n')) end
if left > 0 then redis.pcall('HINCRBY', KEYS[4], 'left', left) end
-- Last, because a script that has written once is not stopped any more when memory runs out.
return left < #result and read_only(KEYS[2]) or result

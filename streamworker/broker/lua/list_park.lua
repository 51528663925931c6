-- list_park: settle claims whose jobs go on: write the job's next form to the due set or behind the others of its list,
-- then delete the claim, each only if it still holds. The growing write comes first: out of memory, nothing changes. A
-- job that was popped is stored nowhere; the last ones of them that were parked are remembered with the worker's
-- heartbeat, so that a repeat after a lost reply is a no-op.
--
-- KEYS[1]  claimed list of the worker
-- KEYS[2]  lease set of the queue
-- KEYS[3]  list of the level
-- KEYS[4]  due set of the queue
-- KEYS[5]  bodies hash of the queue
-- KEYS[6]  meta hash of the queue
-- KEYS[7]  the worker's heartbeat
-- KEYS[8]  calls of the queue: a job that was called for its limit meanwhile is ready at once
-- ARGV     five a claim: its member in the lease set, its string in the claimed list ("": it was popped), delay in ms
--          (negative: ready at once), member for the due set, body
--
-- returns one number a claim: 1 settled, 0 lost; or the error why it was refused
local now = now_ms()
local result, left, ended = {}, 0, {}

local function holds(member, wrapper)
  if wrapper ~= '' then return redis.call('LPOS', KEYS[1], wrapper) end
  local before = redis.call('HGET', KEYS[7], 'parked ' .. KEYS[3]) or ''
  if not string.find(before, member, 1, true) then return true end
  ended[#ended + 1] = member
  return false
end

for i = 1, #ARGV, 5 do
  local member, wrapper = ARGV[i], ARGV[i + 1]
  if not holds(member, wrapper) then
    result[#result + 1] = 0
  else
    local job = { ARGV[i + 3], ARGV[i + 4] }
    local err = park(job, tonumber(ARGV[i + 2]), now, 'list', KEYS[3], KEYS[4], KEYS[5], KEYS[8])
    if not err then
      prolong(base_of(KEYS[4]), job[2], tonumber(ARGV[i + 2]))
      if wrapper == '' then
        ended[#ended + 1] = member
      else
        redis.call('LREM', KEYS[1], 1, wrapper)
        redis.call('ZREM', KEYS[2], member)
      end
      left = left + 1
    end
    result[#result + 1] = err or 1
  end
end
if #ended > 0 then redis.pcall('HSET', KEYS[7], 'parked ' .. KEYS[3], table.concat(ended, '\n')) end
if left > 0 then redis.pcall('HINCRBY', KEYS[6], 'left', left) end
-- Last, because a script that has written once is not stopped any more when memory runs out.
return left < #result and read_only(KEYS[2]) or result

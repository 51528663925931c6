-- park: end claims whose jobs go on: write the job's next form to the due set or back to its stream, then acknowledge and
-- delete the old entry, each only if the claim still holds. The growing write comes first: out of memory, nothing happened.
-- A job that becomes the first to be due rings the bell: a message with the ms until then, on the channel named like KEYS[2].
--
-- KEYS[1]    stream
-- KEYS[2]    due set of the queue
-- KEYS[3]    bodies hash of the queue
-- KEYS[4]    calls of the queue: who waited for a limit and was called meanwhile goes back to the stream at once
-- ARGV[1]    group
-- ARGV[2..]  six a claim: consumer, entry id, delivery count, delay in ms (negative: back to the stream at once),
--            member for the due set, body
--
-- returns one number a claim: 1 settled, 0 lost; or the error why it was refused
local group = ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local result, settled = {}, 0

local function failed(reply) return type(reply) == 'table' and reply.err or nil end
-- The error why it cannot be stored, or nil.

local function store(delay, member, body)
  if delay < 0 or type(redis.pcall('ZSCORE', KEYS[4], member)) == 'string' then return failed(redis.pcall('XADD', KEYS[1], '*', 'job', body)) end
  local err = failed(redis.pcall('HSET', KEYS[3], member, body))
  if err then return err end
  err = failed(redis.pcall('ZADD', KEYS[2], string.format('%d', now + delay), member))
  if err then
    redis.call('HDEL', KEYS[3], member)
    return err
  end
  if redis.call('ZRANGE', KEYS[2], 0, 0)[1] == member then redis.pcall('PUBLISH', KEYS[2], string.format('%d', delay)) end
end

for i = 2, #ARGV, 6 do
  local id = ARGV[i + 1]
  local reply = redis.pcall('XPENDING', KEYS[1], group, id, id, 1)
  if reply.err and not (string.find(reply.err, 'NOGROUP', 1, true) or string.find(reply.err, 'WRONGTYPE', 1, true)) then
    return redis.error_reply(reply.err) -- whose the claim is cannot be told: that is not lost
  end
  local pending = not reply.err and reply[1]
  if not pending or pending[2] ~= ARGV[i] or pending[4] ~= tonumber(ARGV[i + 2]) then
    result[#result + 1] = 0
  else
    local err = store(tonumber(ARGV[i + 3]), ARGV[i + 4], ARGV[i + 5])
    if not err then
      redis.call('XACK', KEYS[1], group, id)
      redis.call('XDEL', KEYS[1], id)
      settled = settled + 1
    end
    result[#result + 1] = err or 1
  end
end
if settled < #result then
  -- A replica answers from its past; only who takes a write may say that a claim is lost. There is no entry 0-0. Last,
  -- because a script that has written once is not stopped any more when memory runs out.
  local proof = redis.pcall('XACK', KEYS[1], group, '0-0')
  if type(proof) == 'table' and proof.err and string.find(proof.err, 'READONLY', 1, true) then
    return redis.error_reply(proof.err)
  end
end
return result

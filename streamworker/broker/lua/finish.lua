-- finish: acknowledge and delete ended entries, as done does, and with each the mark that its job was cancelled.
--
-- KEYS[1]    stream
-- KEYS[2]    cancelled set of the queue
-- KEYS[3]    meta hash of the queue
-- ARGV[1]    group
-- ARGV[2]    consumer
-- ARGV[3..]  three a claim: entry id, delivery count, job id
--
-- returns one number a claim: 1 settled, 0 lost
local group, consumer = ARGV[1], ARGV[2]
local result, settled = {}, 0
for i = 3, #ARGV, 3 do
  local id = ARGV[i]
  local reply = redis.pcall('XPENDING', KEYS[1], group, id, id, 1)
  if reply.err and not (string.find(reply.err, 'NOGROUP', 1, true) or string.find(reply.err, 'WRONGTYPE', 1, true)) then
    return redis.error_reply(reply.err) -- whose the claim is cannot be told: that is not lost
  end
  local pending = not reply.err and reply[1]
  if pending and pending[2] == consumer and pending[4] == tonumber(ARGV[i + 1]) then
    redis.call('XACK', KEYS[1], group, id)
    redis.call('XDEL', KEYS[1], id)
    redis.call('ZREM', KEYS[2], ARGV[i + 2])
    result[#result + 1], settled = 1, settled + 1
  else
    result[#result + 1] = 0
  end
end
if settled > 0 and redis.call('EXISTS', KEYS[2]) == 0 then redis.call('HDEL', KEYS[3], 'cancelled') end
if settled < #result then
  -- A replica answers from its past; only who takes a write may say that a claim is lost. There is no entry 0-0.
  local proof = redis.pcall('XACK', KEYS[1], group, '0-0')
  if type(proof) == 'table' and proof.err and string.find(proof.err, 'READONLY', 1, true) then
    return redis.error_reply(proof.err)
  end
end
return result

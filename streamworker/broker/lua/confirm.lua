-- confirm: count the delivery of a reserved suspect just before it runs, if it is still ours.
--
-- KEYS[1]  stream
-- ARGV[1]  group
-- ARGV[2]  consumer
-- ARGV[3]  entry id
-- ARGV[4]  delivery count when it was reserved
--
-- returns 1 confirmed (the delivery count is one higher now), 0 lost
-- A replica answers from its past; only who takes a write may say that a claim is lost. There is no entry 0-0.
local proof = redis.pcall('XACK', KEYS[1], ARGV[1], '0-0')
if type(proof) == 'table' and proof.err and string.find(proof.err, 'READONLY', 1, true) then
  return redis.error_reply(proof.err)
end
local reply = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if reply.err and not (string.find(reply.err, 'NOGROUP', 1, true) or string.find(reply.err, 'WRONGTYPE', 1, true)) then
  return redis.error_reply(reply.err) -- whose the claim is cannot be told: that is not lost
end
local pending = not reply.err and reply[1]
if not pending or pending[2] ~= ARGV[2] or pending[4] ~= tonumber(ARGV[4]) then return 0 end
if redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3])[1] then return 1 end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
return 0

-- own_pending: pending entries of this consumer that do not run here, because the reply to their claim was lost. They
-- were never started: the delivery count stays as it is.
--
-- KEYS[1]    stream
-- ARGV[1]    group
-- ARGV[2]    consumer
-- ARGV[3..]  entry ids that run here
--
-- returns { id, delivery count, fields } ...
local running, out = {}, {}
for i = 3, #ARGV do running[ARGV[i]] = true end
local reply = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000 + #ARGV, ARGV[2])
if reply.err and not no_group(reply.err) then return redis.error_reply(reply.err) end
if reply.err then return out end
for _, pending in ipairs(reply) do
  local id = pending[1]
  if not running[id] then
    local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
    if entry then
      out[#out + 1] = { id, pending[4], entry[2] }
    else
      redis.call('XACK', KEYS[1], ARGV[1], id)
    end
  end
end
return out

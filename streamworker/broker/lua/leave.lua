-- leave: delete a consumer from a queue's groups, only if it has no pending entry: XGROUP DELCONSUMER deletes pending
-- entries with it, and they would never be delivered again.
--
-- KEYS     streams
-- ARGV[1]  group
-- ARGV[2]  consumer
--
-- returns 1 deleted everywhere, 0 something is pending and nothing was deleted
for _, stream in ipairs(KEYS) do
  local reply = redis.pcall('XPENDING', stream, ARGV[1], '-', '+', 1, ARGV[2])
  if reply.err and not no_group(reply.err) then return redis.error_reply(reply.err) end
  if not reply.err and reply[1] then return 0 end
end
for _, stream in ipairs(KEYS) do
  local reply = redis.pcall('XGROUP', 'DELCONSUMER', stream, ARGV[1], ARGV[2])
  if failed(reply) and string.find(reply.err, 'READONLY', 1, true) then
    return redis.error_reply(reply.err) -- a replica neither knows what is pending nor deletes a consumer
  end
end
return 1

-- renew: renew leases, each only if the claim still holds: a plain XCLAIM would steal the entry back from the worker that
-- reclaimed it. JUSTID resets the idle time and leaves the delivery count alone. The worker's lease is stored where
-- reclaiming reads it.
--
-- KEYS[1]    stream
-- KEYS[2]    meta hash of the queue
-- ARGV[1]    group
-- ARGV[2]    consumer
-- ARGV[3]    its lease in ms
-- ARGV[4..]  two a claim: entry id, delivery count
--
-- returns the entry ids of claims that are lost
local ids, lost = {}, {}
for i = 4, #ARGV, 2 do
  local id = ARGV[i]
  local pending, trouble = pending_entry(KEYS[1], ARGV[1], id)
  if trouble then return redis.error_reply(trouble) end
  if pending and pending[2] == ARGV[2] and pending[4] == tonumber(ARGV[i + 1]) then
    ids[#ids + 1] = id
  else
    lost[#lost + 1] = id
  end
end
local replica = #lost > 0 and read_only(KEYS[1], ARGV[1])
if replica then return replica end
if #ids > 0 then
  local known = redis.pcall('HGET', KEYS[2], 'leases') or ''
  if type(known) == 'string' and not string.find('\n' .. known, '\n' .. ARGV[2] .. ' ', 1, true) then
    redis.pcall('HSET', KEYS[2], 'leases', known .. ARGV[2] .. ' ' .. ARGV[3] .. '\n') -- it was deleted
  end
  ids[#ids + 1] = 'JUSTID'
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(ids))
end
return lost

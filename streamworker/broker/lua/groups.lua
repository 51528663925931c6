-- groups: make sure that a queue's streams and their group exist, and that no other group reads along.
-- The group starts at 0, so that entries added before anybody looked are delivered. The epoch changes whenever a group is
-- made, because entry ids may repeat from then on.
--
-- KEYS[1]    meta hash of the queue
-- KEYS[2..]  its streams
-- ARGV[1]    group
-- ARGV[2]    a fresh random epoch, taken if one is needed
--
-- returns { epoch, foreign groups as "stream group" ..., errors of streams that cannot be prepared as "stream error" ... }
local made, foreign, trouble = false, {}, {}
for i = 2, #KEYS do
  -- Looked at before anything is made: out of memory, workers can still start.
  local groups, ours = redis.pcall('XINFO', 'GROUPS', KEYS[i]), false
  for _, info in ipairs(groups.err and {} or groups) do
    for f = 1, #info, 2 do
      if info[f] == 'name' and info[f + 1] == ARGV[1] then ours = true end
      if info[f] == 'name' and info[f + 1] ~= ARGV[1] then foreign[#foreign + 1] = KEYS[i] .. ' ' .. info[f + 1] end
    end
  end
  local reply = ours or redis.pcall('XGROUP', 'CREATE', KEYS[i], ARGV[1], '0', 'MKSTREAM')
  if not ours and not reply.err then
    made = true
  elseif not ours and string.sub(reply.err, 1, 9) ~= 'BUSYGROUP' then
    trouble[#trouble + 1] = KEYS[i] .. ' ' .. reply.err
  end
end
if made then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[2])
elseif not redis.call('HGET', KEYS[1], 'epoch') then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[2])
end
return { redis.call('HGET', KEYS[1], 'epoch'), foreign, trouble }

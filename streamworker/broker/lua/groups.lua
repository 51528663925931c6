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
  local reply = redis.pcall('XGROUP', 'CREATE', KEYS[i], ARGV[1], '0', 'MKSTREAM')
  if not reply.err then
    made = true
  elseif string.sub(reply.err, 1, 9) ~= 'BUSYGROUP' then
    trouble[#trouble + 1] = KEYS[i] .. ' ' .. reply.err
  end
  local groups = redis.pcall('XINFO', 'GROUPS', KEYS[i])
  for _, info in ipairs(groups.err and {} or groups) do
    for f = 1, #info, 2 do
      if info[f] == 'name' and info[f + 1] ~= ARGV[1] then foreign[#foreign + 1] = KEYS[i] .. ' ' .. info[f + 1] end
    end
  end
end
if made then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[2])
else
  redis.call('HSETNX', KEYS[1], 'epoch', ARGV[2])
end
return { redis.call('HGET', KEYS[1], 'epoch'), foreign, trouble }

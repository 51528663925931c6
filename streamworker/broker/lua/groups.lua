-- groups: create a queue's streams and their group if they are missing, and report other groups that read along. The
-- group starts at 0, so that entries added before the first worker started are delivered. The epoch of the queue changes
-- whenever a group is created: jobs may be lost. The value that ids are derived from belongs to the entries of a stream:
-- it is random, and changes only with a stream that was missing or whose entry ids went back, because ids may repeat from
-- then on. It is stored twice, so that it survives the deletion of either hash, and of any group.
--
-- KEYS[1]    meta hash of the queue
-- KEYS[2]    hash of value that ids are derived from: field "id:N" for the Nth stream; meta has the same fields
-- KEYS[3..]  its streams
-- ARGV[1]    group
-- ARGV[2]    a fresh random epoch, taken if one is needed
-- ARGV[3..]  two a stream, as the caller remembers it: value that ids are derived from, the last entry id it saw ("": nothing)
--
-- returns { epoch, foreign groups as "stream group" ..., errors of streams that cannot be prepared as "stream error" ...,
--           value that ids are derived from, one a stream }
local made, foreign, trouble, derived = false, {}, {}, {}
local epoch = redis.call('HGET', KEYS[1], 'epoch')

-- Whether entry id a comes before b.
local function before(a, b)
  local ams, aseq = string.match(a, '^(%d+)-(%d+)$')
  local bms, bseq = string.match(b, '^(%d+)-(%d+)$')
  if not ams or not bms then return false end
  if ams ~= bms then return tonumber(ams) < tonumber(bms) end
  return tonumber(aseq) < tonumber(bseq)
end

local function last_id(k)
  local info = redis.pcall('XINFO', 'STREAM', KEYS[k])
  for f = 1, info.err and 0 or #info, 2 do
    if info[f] == 'last-generated-id' then return info[f + 1] end
  end
  return ''
end

for i = 3, #KEYS do
  local field, remembered, seen = 'id:' .. (i - 2), ARGV[2 * i - 3] or '', ARGV[2 * i - 2] or ''
  local there = redis.call('EXISTS', KEYS[i]) == 1
  local copies = { redis.call('HGET', KEYS[2], field), redis.call('HGET', KEYS[1], field) }
  -- Looked at before anything is made: out of memory, workers can still start.
  local groups, ours = redis.pcall('XINFO', 'GROUPS', KEYS[i]), false
  for _, info in ipairs(groups.err and {} or groups) do
    for f = 1, #info, 2 do
      if info[f] == 'name' and info[f + 1] == ARGV[1] then ours = true end
      if info[f] == 'name' and info[f + 1] ~= ARGV[1] then foreign[#foreign + 1] = KEYS[i] .. ' ' .. info[f + 1] end
    end
  end
  local id = copies[1] or copies[2]
  if not id and ours and remembered ~= '' then id = remembered end -- with our group in it, it is the stream we know
  if not id and there then id = epoch end -- releases before this one derived ids from the queue's epoch
  if not there or not ours and before(last_id(i), seen) then id = false end
  local reply = ours or redis.pcall('XGROUP', 'CREATE', KEYS[i], ARGV[1], '0', 'MKSTREAM')
  if not ours and not reply.err then
    made = true
  elseif not ours and string.sub(reply.err, 1, 9) ~= 'BUSYGROUP' then
    trouble[#trouble + 1] = KEYS[i] .. ' ' .. reply.err
    id = id or copies[1] or copies[2]
  end
  id = id or ARGV[2]
  if copies[2] ~= id then redis.call('HSET', KEYS[1], field, id) end
  if copies[1] ~= id then redis.call('HSET', KEYS[2], field, id) end
  derived[#derived + 1] = id
end
if made or not epoch then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[2])
  epoch = ARGV[2]
end
return { epoch, foreign, trouble, derived }

-- purge: delete jobs of a queue for good, a batch a call. What workers hold is not touched: ready is what lies behind the
-- last delivered entry.
--
-- KEYS[1..3]  where ready jobs lie: high, normal, low
-- KEYS[4]     due set
-- KEYS[5]     bodies hash
-- KEYS[6]     dead stream
-- ARGV[1]     "stream" or "list": what the ready jobs lie in
-- ARGV[2]     group
-- ARGV[3]     "ready", "delayed" or "dead"
-- ARGV[4]     most jobs to delete, up to 1000
--
-- returns how many were deleted
local left, gone = tonumber(ARGV[4]), 0

local function delete(stream, first)
  local ids = {}
  local entries = redis.pcall('XRANGE', stream, first, '+', 'COUNT', left)
  if entries.err then return end
  for _, entry in ipairs(entries) do ids[#ids + 1] = entry[1] end
  if #ids > 0 then gone = gone + redis.call('XDEL', stream, unpack(ids)) end
end

local function delivered(stream)
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  for _, info in ipairs(groups.err and {} or groups) do
    local group = {}
    for f = 1, #info, 2 do group[info[f]] = info[f + 1] end
    if group['name'] == ARGV[2] then return group['last-delivered-id'] end
  end
  return '0-0'
end

if ARGV[3] == 'ready' then
  for k = 1, 3 do
    left = tonumber(ARGV[4]) - gone
    if left > 0 and ARGV[1] == 'list' then
      local popped = redis.pcall('LPOP', KEYS[k], left)
      if popped and not popped.err then gone = gone + #popped end
    elseif left > 0 then
      delete(KEYS[k], '(' .. delivered(KEYS[k]))
    end
  end
elseif ARGV[3] == 'delayed' then
  for _, member in ipairs(redis.call('ZRANGE', KEYS[4], 0, left - 1)) do
    redis.call('HDEL', KEYS[5], member)
    gone = gone + redis.call('ZREM', KEYS[4], member)
  end
else
  delete(KEYS[6], '-')
end
return gone

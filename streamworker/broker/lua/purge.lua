-- purge: delete jobs of a queue for good, a batch a call, but no claimed one: an entry is ready if it is behind the last
-- delivered entry; what waits in lines is ready, too. Their deduplication keys are deleted too, unless other jobs have them by now, and
-- their order keys are passed on, and their stored payloads are noted.
--
-- KEYS[1..3]  keys of ready jobs: high, normal, low
-- KEYS[4]     due set
-- KEYS[5]     bodies hash
-- KEYS[6]     dead stream
-- KEYS[7]     what the names of deduplication keys start with
-- ARGV[1]     type of the ready keys: "stream" or "list"
-- ARGV[2]     group
-- ARGV[3]     "ready", "delayed" or "dead"
-- ARGV[4]     most jobs to delete, up to 1000
--
-- returns { how many were deleted, ids of those whose ids are known ... }
local left, gone, ids = tonumber(ARGV[4]), 0, {}
local base = base_of(KEYS[4])
local orders, names = {}, {} -- of jobs that may hold order keys

-- Our producers write the id first and the key behind it, list mode may have put its mark in front: only documents that
-- have a key are looked into further, which keeps a batch of large ones short.
local function freed(body, id)
  unstore(base, body, nil, id)
  local rest = string.match(body or '', '^{"streamworker":%b{},(.*)$') or string.sub(body or '', 2)
  local id, key = string.match(rest, '^"id":"([^"\\]+)","key":"([^"\\]*)"')
  local plain = string.match(rest, '^"id":"([^"\\]+)"')
  if not id and string.find(rest, '^"id":"[^"]*","key":"') then
    local ok, document = pcall(cjson.decode, body)
    if ok then id, key = document.id, document.key end
  end
  if type(id) == 'string' and type(key) == 'string' and redis.pcall('GET', KEYS[7] .. key) == id then
    redis.call('DEL', KEYS[7] .. key)
  end
  ids[#ids + 1] = plain
  local order, _, name = flow_of(body or '')
  if order and order ~= '' then orders[#orders + 1], names[#names + 1] = order, name end
end

local function delete(stream, first)
  local entry_ids = {}
  local entries = redis.pcall('XRANGE', stream, first, '+', 'COUNT', left)
  if entries.err then return end
  for _, entry in ipairs(entries) do
    entry_ids[#entry_ids + 1] = entry[1]
    freed(job_in(entry[2]), field_of(entry[2], 'id'))
    if ARGV[3] == 'dead' then unhalt(ARGV[1], base, job_in(entry[2])) end
  end
  if #entry_ids > 0 then gone = gone + redis.call('XDEL', stream, unpack(entry_ids)) end
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

-- Delete from the line of an order key, from its end.
local function shorten(line)
  while gone < left do
    local waiting = redis.call('RPOP', line)
    if not waiting then return end
    local named, tenant, at = string.match(waiting, '^%a+ (%d+) (%d+) ()')
    freed(string.sub(waiting, at + named + tenant))
    redis.call('HINCRBY', base .. ':meta', 'waiting', -1)
    gone = gone + 1
  end
end

if ARGV[3] == 'ready' then
  for _, order in ipairs(redis.call('SRANDMEMBER', base .. ':lines', left)) do
    shorten(base .. ':order:' .. order)
    if redis.call('EXISTS', base .. ':order:' .. order) == 0 then redis.call('SREM', base .. ':lines', order) end
  end
  for _, level in ipairs({ 'high', 'normal', 'low' }) do
    local set = base .. ':fair:' .. level
    local rows = gone < left and redis.call('ZPOPMAX', set, left - gone) or {}
    for r = 1, #rows, 2 do freed(string.sub(rows[r], 17)) end
    gone = gone + #rows / 2
    if redis.call('EXISTS', set) == 0 then redis.call('UNLINK', base .. ':fair:' .. level .. ':tenants') end
  end
  for k = 1, 3 do
    left = tonumber(ARGV[4]) - gone
    if left > 0 and ARGV[1] == 'list' then
      local popped = redis.pcall('LPOP', KEYS[k], left)
      if popped and not popped.err then
        gone = gone + #popped
        for _, body in ipairs(popped) do freed(body) end
      end
    elseif left > 0 then
      delete(KEYS[k], '(' .. delivered(KEYS[k]))
    end
  end
elseif ARGV[3] == 'delayed' then
  for _, member in ipairs(redis.call('ZRANGE', KEYS[4], 0, left - 1)) do
    freed(redis.call('HGET', KEYS[5], member) or nil)
    redis.call('HDEL', KEYS[5], member)
    gone = gone + redis.call('ZREM', KEYS[4], member)
  end
else
  delete(KEYS[6], '-')
end
if ARGV[3] ~= 'dead' and orders[1] then pass_on(ARGV[1], base, orders, names) end
return { gone, unpack(ids) }

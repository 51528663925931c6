-- sweep: take over entries whose lease ran out (XAUTOCLAIM with a kept cursor), at most as many as asked for.
-- The delivery count is read before an entry is claimed for real: one that would reach the suspects' count is only reserved
-- (ours, but not counted) so that it can be confirmed when it can run alone; further suspects go back, ripe, for other workers.
-- One sweep at a time per queue: the token in meta says when the next one is due.
--
-- KEYS[1]    meta hash of the queue
-- KEYS[2..]  its streams
-- ARGV[1]    group
-- ARGV[2]    consumer
-- ARGV[3]    lease in ms: entries idle for that long are orphans
-- ARGV[4]    most entries to take
-- ARGV[5]    delivery count from which an entry is a suspect
-- ARGV[6]    1 if a suspect may be reserved, 0 if the worker has one already
-- ARGV[7..]  what runs here and is passed over, as "index of the stream in KEYS:entry id"
--
-- returns { ms until the next sweep, entries, number of entries that were deleted underneath }
--   entries  { index of the stream in KEYS, id, delivery count, fields, epoch, 1 if a suspect } ...
local lease, limit = tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local due = tonumber(redis.call('HGET', KEYS[1], 'sweep') or 0)
-- A token further away than a lease comes from a server clock that jumped.
if due > now and due - now <= lease then return { due - now, {}, 0 } end

local running = {}
for i = 7, #ARGV do running[ARGV[i]] = true end
local may_reserve = ARGV[6] == '1'
local epoch = redis.call('HGET', KEYS[1], 'epoch') or '0'
local entries, missing, unfinished = {}, 0, false -- unfinished: somebody should sweep again at once

local function gone(stream, id)
  redis.call('XACK', stream, ARGV[1], id)
  missing = missing + 1
end

local function take(k, id)
  local pending = redis.call('XPENDING', KEYS[k], ARGV[1], id, id, 1)[1]
  if not pending then return end
  if pending[4] + 1 >= tonumber(ARGV[5]) then
    if may_reserve then
      local entry = redis.call('XRANGE', KEYS[k], id, id)[1]
      if not entry then return gone(KEYS[k], id) end
      may_reserve = false
      entries[#entries + 1] = { k, id, pending[4], entry[2], epoch, 1 }
    else
      redis.call('XCLAIM', KEYS[k], ARGV[1], ARGV[2], 0, id, 'IDLE', lease, 'JUSTID')
      unfinished = true
    end
  else
    local entry = redis.call('XCLAIM', KEYS[k], ARGV[1], ARGV[2], 0, id)[1]
    if not entry then return gone(KEYS[k], id) end
    entries[#entries + 1] = { k, id, pending[4] + 1, entry[2], epoch, 0 }
  end
end

for k = 2, #KEYS do
  local field = 'cursor:' .. k
  local cursor = redis.call('HGET', KEYS[1], field) or '0-0'
  local pages = 0
  while #entries < limit do
    -- A page looks at up to 10 x COUNT entries; a hundred pages bound what one sweep may cost the server.
    local reply = redis.pcall('XAUTOCLAIM', KEYS[k], ARGV[1], ARGV[2], lease, cursor, 'COUNT', limit - #entries, 'JUSTID')
    if reply.err then
      if string.find(reply.err, 'NOGROUP', 1, true) or string.find(reply.err, 'WRONGTYPE', 1, true) then break end
      return redis.error_reply(reply.err)
    end
    cursor, pages = reply[1], pages + 1
    for _, id in ipairs(reply[2]) do
      if running[k .. ':' .. id] then
        -- Ours and overdue: looking at it must not renew it, or a hung handler would keep its lease.
        redis.call('XCLAIM', KEYS[k], ARGV[1], ARGV[2], 0, id, 'IDLE', lease, 'JUSTID')
      else
        take(k, id)
      end
    end
    if reply[3] then missing = missing + #reply[3] end
    if cursor == '0-0' then break end
    if pages >= 100 then unfinished = true break end
  end
  redis.pcall('HSET', KEYS[1], field, cursor) -- out of memory, everybody sweeps from the start: orphans come first
end

-- When could the next entry become an orphan? Whoever is alive renews every third of a lease, so that only entries idle
-- for half a lease need watching; entries claimed from now on have a whole one.
local wait = lease
if #entries >= limit or unfinished then
  wait = 0
else
  for k = 2, #KEYS do
    local summary = redis.pcall('XPENDING', KEYS[k], ARGV[1])
    local count = not summary.err and summary[1] or 0
    if count > 10000 then
      wait = math.min(wait, 500)
    elseif count > 0 then
      local old = redis.call('XPENDING', KEYS[k], ARGV[1], 'IDLE', math.floor(lease / 2), '-', '+', 100)
      wait = math.min(wait, math.floor(lease / 2))
      for _, entry in ipairs(old) do
        wait = math.min(wait, math.max(lease - entry[3], 100), 500)
      end
    end
  end
end
-- Long waits end on whole seconds, so that a worker sweeps all its quiet queues in one wake-up.
if wait > 2000 then wait = math.floor((now + wait) / 1000) * 1000 - now end
redis.pcall('HSET', KEYS[1], 'sweep', string.format('%d', now + wait))
return { wait, entries, missing }

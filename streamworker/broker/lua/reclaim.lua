-- reclaim: claim entries whose lease has expired (XAUTOCLAIM with a stored cursor), at most as many as asked for. The
-- lease is that of the worker that holds an entry, see `lease`; a worker that stored none is given the longest known one.
-- Where leases differ, XPENDING is asked, which names the holder, and only entries that are expired by their holder's
-- lease are touched. The delivery count is read before an entry is claimed for real. At their third delivery entries are
-- suspects; the ones that run together are of one half (see `half_of`). From the count in ARGV[5] on a group of suspects
-- runs apart from all else: its entries are only reserved (claimed, but not counted), so that they can be confirmed, and
-- only by a worker that is idle and finds no other entry; until then suspects stay expired, for the first idle worker.
-- Where no worker is idle, one worker at a time drains: it takes nothing new until it is idle. A paused queue is not
-- reclaimed from. One call at a time for each queue: a token in the meta hash holds the moment of the next one.
--
-- KEYS[1]    meta hash of the queue
-- KEYS[2..]  its streams
-- ARGV[1]    group
-- ARGV[2]    consumer
-- ARGV[3]    the worker's lease in ms
-- ARGV[4]    most entries to take
-- ARGV[5]    delivery count from which an entry is a suspect that runs apart
-- ARGV[6]    what the worker does about those: 1 it is idle and takes a group, 2 it asks to be the one that drains, 4 it
--            looks for new jobs and asks again at once if there are none, else it leaves them to others
-- ARGV[7]    the server's time as the worker expects it, in ms; 0 if it has not read it yet
-- ARGV[8]    most entries to take that are about to be delivered for the last time before that: a group of suspects
-- ARGV[9]    half of those that run here already; empty: any
-- ARGV[10]   most entries of a group that runs apart, by delivery count from ARGV[5] on: numbers; one later
-- ARGV[11]   the token as this worker saw it last; 0 if it has not, or since a leap that it noticed
-- ARGV[12..] entries that run here and are passed over, as "index of the stream in KEYS:entry id"
--
-- returns { ms until the next sweep, entries, number of entries that were deleted, number of suspects that were left
--           to others (-1: it was too early, -2: the clock leapt twice), the server's time in ms, 1 if this worker
--           shall drain, the longest lease of the queue's workers in ms (0: not looked up), the token (-1: not looked up) }
--   entries  { index of the stream in KEYS, id, delivery count, fields, value that its id is derived from, 1 if a suspect } ...
local lease, limit = tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_ms()

-- The clock leapt ahead: all leases look expired. No claim expires before every worker had one lease to renew. Half a
-- lease is no leap yet: a worker that renews every third of a lease is never idle for a whole one by it, and a slow network looks the same.
local leap = tonumber(ARGV[7]) > 0 and now - tonumber(ARGV[7]) or 0
local most = math.max(lease / 2, 1000)
if leap > most then return { lease, {}, 0, -1, now, 0, 0, -1 } end
-- It leapt back: what was claimed in its future would not age before the clock is there again. Its lease begins now.
if leap < -most then
  for k = 2, #KEYS do
    local from = '-'
    for _ = 1, 10 do
      local page = redis.pcall('XPENDING', KEYS[k], ARGV[1], from, '+', 1000)
      if page.err or not page[1] then break end
      for _, entry in ipairs(page) do
        if entry[3] == 0 then redis.call('XCLAIM', KEYS[k], ARGV[1], entry[2], 0, entry[1], 'JUSTID') end
        from = '(' .. entry[1]
      end
    end
  end
end

local paused = redis.call('HMGET', KEYS[1], 'paused', 'inactive')
if paused[1] or paused[2] then return { 1000, {}, 0, 0, now, 0, 0, -1 } end

local function drains() return ARGV[6] == '2' and appointed(KEYS[1], ARGV[2], now) and 1 or 0 end

local due = tonumber(redis.call('HGET', KEYS[1], 'sweep') or 0)
-- A token further away than a lease comes from a server clock that jumped.
if due > now and due - now <= lease then return { due - now, {}, 0, -1, now, drains(), 0, due } end

local leases, shortest, longest = leases_of(KEYS[1], lease)
if leap > math.max(shortest / 2, 1000) then return { longest, {}, 0, -1, now, 0, longest, -1 } end
if fell(due, tonumber(ARGV[11]), shortest, longest) then return { longest, {}, 0, -2, now, 0, longest, due } end

local running = {}
for i = 12, #ARGV do running[ARGV[i]] = true end
local derived = redis.call('HMGET', KEYS[1], 'id:1', 'id:2', 'id:3')
local entries, missing, passed, unfinished = {}, 0, 0, false -- unfinished: the next call should follow at once
local suspects = {} -- those that were passed: stream, id, delivery count
local group, left, half = tonumber(ARGV[8]), 0, ARGV[9] -- suspects that may still be claimed, and those that may not

local function gone(stream, id)
  redis.call('XACK', stream, ARGV[1], id)
  missing = missing + 1
end

local function take(k, id)
  local pending = redis.call('XPENDING', KEYS[k], ARGV[1], id, id, 1)[1]
  if not pending then return end
  local apart, third = tonumber(ARGV[5]), pending[4] + 1 >= 3 and pending[4] + 1 < tonumber(ARGV[5])
  local its = third and half_of(id, 3)
  if third and (group <= 0 or half ~= '' and half ~= its) then
    redis.call('XCLAIM', KEYS[k], ARGV[1], ARGV[2], 0, id, 'IDLE', lease, 'JUSTID')
    left = left + 1
  elseif pending[4] + 1 >= apart then
    redis.call('XCLAIM', KEYS[k], ARGV[1], ARGV[2], 0, id, 'IDLE', lease, 'JUSTID')
    passed = passed + 1
    suspects[passed] = { k, id, pending[4] }
  else
    local entry = redis.call('XCLAIM', KEYS[k], ARGV[1], ARGV[2], 0, id)[1]
    if not entry then return gone(KEYS[k], id) end
    if third then group, half = group - 1, its end
    entries[#entries + 1] = { k, id, pending[4] + 1, entry[2], derived[k - 1] or '0', 0 }
  end
end

-- A page of expired entries from a cursor on: { the next cursor, ids, ids that were deleted }, as XAUTOCLAIM answers.
local function page(k, cursor, most)
  if shortest == longest then
    -- It looks at up to 10 x COUNT entries.
    return redis.pcall('XAUTOCLAIM', KEYS[k], ARGV[1], ARGV[2], lease, cursor, 'COUNT', most, 'JUSTID')
  end
  local rows = redis.pcall('XPENDING', KEYS[k], ARGV[1], 'IDLE', shortest, cursor == '0-0' and '-' or cursor, '+', most + 100)
  if rows.err then return rows end
  local ids = {}
  for r, row in ipairs(rows) do
    if #ids >= most then return { row[1], ids } end
    if row[3] >= (leases[row[2]] or longest) then ids[#ids + 1] = row[1] end
    if r == most + 100 then return { row[1], ids } end -- seen again with the next page, which is longer than one
  end
  return { '0-0', ids }
end

for k = 2, #KEYS do
  local field = 'cursor:' .. k
  local cursor = redis.call('HGET', KEYS[1], field) or '0-0'
  local pages = 0
  while #entries < limit do
    local reply = page(k, cursor, limit - #entries) -- a hundred of them bound what one sweep may cost the server
    if reply.err then
      if no_group(reply.err) then break end
      return redis.error_reply(reply.err)
    end
    cursor, pages = reply[1], pages + 1
    for _, id in ipairs(reply[2]) do
      if running[k .. ':' .. id] and shortest < longest then -- ours and overdue, and untouched
      elseif running[k .. ':' .. id] then
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
  redis.pcall('HSET', KEYS[1], field, cursor) -- out of memory, every worker reclaims from the start: expired leases come first
end

if suspects[1] and ARGV[6] == '1' and #entries == 0 then
  local first = suspects[1]
  local its = half_of(first[2], first[3] + 1)
  local most = math.min(numbers(ARGV[10])[first[3] + 2 - tonumber(ARGV[5])] or 1, limit)
  for _, suspect in ipairs(suspects) do
    local k, id, count = unpack(suspect)
    if #entries < most and count == first[3] and half_of(id, count + 1) == its then
      local entry = redis.call('XRANGE', KEYS[k], id, id)[1]
      passed = passed - 1
      if entry then
        redis.call('XCLAIM', KEYS[k], ARGV[1], ARGV[2], 0, id, 'JUSTID')
        entries[#entries + 1] = { k, id, count, entry[2], derived[k - 1] or '0', 1 }
      else
        gone(KEYS[k], id)
      end
    end
  end
end

-- When can the next entry expire? A live worker renews every third of a lease, so that only entries idle
-- for half a lease need watching; entries claimed from now on have a whole one.
local wait = shortest
if #entries >= limit or unfinished or passed > 0 and entries[1] and entries[1][6] == 1 then
  wait = 0
elseif left > 0 then
  wait = passed > 0 and 20 or 200 -- as soon as one of the group has ended
elseif passed > 0 then
  wait = ARGV[6] == '4' and 0 or 20 -- an idle worker can run one at once
else
  for k = 2, #KEYS do
    local summary = redis.pcall('XPENDING', KEYS[k], ARGV[1])
    local count = not summary.err and summary[1] or 0
    if count > 10000 then
      wait = math.min(wait, 500)
    elseif count > 0 then
      local old = redis.call('XPENDING', KEYS[k], ARGV[1], 'IDLE', math.floor(shortest / 2), '-', '+', 100)
      wait = math.min(wait, math.floor(shortest / 2))
      for _, entry in ipairs(old) do
        local its = leases[entry[2]] or longest
        if entry[3] >= math.floor(its / 2) then wait = math.min(wait, math.max(its - entry[3], 100), 500) end
      end
    end
  end
end
-- Long waits end on whole seconds, so that a worker sweeps all its quiet queues in one wake-up.
if wait > 2000 then wait = math.floor((now + wait) / 1000) * 1000 - now end
redis.pcall('HSET', KEYS[1], 'sweep', string.format('%d', now + wait))
return { wait, entries, missing, passed, now, passed > 0 and drains() or 0, longest, now + wait }

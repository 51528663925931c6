-- list_take: take jobs from the right ends of lists in the order given, never more than asked for, into the worker's
-- claimed list. An element that was taken before carries our mark in front, its id and its deliveries (see
-- `list_return`): such elements are at the right ends and are taken before all others, whatever their level; a mark
-- without our seal does not count. A job keeps its id for good; without a mark it gets a fresh one, a UUIDv7 by the
-- server's clock. Elements at their third delivery are suspects; the ones that run together are of one half (see
-- `half_of`). Suspects that run apart (delivered as often as ARGV[6] says) stay in the list, and so do jobs that run here; a
-- worker that is idle and finds no other element that was taken before reserves a group of them, uncounted. Where no worker
-- is idle, one worker at a time drains: it takes nothing new until it is idle. Growing writes come first, shrinking ones last. A
-- queue is skipped while its meta hash has the field "paused" (set by an operator) or "inactive" (set by the relay).
--
-- KEYS[1..Q]   meta hash of each queue; then as many lease sets; then as many claimed lists of this worker
-- KEYS[3Q+1..] the lists, three a queue: high, normal, low
-- ARGV[1]      worker id
-- ARGV[2]      most jobs to take
-- ARGV[3]      Q, number of queues
-- ARGV[4]      B, number of budgets
-- ARGV[5]      twelve random hexadecimal digits
-- ARGV[6]      delivery count from which a job is a suspect that runs apart
-- ARGV[7]      what the worker does about those: 1 it is idle and takes a group, 2 it asks to be the one that drains, 3 it
--              drains unasked, else it leaves them to others; then the numbers of queues whose suspects stay, all of them
-- ARGV[8]      most jobs to take that are about to be delivered for the last time before that: a group of suspects
-- ARGV[9]      half of those that run here already; empty: any
-- ARGV[10]     most jobs of a group that runs apart, by delivery count from ARGV[6] on: numbers; one later
-- ARGV[11]     H, number of ids that run here
-- ARGV[12..]   Q allowances: most jobs to take of each queue; -N shares that of the Nth one
-- then         B budgets: most jobs to take on each budget
-- then         H ids that run here
-- then         the walk, three numbers a step: index of the list in KEYS, of its queue, of its budget
--
-- returns { taken, trouble, paused, epochs, skipped, suspects, cancelled, drains, secrets, fair }
--   taken    { index of the list in KEYS, { id, delivery count, 1 if a suspect, body } ... } ...
--   trouble  { index in KEYS, error } ...
--   paused   indexes of queues
--   epochs   the epoch of each queue ("": none yet)
--   skipped  indexes of lists in KEYS at whose right end elements stay
--   suspects number of suspects left to other workers
--   cancelled  indexes of queues with jobs that were cancelled and have not ended yet
--   drains   1 if this worker shall take nothing new
--   secrets  secret of each queue ("": nothing yet)
--   fair     indexes of queues with jobs in tenants' lines, see `pull`
local worker, left, queues, budgets = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local wish, staying = string.match(ARGV[7], '^%d'), {}
local may_reserve, reserved, left_to_others, drains = false, 0, 0, wish == '3' and 1 or 0
local apart -- the group that is reserved: its delivery count, its half, how many more may be
local LEVELS = { 'high', 'normal', 'low' }
local PAGE, SKIP = 500, 500 -- elements of one move; elements that are read in vain
local time = redis.call('TIME')
local now = string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000))
local stamp, sequence = string.format('%012x', tonumber(now)), 0
local allowance, shares, budget, epochs, usable, running = {}, {}, {}, {}, {}, {}
local taken, trouble, paused, skipped, broken, empty, cancelled = {}, {}, {}, {}, {}, {}, {}
local secrets, fair = {}, {}
local suspects = {} -- queues of which some were left
local group, half = tonumber(ARGV[8]), ARGV[9]

local function report(k, err) trouble[#trouble + 1] = { k, err } end

for q = 1, queues do
  local meta = redis.pcall('HMGET', KEYS[q], 'paused', 'epoch', 'inactive', 'cancelled', 'secret', 'fair')
  secrets[q] = not meta.err and meta[5] or ''
  allowance[q], epochs[q] = tonumber(ARGV[11 + q]), ''
  shares[q] = allowance[q] < 0 and -allowance[q] or q
  if meta.err then
    report(q, meta.err)
    shares[q] = nil
  else
    if not meta[2] and redis.pcall('HSETNX', KEYS[q], 'epoch', ARGV[5]) == 1 then meta[2] = ARGV[5] end
    epochs[q] = meta[2] or ''
    if meta[4] then cancelled[#cancelled + 1] = q end
    if meta[6] then fair[#fair + 1] = q end
    if meta[1] or meta[3] then
      paused[#paused + 1] = q
      shares[q] = nil
    end
  end
end
for n, q in ipairs(numbers(ARGV[7])) do
  if n > 1 then staying[q] = true end
end
for b = 1, budgets do budget[b] = tonumber(ARGV[11 + queues + b]) end
local walk = 12 + queues + budgets + tonumber(ARGV[11])
for h = 12 + queues + budgets, walk - 1 do running[ARGV[h]] = true end

local function fresh()
  sequence = sequence + 1
  local micros, order = time[2] % 1000, 32768 + sequence % 16384
  return string.format('%s-%s-7%03x-%04x-%s', string.sub(stamp, 1, 8), string.sub(stamp, 9), micros, order, ARGV[5])
end

-- Marks of versions before the seal are believed in queues that they worked on, for a day after the first worker with seals.
local function upgrading(q)
  local born = tonumber(string.match(secrets[q], ' (%d+)$') or 0)
  return born > 0 and tonumber(now) < born + 86400000
end

local function unmarked(element, q)
  local brace, id, count, proof, rest =
    string.match(element, '^(%s*{)"streamworker":{"id":"([%x-]+)","deliveries":(%d+),"seal":"(%x+)"},(.*)$')
  if not id then
    brace, id, count, rest = string.match(element, '^(%s*{)"streamworker":{"id":"([%x-]+)","deliveries":(%d+)},(.*)$')
    if not id or not upgrading(q) then return element end
  else
    local key = string.match(secrets[q], '^%x+')
    local text = 'deliveries ' .. string.format('%d', tonumber(count))
    if not key or proof ~= redis.sha1hex(key .. ' ' .. text .. '\n' .. id .. '\n' .. key) then return element end
  end
  if #id ~= 36 or #count > 6 then return element end
  return brace .. rest, id, tonumber(count)
end

-- A first write that changes nothing: a script that has written may write on when memory is out, and moving does not grow.
local function writable(q)
  if usable[q] == nil then
    local leases, claimed = redis.pcall('ZREM', KEYS[queues + q], ''), redis.pcall('LLEN', KEYS[2 * queues + q])
    usable[q] = not failed(leases) and not failed(claimed)
    if failed(leases) then report(queues + q, leases.err) end
    if failed(claimed) then report(2 * queues + q, claimed.err) end
  end
  return usable[q]
end

-- Whether a suspect is of the group that this call reserves, which the first one that is asked for begins.
local function joins(id, n)
  if not may_reserve then return false end
  apart = apart or { n, half_of(id, n), math.min(numbers(ARGV[10])[n + 1 - tonumber(ARGV[6])] or 1, left) }
  return apart[3] > 0 and n == apart[1] and half_of(id, n) == apart[2]
end

-- Elements of the right end that may be taken: rows, wrappers, scored members, elements; and how many elements they span.
local function look(i, q, most, again)
  local level = LEVELS[(i - 3 * queues - 1) % 3 + 1]
  local found, seen, span, length = { {}, {}, {}, {} }, 0, 0, redis.call('LLEN', KEYS[i])
  while #found[1] < most and seen < length and seen < most + SKIP do
    local count = math.min(most - #found[1], length - seen)
    local page = redis.call('LRANGE', KEYS[i], -seen - count, -seen - 1)
    for p = #page, 1, -1 do
      local body, id, deliveries = unmarked(page[p], q)
      if again and not id then return found, span end
      seen = seen + 1
      local suspect = id and deliveries + 1 >= tonumber(ARGV[6])
      local its = id and not suspect and deliveries + 1 >= 3 and half_of(id, 3)
      local stays = id and (suspect or its) and staying[q]
      if id and (running[id] or stays or suspect and not joins(id, deliveries + 1) or its and (group <= 0 or half ~= '' and half ~= its)) then
        skipped[i] = true
        if not running[id] and not stays and suspect and not may_reserve then left_to_others, suspects[q] = left_to_others + 1, true end
      else
        local n = suspect and deliveries or (deliveries or 0) + 1
        if suspect then reserved, apart[3] = reserved + 1, apart[3] - 1 end
        id = id or fresh()
        running[id] = true
        if its then group, half = group - 1, its end
        found[1][#found[1] + 1] = { id, n, suspect and 1 or 0, body }
        found[2][#found[2] + 1] = id .. ' ' .. n .. ' ' .. level .. (suspect and '? ' or ' ') .. body
        found[3][#found[3] + 1], found[3][#found[3] + 2] = now, id .. ' ' .. n .. ' ' .. worker
        found[4][#found[4] + 1] = page[p]
        span = seen
      end
    end
  end
  return found, span
end

local function take(i, q, most, again)
  local found, span = look(i, q, math.min(most, PAGE), again)
  local rows, wrappers, members, elements = unpack(found)
  if #rows == 0 then return 0 end
  local held = redis.pcall('RPUSH', KEYS[2 * queues + q], unpack(wrappers))
  local leased = failed(held) and held or redis.pcall('ZADD', KEYS[queues + q], unpack(members))
  if failed(leased) then
    if not failed(held) then redis.call('LTRIM', KEYS[2 * queues + q], 0, -#rows - 1) end
    report(i, leased.err)
    broken[i] = true
    return 0
  end
  if span == #rows then
    redis.call('LTRIM', KEYS[i], 0, -span - 1)
  else
    for _, element in ipairs(elements) do redis.call('LREM', KEYS[i], -1, element) end
  end
  taken[#taken + 1] = { i, rows }
  local own = shares[q]
  left, allowance[own] = left - #rows, allowance[own] - #rows
  return #rows
end

local function exhausted(i, q)
  if left <= 0 or not shares[q] or allowance[shares[q]] <= 0 or broken[i] or empty[i] then return true end
  local length = redis.pcall('LLEN', KEYS[i])
  if failed(length) then
    report(i, length.err)
    broken[i] = true
  elseif length == 0 then
    empty[i] = true
  end
  return broken[i] or empty[i] or not writable(q)
end

local function take_marked(most)
  for i = 3 * queues + 1, #KEYS do
    local q = math.floor((i - 3 * queues - 1) / 3) + 1
    if not exhausted(i, q) then
      local _, again = unmarked(redis.call('LINDEX', KEYS[i], -1), q)
      while again and not exhausted(i, q) and take(i, q, math.min(left, allowance[shares[q]], most), true) > 0 do
        if apart and apart[3] <= 0 then return end
      end
    end
  end
end

take_marked(left)
if left_to_others > 0 then
  if wish == '1' and #taken == 0 then
    may_reserve = true
    take_marked(left)
    may_reserve, left_to_others = false, left_to_others - reserved
  elseif wish == '2' then
    for q in pairs(suspects) do
      if drains == 0 and appointed(KEYS[q], worker, tonumber(now)) then drains = 1 end
    end
  end
else
  drains = 0
end
if reserved > 0 or drains == 1 then left = 0 end -- nothing new is taken beside a suspect, which waits until all else has ended
for w = walk, #ARGV, 3 do
  local i, q, b = tonumber(ARGV[w]), tonumber(ARGV[w + 1]), tonumber(ARGV[w + 2])
  while budget[b] > 0 and not exhausted(i, q) do
    local count = take(i, q, math.min(left, allowance[shares[q]], budget[b]), false)
    if count == 0 then break end
    budget[b] = budget[b] - count
  end
end
local stay = {}
for i in pairs(skipped) do stay[#stay + 1] = i end
return { taken, trouble, paused, epochs, stay, left_to_others, cancelled, drains, secrets, fair }

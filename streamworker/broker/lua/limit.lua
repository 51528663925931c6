-- limit: acquire permits of kinds with limits. First the permits of ended executions are released, then the requests are
-- answered in order. A limit caps how many jobs run at once (a permit each, which expires unless `retain` renews it) and
-- spaces their starts (a token bucket, stored as GCRA does: one number). Turns go by arrival: a job that may not run yet
-- is noted and parked, and as soon as a permit is free the first noted jobs are called, that is, moved from the due set
-- behind the ready jobs. A called job that does not ask in time (dropped, paused, behind a long backlog) blocks no other:
-- it keeps its arrival and is first when it asks.
--
-- KEYS[1]    due set of the queue
-- KEYS[2]    bodies hash of the queue
-- KEYS[3..5] keys of its ready jobs: high, normal, low
-- KEYS[6]    calls of the queue: member of the due set to the ms at which it was called. A job is parked only if it is not here: it may
--            have been called since it asked
-- KEYS[7]    index of the queue's permits: the permits of a limit to the ms at which the last one expires; what renews all permits of
--            a worker finds them by it (see `retain_all`)
-- KEYS[8..]  three a limit: its permits (token to the ms at which it expires), its turns (member to arrival in ms), its bucket (µs
--            at which it is full again)
-- ARGV[1]    type of the ready keys: stream or list
-- ARGV[2]    ms a permit lives unless renewed
-- ARGV[3]    ms in which a called job must ask
-- ARGV[4]    N, number of limits
-- ARGV[5]    F, number of permits to release
-- ARGV[6..]  three a limit: most that run at once (0: any), µs between starts (0: none), starts that may come at once
-- then       two a permit to release: its limit (from 1), token
-- then       five a job that asks: its limit, token of its permit, member for the due set if it has to wait, the member it waited under
--            before ("": none), its arrival in ms as it was answered then (0: it asks for the first time)
--
-- returns { 1 it may run / 0 not yet, ms to wait, arrival } for each that asks
local life, patience = tonumber(ARGV[2]), tonumber(ARGV[3])
local limits, leaving = tonumber(ARGV[4]), tonumber(ARGV[5])
local time = redis.call('TIME')
local micros = time[1] * 1000000 + time[2]
local now = math.floor(micros / 1000)
local stream = { high = KEYS[3], normal = KEYS[4], low = KEYS[5] }
local cap, gap, burst, running, full = {}, {}, {}, {}, {}
local DAY, MOST = 86400000, 100
local base = base_of(KEYS[1])
local marked = redis.pcall('EXISTS', base .. ':cancelled') == 1

local function key(n) return 8 + 3 * (n - 1) end
local function whole(number) return string.format('%d', number) end

local function free(n)
  local left = math.huge
  if cap[n] > 0 then left = cap[n] - running[n] end
  if gap[n] > 0 then left = math.min(left, math.floor((micros - math.max(micros, full[n])) / gap[n]) + burst[n]) end
  return left
end

-- ms until a permit may be free for the one that has `rank` others before it. Calls come sooner; this is for those that got lost.
local function wait(n, rank)
  local ms = 1
  if gap[n] > 0 then
    ms = math.max(ms, math.ceil((math.max(micros, full[n]) + (rank + 1 - burst[n]) * gap[n] - micros) / 1000))
  end
  if cap[n] > 0 then
    -- With places free, those in front of it were called: if they do not ask, the next one has to notice.
    local pace, held = running[n] < cap[n] and math.min(patience, life) or life, nil
    if pace == life and rank < cap[n] then held = redis.call('ZRANGE', KEYS[key(n)], rank, rank, 'WITHSCORES')[2] end
    ms = math.max(ms, held and tonumber(held) - now + 1 or pace * (1 + math.floor(rank / cap[n])))
  end
  return math.min(ms, DAY)
end

local function forget(n, member)
  redis.call('ZREM', KEYS[key(n) + 1], member)
  redis.call('ZREM', KEYS[6], member)
end

local function promote(member) -- the growing write first: without memory, it stays parked
  local target = stream[string.match(member, '^(%a+)/')] or KEYS[4]
  local body = redis.call('HGET', KEYS[2], member)
  if body then
    if failed(add(ARGV[1], target, body)) then return false end
  end
  redis.call('ZREM', KEYS[1], member)
  redis.call('HDEL', KEYS[2], member)
  return true
end

-- Whether a job that waits was cancelled, or replaced: it ends when it is claimed, and asks for nothing any more.
local function cancelled(member)
  local till = marked and redis.call('ZSCORE', base .. ':cancelled', string.match(member, '^%a+/(.*)/[^/]*$') or '')
  return till and tonumber(till) > now
end

local function call(n)
  local places, spare = math.min(free(n), MOST), 1
  if places < 1 then return end
  for _, member in ipairs(redis.call('ZRANGE', KEYS[key(n) + 1], 0, whole(places + (marked and MOST or 0)))) do
    if places < 1 then break end
    if cancelled(member) then
      if redis.call('ZSCORE', KEYS[1], member) and not promote(member) then break end
      forget(n, member)
      places = places + 1 -- it takes none
    elseif not redis.call('ZSCORE', KEYS[6], member) then
      if redis.call('ZSCORE', KEYS[1], member) then
        if not promote(member) then break end
      elseif spare > 0 then -- it is about to be parked, or gone: one more is called, in case it is gone
        places, spare = places + 1, 0
      end
      redis.call('ZADD', KEYS[6], whole(now), member)
      outlive(KEYS[6], 20 * patience)
    end
    places = places - 1
  end
end

-- Called jobs that did not ask in time are passed over. Turns are called in order: called jobs are among the first.
local function pass_over(n)
  for _, member in ipairs(redis.call('ZRANGE', KEYS[key(n) + 1], 0, MOST)) do
    local called = redis.call('ZSCORE', KEYS[6], member)
    if not called then return end
    if now - called > patience then forget(n, member) end
  end
end

local function ask(n, token, member, before, arrival, order)
  forget(n, member)
  if before ~= '' then forget(n, before) end
  if cap[n] > 0 and redis.call('ZSCORE', KEYS[key(n)], token) then return { 1, 0, '' } end -- the reply was lost
  local first = arrival <= 0 or arrival > now + 1
  -- To the microsecond, or one that comes within a ms could overtake; those of one call keep their order.
  if first then arrival = (micros + order) / 1000 end
  local stamp = string.format('%.3f', arrival)
  local rank = redis.call('ZCOUNT', KEYS[key(n) + 1], '-inf', (first and '' or '(') .. stamp)
  if rank < free(n) then
    if cap[n] > 0 then
      redis.call('ZADD', KEYS[key(n)], whole(now + life), token)
      outlive(KEYS[key(n)], life)
      running[n] = running[n] + 1
    end
    if gap[n] > 0 then
      full[n] = math.max(micros, full[n]) + gap[n]
      redis.call('SET', KEYS[key(n) + 2], whole(full[n]), 'PX', whole(math.ceil((full[n] - micros) / 1000)))
    end
    return { 1, 0, stamp }
  end
  local ms = wait(n, rank)
  redis.call('ZADD', KEYS[key(n) + 1], stamp, member)
  outlive(KEYS[key(n) + 1], ms + life)
  return { 0, ms, stamp }
end

local at = 6
redis.call('ZREMRANGEBYSCORE', KEYS[6], '-inf', whole(now - 10 * patience))
for n = 1, limits do
  cap[n], gap[n], burst[n] = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  at = at + 3
  redis.call('ZREMRANGEBYSCORE', KEYS[key(n)], '-inf', whole(now))
  pass_over(n)
end
for _ = 1, leaving do
  redis.call('ZREM', KEYS[key(tonumber(ARGV[at]))], ARGV[at + 1])
  at = at + 2
end
for n = 1, limits do
  running[n] = redis.call('ZCARD', KEYS[key(n)])
  full[n] = tonumber(redis.call('GET', KEYS[key(n) + 2]) or 0)
end
local result, order = {}, 0
for i = at, #ARGV, 5 do
  result[#result + 1] = ask(tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], tonumber(ARGV[i + 4]), order)
  order = order + 1
end
for n = 1, limits do
  call(n)
  if cap[n] > 0 and running[n] > 0 then
    redis.pcall('ZADD', KEYS[7], 'GT', whole(now + life), KEYS[key(n)])
    outlive(KEYS[7], life)
  elseif cap[n] > 0 then
    redis.pcall('ZREM', KEYS[7], KEYS[key(n)])
  end
end
return result

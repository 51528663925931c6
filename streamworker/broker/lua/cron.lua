-- cron: offer one tick of a schedule. Every worker offers it; the first offer after the tick's moment, by this server's
-- clock, adds the job. A schedule that is not known yet begins with this tick and adds nothing, unless the worker has
-- known it since an earlier tick: then the hash was lost meanwhile, and the schedule is not new. Of two schedules with
-- one name the one whose worker started last is in force: the other one adds nothing until the first has not been offered
-- for a while. A worker whose clock is wrong by seconds has offered the wrong tick and must offer again.
--
-- KEYS[1]  hash of the queue: schedule -> ms of its last tick, and "current:NAME" -> ms it was offered last, and schedule
-- KEYS[2]  ready jobs of the level
-- ARGV[1]  the schedule
-- ARGV[2]  ms of the tick
-- ARGV[3]  type of the ready keys: stream or list
-- ARGV[4]  the job ("": the tick passes without one)
-- ARGV[5]  its name, shared by all forms it ever had ("": it has none)
-- ARGV[6]  ms of the tick that the worker offered before ("": this is its first)
-- ARGV[7]  ms that the worker estimates for now ("": no estimate)
-- ARGV[8]  ms after which a schedule that is not offered any more is in force no longer
--
-- returns { ms until it must be offered again (0: it need not), 1 if the job was added by this call, the server's time in ms }
local now, tick = now_ms(), tonumber(ARGV[2])
if ARGV[7] ~= '' and math.abs(tonumber(ARGV[7]) - now) > 5000 then return { 1, 0, now } end
if tick > now then return { tick - now, 0, now } end

local before = tonumber(ARGV[6])
local last = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '')
local field, seen, current = 'current:' .. ARGV[5], nil, nil
if ARGV[5] ~= '' then seen, current = string.match(redis.call('HGET', KEYS[1], field) or '', '^(%d+) (.*)$') end
local replaces = current and current ~= ARGV[1]
if replaces and before then
  if now - tonumber(seen) < tonumber(ARGV[8]) then return { 0, 0, now } end
  last = tonumber(seen) -- ticks since then were not offered
elseif replaces then
  last = nil
elseif not last and before and before < tick then
  last = before
end

local added = 0
if last and last < tick and ARGV[4] ~= '' then
  local reply = enter(ARGV[3], base_of(KEYS[1]), level_of(KEYS[2]), ARGV[4], 'new')
  if failed(reply) then return reply end
  added = 1
end
if replaces then redis.call('HDEL', KEYS[1], current) end
if ARGV[5] ~= '' then redis.call('HSET', KEYS[1], field, string.format('%d', now) .. ' ' .. ARGV[1]) end
if not last or last < tick then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
return { 0, added, now }

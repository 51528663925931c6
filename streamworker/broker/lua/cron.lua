-- cron: one tick of a schedule. Every worker proposes it; the first after its moment, by this server's clock, adds the job.
-- A schedule that is not known yet begins with this tick, and adds nothing.
--
-- KEYS[1]  hash of the queue: schedule -> ms of its last tick
-- KEYS[2]  where the ready jobs of the level lie
-- ARGV[1]  the schedule
-- ARGV[2]  ms of the tick
-- ARGV[3]  what ready jobs lie in: stream or list
-- ARGV[4]  the job ("": the tick passes without one)
--
-- returns { ms until the tick (0: it is not to come), 1 if the job was added by this call, ms of the server's clock }
local time = redis.call('TIME')
local now, tick = time[1] * 1000 + math.floor(time[2] / 1000), tonumber(ARGV[2])
if tick > now then return { tick - now, 0, now } end
local last = redis.call('HGET', KEYS[1], ARGV[1])
if last and tonumber(last) >= tick then return { 0, 0, now } end
local added = 0
if last and ARGV[4] ~= '' then
  if ARGV[3] == 'list' then
    redis.call('LPUSH', KEYS[2], ARGV[4])
  else
    redis.call('XADD', KEYS[2], '*', 'job', ARGV[4])
  end
  added = 1
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return { 0, added, now }

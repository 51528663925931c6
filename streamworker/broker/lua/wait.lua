-- wait: somebody waits for a job of a queue to end. While its meta hash says so, ends are told that leave nothing behind.
--
-- KEYS[1]   meta hash of the queue
-- KEYS[2]   what was kept of the job's end
-- KEYS[3]   for how many ms it was kept
-- ARGV[1]   ms for which ends are told
--
-- returns what was kept; if that has expired, for how many ms it was kept; or nil
local until_ms = now_ms() + tonumber(ARGV[1])
redis.pcall('HSET', KEYS[1], 'waits', string.format('%d', until_ms)) -- out of memory, whoever waits looks now and then
return redis.call('GET', KEYS[2]) or redis.call('GET', KEYS[3])

-- wait: a caller waits for a job of a queue to end. While the meta hash says so, ends are published that leave no result
-- note.
--
-- KEYS[1]   meta hash of the queue
-- KEYS[2]   result note of the job
-- KEYS[3]   for how many ms the note was kept
-- ARGV[1]   ms for which ends are published
--
-- returns the note; if it has expired, for how many ms it was kept; or nil
local until_ms = now_ms() + tonumber(ARGV[1])
redis.pcall('HSET', KEYS[1], 'waits', string.format('%d', until_ms)) -- out of memory, waiting callers look now and then
return redis.call('GET', KEYS[2]) or redis.call('GET', KEYS[3])

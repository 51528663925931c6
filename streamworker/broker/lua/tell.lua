-- tell: say that jobs have ended to those who wait for them, on the channels named like what would be kept of it.
--
-- KEYS[1]   meta hash of their queue
-- KEYS[2..] one a job: the channel
-- ARGV      one a job: the note
--
-- returns 1; when nobody has waited for a while, that is noted, so that nothing is told any more
local until_ms = tonumber(redis.call('HGET', KEYS[1], 'waits') or 0)
if until_ms < now_ms() then redis.call('HDEL', KEYS[1], 'waits') end
for i, note in ipairs(ARGV) do redis.pcall('PUBLISH', KEYS[i + 1], note) end
return 1

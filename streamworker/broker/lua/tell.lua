-- tell: publish the ends of jobs to waiting callers, on the channels named like the keys of their result notes.
--
-- KEYS[1]   meta hash of their queue
-- KEYS[2..] one a job: the channel
-- ARGV      one a job: the note
--
-- returns 1; when no caller has waited for a while, the field "waits" is deleted, so that nothing is published any more
local until_ms = tonumber(redis.call('HGET', KEYS[1], 'waits') or 0)
if until_ms < now_ms() then redis.call('HDEL', KEYS[1], 'waits') end
for i, note in ipairs(ARGV) do redis.pcall('PUBLISH', KEYS[i + 1], note) end
return 1

-- pause: an operator pauses a queue or resumes it, and the bell tells those who wait for its jobs. The field "paused" is an
-- operator's; "inactive" beside it is the relay's. Nothing is claimed while either is there.
--
-- KEYS[1]  meta hash of the queue
-- KEYS[2]  due set of the queue: the bell is the channel named like it
-- ARGV[1]  who paused it and when, as people read it ("": resume)
--
-- returns 1 changed, 0 it was so already
local changed
if ARGV[1] == '' then
  changed = redis.call('HDEL', KEYS[1], 'paused')
else
  changed = redis.call('HSETNX', KEYS[1], 'paused', ARGV[1])
end
-- Also when nothing changed: whoever repeats it may do so because somebody has not heard of it.
redis.pcall('PUBLISH', KEYS[2], 'look')
return changed

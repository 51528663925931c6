-- pause: pause a queue for an operator, or resume it, and notify waiting workers. The field "paused" is an operator's;
-- the field "inactive" is the relay's. Nothing is claimed while either is set.
--
-- KEYS[1]  meta hash of the queue
-- KEYS[2]  due set of the queue: notifications are published on the channel named like it
-- ARGV[1]  who paused it and when, for operators ("": resume)
--
-- returns 1 changed, 0 it was so already
local changed
if ARGV[1] == '' then
  changed = redis.call('HDEL', KEYS[1], 'paused')
else
  changed = redis.call('HSETNX', KEYS[1], 'paused', ARGV[1])
end
-- Also when nothing changed: a call may be repeated because a worker missed the notification.
redis.pcall('PUBLISH', KEYS[2], 'look')
return changed

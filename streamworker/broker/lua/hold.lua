-- hold: pause a queue for the ledger (is_active = false), or resume it, and notify waiting workers. The field "inactive"
-- is the ledger's; the field "paused" is an operator's. Nothing is claimed while either is set.
--
-- KEYS[1]  meta hash of the queue
-- KEYS[2]  due set of the queue: notifications are published on the channel named like it
-- ARGV[1]  1 pauses, 0 resumes
--
-- returns 1 changed, 0 it was so already
local changed
if ARGV[1] == '1' then
  changed = redis.call('HSETNX', KEYS[1], 'inactive', '1')
else
  changed = redis.call('HDEL', KEYS[1], 'inactive')
end
if changed == 1 then redis.pcall('PUBLISH', KEYS[2], 'look') end
return changed

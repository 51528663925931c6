-- confirm: count the delivery of a reserved suspect just before it runs, if the claim still holds.
--
-- KEYS[1]  stream
-- ARGV[1]  group
-- ARGV[2]  consumer
-- ARGV[3]  entry id
-- ARGV[4]  delivery count when it was reserved
--
-- returns 1 confirmed (the delivery count is one higher now), 0 lost
local replica = read_only(KEYS[1], ARGV[1])
if replica then return replica end
local pending, trouble = pending_entry(KEYS[1], ARGV[1], ARGV[3])
if trouble then return redis.error_reply(trouble) end
if not pending or pending[2] ~= ARGV[2] or pending[4] ~= tonumber(ARGV[4]) then return 0 end
if redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3])[1] then return 1 end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
return 0

-- retain: renew the permits of executions whose leases were renewed. A permit that was released or has expired meanwhile
-- does not come back.
--
-- KEYS[1]    index of the queue's permits: the permits of a limit to the ms at which the last one expires
-- KEYS[2..]  permits of each limit
-- ARGV[1]    ms a permit lives unless renewed
-- ARGV[2..]  two a permit: its limit (from 1), token
--
-- returns 1
local till = string.format('%d', now_ms() + ARGV[1])
-- A key of a wrong type is that limit's trouble alone.
for i = 2, #ARGV, 2 do redis.pcall('ZADD', KEYS[tonumber(ARGV[i]) + 1], 'XX', till, ARGV[i + 1]) end
for k = 1, #KEYS do
  outlive(KEYS[k], tonumber(ARGV[1]))
  if k > 1 then redis.pcall('ZADD', KEYS[1], 'XX', 'GT', till, KEYS[k]) end
end
return 1

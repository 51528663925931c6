-- retain: renew the permits of executions whose leases were renewed. A permit that was released or has expired meanwhile
-- does not come back.
--
-- KEYS       permits of each limit
-- ARGV[1]    ms a permit lives unless renewed
-- ARGV[2..]  two a permit: its limit (from 1), token
--
-- returns 1
local till = string.format('%d', now_ms() + ARGV[1])
-- A key of a wrong type is that limit's trouble alone.
for i = 2, #ARGV, 2 do redis.pcall('ZADD', KEYS[tonumber(ARGV[i])], 'XX', till, ARGV[i + 1]) end
for k = 1, #KEYS do redis.call('PEXPIRE', KEYS[k], ARGV[1]) end
return 1

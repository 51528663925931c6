-- list_confirm: count the delivery of a reserved suspect just before it runs, if the claim still holds.
--
-- KEYS[1]  claimed list of the worker
-- KEYS[2]  lease set of the queue
-- ARGV[1]  its member in the lease set, as reserved
-- ARGV[2]  its string in the claimed list, as reserved
-- ARGV[3]  its member in the lease set, counted
-- ARGV[4]  its string in the claimed list, counted
--
-- returns 1 confirmed, 0 lost
-- A first write that changes nothing: a script that has written may write on when memory is out, and counting does not grow.
-- And a replica, which answers from its past, refuses here.
redis.call('ZREM', KEYS[2], '')
if not redis.call('LPOS', KEYS[1], ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[2], string.format('%d', now_ms()), ARGV[3])
redis.call('RPUSH', KEYS[1], ARGV[4])
redis.call('LREM', KEYS[1], 1, ARGV[2])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1

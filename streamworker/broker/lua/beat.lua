-- beat: write a worker's heartbeat. It expires when the worker stops writing it.
--
-- KEYS[1]    the worker's hash
-- ARGV[1]    ms it lives
-- ARGV[2..]  two a field: name, value
--
-- returns 1
redis.pcall('HSET', KEYS[1], unpack(ARGV, 2)) -- out of memory, an old report is better than none
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1

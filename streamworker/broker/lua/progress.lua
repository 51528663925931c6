-- progress: store the progress of a worker's jobs in its heartbeat, and delete that of ended jobs.
--
-- KEYS[1]  the worker's hash
-- ARGV[1]  ms it lives
-- ARGV[2]  N, number of fields to delete
-- ARGV[3..] N fields, then two a job: field, what its handler reported
--
-- returns 1
local forgotten = tonumber(ARGV[2])
if forgotten > 0 then redis.call('HDEL', KEYS[1], unpack(ARGV, 3, 2 + forgotten)) end
if #ARGV > 2 + forgotten then
  redis.pcall('HSET', KEYS[1], unpack(ARGV, 3 + forgotten)) -- out of memory, an old word is better than none
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return 1

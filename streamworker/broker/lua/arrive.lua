-- arrive: store a job that comes from another partition, once for each token, as a producer would store it here.
--
-- KEYS[1]  meta hash of the partition; all its other keys start like it
-- KEYS[2]  sorted set: tokens of jobs that came, to the ms at which they did
-- ARGV[1]  type of the ready keys: stream or list
-- ARGV[2]  the token
-- ARGV[3]  the job's level
-- ARGV[4]  its document
-- ARGV[5]  ms for which a token is remembered
--
-- returns 1 stored, 0 was stored before, or the error
local now = now_ms()
if redis.call('ZADD', KEYS[2], string.format('%d', now), ARGV[2]) == 0 then return 0 end
local err = failed(enter(ARGV[1], base_of(KEYS[1]), ARGV[3], ARGV[4], 'new'))
if err then
  redis.call('ZREM', KEYS[2], ARGV[2])
  return redis.error_reply(err)
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%d', now - tonumber(ARGV[5])))
return 1

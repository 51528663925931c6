-- schedule_due: which schedules of a queue are due, by this server's clock. One process of a fleet waits for the next tick: all
-- others look again when it should have ticked, and did not.
--
-- KEYS[1]  sorted set of the queue: schedule to the ms of its next tick
-- KEYS[2]  hash of the queue: schedule to its definition
-- KEYS[3]  string: the process that waits for the next tick of the queue
-- ARGV[1]  this process
-- ARGV[2]  most ms until the next look
-- ARGV[3]  ms that this process may be late
-- ARGV[4]  most schedules
--
-- returns { the server's time in ms, ms until the next look (-1: there is no schedule), schedule, ms of its tick, its
-- definition, … }
local now = now_ms()
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if not first[1] then return { now, -1 } end
local holder = redis.call('GET', KEYS[3])
if holder and holder ~= ARGV[1] then return { now, math.max(redis.call('PTTL', KEYS[3]), 50) } end
local wait = math.max(0, math.min(tonumber(first[2]) - now, tonumber(ARGV[2])))
redis.call('SET', KEYS[3], ARGV[1], 'PX', string.format('%d', wait + tonumber(ARGV[3])))
local answer = { now, wait }
if wait > 0 then return answer end
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now), 'WITHSCORES', 'LIMIT', 0, ARGV[4])
for k = 1, #due, 2 do
  answer[#answer + 1] = due[k]
  answer[#answer + 1] = due[k + 1]
  answer[#answer + 1] = redis.call('HGET', KEYS[2], due[k]) or ''
end
return answer

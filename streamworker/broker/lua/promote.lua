-- promote: move due jobs to their streams, in bounded batches, by the server's clock. Nothing is decoded: the member names
-- the level. The growing write comes first: out of memory, the job stays parked.
--
-- KEYS[1]    due set of the queue
-- KEYS[2]    bodies hash of the queue
-- KEYS[3..5] its streams: high, normal, low
-- ARGV[1]    most jobs to move
--
-- returns { moved, ms until the next job is due (-1: none) }
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local stream = { high = KEYS[3], normal = KEYS[4], low = KEYS[5] }
local moved = 0
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now), 'LIMIT', 0, ARGV[1])) do
  local body = redis.call('HGET', KEYS[2], member)
  if body then
    local target = stream[string.match(member, '^(%a+)/')] or KEYS[4]
    redis.call('XADD', target, '*', 'job', body)
    redis.call('HDEL', KEYS[2], member)
    moved = moved + 1
  end
  redis.call('ZREM', KEYS[1], member)
end
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if not first[1] then return { moved, -1 } end
return { moved, math.max(0, tonumber(first[2]) - now) }

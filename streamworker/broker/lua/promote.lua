-- promote: move due jobs to their streams, in bounded batches, by the server's clock. Nothing is decoded: the member names
-- the level. The growing write comes first: where it fails (out of memory, a wrong type), the job stays parked.
--
-- KEYS[1]    due set of the queue
-- KEYS[2]    bodies hash of the queue
-- KEYS[3..5] its streams: high, normal, low
-- ARGV[1]    most jobs to move
--
-- returns { moved, ms until the next job is due (-1: none), the error of a stream that took none ("": none) }
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local stream = { high = KEYS[3], normal = KEYS[4], low = KEYS[5] }
local moved, refused = 0, ''
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now), 'LIMIT', 0, ARGV[1])) do
  local body = redis.call('HGET', KEYS[2], member)
  if body then
    local target = stream[string.match(member, '^(%a+)/')] or KEYS[4]
    local added = redis.pcall('XADD', target, '*', 'job', body)
    if type(added) == 'table' and added.err then
      refused = added.err
    else
      redis.call('HDEL', KEYS[2], member)
      redis.call('ZREM', KEYS[1], member)
      moved = moved + 1
    end
  else
    redis.call('ZREM', KEYS[1], member)
  end
end
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if not first[1] then return { moved, -1, refused } end
return { moved, math.max(0, tonumber(first[2]) - now), refused }

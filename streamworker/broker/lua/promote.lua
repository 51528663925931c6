-- promote: move due jobs behind the ready ones of their level, in bounded batches, by the server's clock. Nothing is
-- decoded: the member of the due set names the level. The growing write comes first: where it fails (out of memory, a
-- wrong type), the job stays parked. A queue whose tenants' lines have jobs gets a ready one of each level.
--
-- KEYS     five a queue: due set, bodies hash, keys of its ready jobs: high, normal, low
-- ARGV[1]  most jobs to move of each queue
-- ARGV[2]  type of the ready keys: stream or list
--
-- returns one triple a queue: { moved, ms until its next job is due (-1: none), the error of a key that refused ("": none) }
local now = now_ms()

local function promote(k)
  local stream = { high = KEYS[k + 2], normal = KEYS[k + 3], low = KEYS[k + 4] }
  local moved, refused, base = 0, '', base_of(KEYS[k])
  local members = redis.pcall('ZRANGEBYSCORE', KEYS[k], '-inf', string.format('%d', now), 'LIMIT', 0, ARGV[1])
  if members.err then return { 0, -1, members.err } end
  for _, member in ipairs(members) do
    local body = redis.pcall('HGET', KEYS[k + 1], member)
    if failed(body) then return { moved, -1, body.err } end
    local target = stream[string.match(member, '^(%a+)/')] or KEYS[k + 3]
    local added = body and enter(ARGV[2], base, level_of(target), body, 'due')
    if failed(added) then
      refused = added.err
    else
      redis.call('ZREM', KEYS[k], member)
      if body then
        redis.call('HDEL', KEYS[k + 1], member)
        moved = moved + 1
      end
    end
  end
  -- The field "fair" only spares claims this look: it is lost with the meta hash, and the lines are not.
  local lined = redis.call('EXISTS', base .. ':fair:high', base .. ':fair:normal', base .. ':fair:low')
  if lined > 0 then
    redis.call('HSET', base .. ':meta', 'fair', '1')
    for _, level in ipairs({ 'high', 'normal', 'low' }) do
      if unclaimed(ARGV[2], base, level) == 0 then pull(ARGV[2], base, level, 1) end
    end
  end
  local first = redis.call('ZRANGE', KEYS[k], 0, 0, 'WITHSCORES')
  -- A day is soon enough to look again, and a score of inf is no integer.
  return { moved, first[1] and math.min(math.max(0, tonumber(first[2]) - now), 86400000) or -1, refused }
end

local result = {}
for k = 1, #KEYS, 5 do
  result[#result + 1] = promote(k)
end
return result

-- retain_all: renew all permits of a worker that is alive and cannot renew by itself, each only if it has not expired.
--
-- KEYS[1]    index of the queue's permits: the permits of a limit to the ms at which the last one expires
-- KEYS[2..]  permits of each limit
-- ARGV[1]    worker id
-- ARGV[2]    ms a permit lives unless renewed
--
-- returns the number of permits that were renewed
local now, mine, kept = now_ms(), ARGV[1] .. ' ', 0
local till = string.format('%d', now + ARGV[2])
for k = 2, #KEYS do
  local tokens = redis.pcall('ZRANGEBYSCORE', KEYS[k], '(' .. string.format('%d', now), '+inf')
  local before = kept
  for _, token in ipairs(tokens.err and {} or tokens) do
    if string.sub(token, 1, #mine) == mine then
      redis.call('ZADD', KEYS[k], 'XX', till, token)
      kept = kept + 1
    end
  end
  if kept > before then
    outlive(KEYS[k], tonumber(ARGV[2]))
    redis.pcall('ZADD', KEYS[1], 'GT', till, KEYS[k])
  end
end
outlive(KEYS[1], tonumber(ARGV[2]))
return kept

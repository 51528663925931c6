-- history: add tallies of the runs of a queue to those that are there. A tally is a msgpack array { started, done, failed, retried,
-- run, wait }; run and wait are { first bucket, counts of it and of those behind it ... }.
--
-- KEYS[1]    sorted set of the queue: kind to the seconds at which it was added last
-- KEYS[2..]  pages, hashes of the queue: "BEGIN KIND" to its tally; all of them are there before the first tally is added
-- ARGV[1]    most kinds of the queue
-- ARGV[2]    the kind under which the runs of further ones are added up
-- ARGV[3]    seconds after which a kind that was not added is forgotten
-- ARGV[4..]  seconds that each page lives; then for each tally: its kind, the tally, how many pages it is added to, and for each of
--            these its number (the first is 1) and the BEGIN
--
-- returns the server's time in ms
local pages = #KEYS - 1
local at = pages + 4
local ms = now_ms()
local seconds = math.floor(ms / 1000)

local function joined(one, other)
  if #one < 2 then return other end
  if #other < 2 then return one end
  local first = math.min(one[1], other[1])
  local sum = { first }
  for bucket = first, math.max(one[1] + #one, other[1] + #other) - 2 do
    local here, there = bucket - one[1] + 2, bucket - other[1] + 2
    sum[#sum + 1] = (here > 1 and one[here] or 0) + (there > 1 and other[there] or 0)
  end
  return sum
end

local function named(kind)
  if not redis.call('ZSCORE', KEYS[1], kind) and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then
    redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', seconds - ARGV[3])
    if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then return ARGV[2] end
  end
  redis.call('ZADD', KEYS[1], seconds, kind)
  return kind
end

while at <= #ARGV do
  local kind, tally = named(ARGV[at]), cmsgpack.unpack(ARGV[at + 1])
  local last = at + 2 + 2 * ARGV[at + 2]
  for index = at + 3, last, 2 do
    local page, field = tonumber(ARGV[index]) + 1, ARGV[index + 1] .. ' ' .. kind
    local there, known = pcall(cmsgpack.unpack, redis.call('HGET', KEYS[page], field) or '')
    local sum = tally
    if there and type(known) == 'table' and type(known[6]) == 'table' then
      sum = {}
      for part = 1, 4 do sum[part] = known[part] + tally[part] end
      sum[5], sum[6] = joined(known[5], tally[5]), joined(known[6], tally[6])
    end
    redis.call('HSET', KEYS[page], field, cmsgpack.pack(sum))
  end
  at = last + 1
end
redis.call('PEXPIRE', KEYS[1], ARGV[3] * 1000)
for page = 1, pages do redis.call('PEXPIRE', KEYS[page + 1], ARGV[page + 3] * 1000) end
return ms

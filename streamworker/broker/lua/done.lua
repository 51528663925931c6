-- done: acknowledge and delete finished entries, each only if the claim still holds. The fence is (consumer, delivery
-- count), because XACK checks neither. One look at the consumer's pending entries between the first id and the last finds
-- nearly all; one look per entry would cost the server twice as much.
--
-- KEYS[1]    stream
-- KEYS[2]    meta hash of the queue
-- ARGV[1]    group
-- ARGV[2]    consumer
-- ARGV[3]    delivery count of all claims; empty: each has its own
-- ARGV[4..]  entry id of each claim; where ARGV[3] is empty, its delivery count after each
--
-- returns { 1 if a caller waits for jobs of the queue to end, else 0, then the numbers of the claims that are lost }
local group, consumer, same = ARGV[1], ARGV[2], tonumber(ARGV[3])
local step = same and 1 or 2
local lost, ids, counts = {}, {}, {}

local function look(from, to, most)
  local page = redis.pcall('XPENDING', KEYS[1], group, from, to, most, consumer)
  if not page.err then
    for _, entry in ipairs(page) do counts[entry[1]] = entry[4] end
    return nil
  end
  return not no_group(page.err) and page.err
end

-- Compared as texts, which is cheap; whatever that or the length of the page leaves out is looked at by itself.
local first, last = ARGV[4], ARGV[4]
for i = 4 + step, #ARGV, step do
  if ARGV[i] < first then first = ARGV[i] elseif ARGV[i] > last then last = ARGV[i] end
end
local trouble = look(string.match(first, '^%d+'), string.match(last, '^%d+'), #ARGV)
if trouble then return redis.error_reply(trouble) end
for i = 4, #ARGV, step do
  local id = ARGV[i]
  if not counts[id] then
    trouble = look(id, id, 1)
    if trouble then return redis.error_reply(trouble) end
  end
  if counts[id] == (same or tonumber(ARGV[i + 1])) then
    ids[#ids + 1] = id
  else
    lost[#lost + 1] = (i - 4) / step + 1
  end
end
local replica = #lost > 0 and read_only(KEYS[1], group)
if replica then return replica end
if #ids > 0 then
  redis.call('XACK', KEYS[1], group, unpack(ids))
  redis.call('XDEL', KEYS[1], unpack(ids))
end
return { type(redis.pcall('HGET', KEYS[2], 'waits')) == 'string' and 1 or 0, unpack(lost) }

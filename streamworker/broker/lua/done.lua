-- done: acknowledge and delete finished entries, each only if the claim still holds. The fence is (consumer, delivery
-- count), because XACK checks neither. One look at the consumer's pending entries between the first id and the last finds
-- nearly all; one look per entry would cost the server twice as much.
--
-- KEYS[1]    stream
-- KEYS[2]    meta hash of the queue
-- ARGV[1]    group
-- ARGV[2]    consumer
-- ARGV[3..]  two a claim: entry id, delivery count
--
-- returns one number a claim: 1 settled, 0 lost; and one more, 1 if a caller waits for jobs of the queue to end
local group, consumer = ARGV[1], ARGV[2]
local result, ids, counts = {}, {}, {}

local function look(from, to, most)
  local page = redis.pcall('XPENDING', KEYS[1], group, from, to, most, consumer)
  if not page.err then
    for _, entry in ipairs(page) do counts[entry[1]] = entry[4] end
    return nil
  end
  return not no_group(page.err) and page.err
end

-- Compared as texts, which is cheap; whatever that or the length of the page leaves out is looked at by itself.
local first, last = ARGV[3], ARGV[3]
for i = 5, #ARGV, 2 do
  if ARGV[i] < first then first = ARGV[i] elseif ARGV[i] > last then last = ARGV[i] end
end
local trouble = look(string.match(first, '^%d+'), string.match(last, '^%d+'), #ARGV)
if trouble then return redis.error_reply(trouble) end
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  if not counts[id] then
    trouble = look(id, id, 1)
    if trouble then return redis.error_reply(trouble) end
  end
  if counts[id] == tonumber(ARGV[i + 1]) then
    ids[#ids + 1] = id
    result[#result + 1] = 1
  else
    result[#result + 1] = 0
  end
end
local replica = #ids < #result and read_only(KEYS[1], group)
if replica then return replica end
if #ids > 0 then
  redis.call('XACK', KEYS[1], group, unpack(ids))
  redis.call('XDEL', KEYS[1], unpack(ids))
end
result[#result + 1] = type(redis.pcall('HGET', KEYS[2], 'waits')) == 'string' and 1 or 0
return result

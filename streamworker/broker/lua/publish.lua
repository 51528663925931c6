-- publish: store new jobs of one queue: behind the others of their level, in the line of their order key or tenant, or
-- parked until they are due. A deduplication
-- key is written after its job, and while it exists the answer is the earlier job's id. Repeating a call with a key is
-- safe: the same id under the same key is our own first try. A job that becomes the first to be due is published on the
-- channel named like KEYS[4], as the ms until then.
--
-- KEYS[1..3]  keys of ready jobs: high, normal, low
-- KEYS[4]     due set
-- KEYS[5]     bodies hash
-- KEYS[6..]   deduplication keys
-- ARGV[1]     type of the ready keys: stream or list
-- ARGV[2..]   seven a job: number of its level's key in KEYS, when ("" now, "+ms" from now, "ms" since the epoch),
--             member for the due set, number of its deduplication key in KEYS (0: none), ms to remember the key,
--             job id, body
--
-- returns one value a job: 1 stored, or the id of the earlier job
local now = now_ms()
local result = {}

local function earlier(key, id)
  if key == 0 then return nil end
  local stored = redis.call('GET', KEYS[key])
  return stored and (stored == id and 1 or stored) or nil
end

for i = 2, #ARGV, 7 do
  local at, key, id, body = ARGV[i + 1], tonumber(ARGV[i + 3]), ARGV[i + 5], ARGV[i + 6]
  local known = earlier(key, id)
  if known then
    result[#result + 1] = known
  else
    local due = 0
    if string.sub(at, 1, 1) == '+' then due = now + tonumber(string.sub(at, 2)) elseif at ~= '' then due = tonumber(at) end
    if due > now then
      put_off(KEYS[4], KEYS[5], ARGV[i + 2], body, due, now)
    else
      local reply = enter(ARGV[1], base_of(KEYS[4]), level_of(KEYS[tonumber(ARGV[i])]), body, 'new')
      if failed(reply) then return reply end
    end
    if key > 0 then redis.call('SET', KEYS[key], id, 'PX', ARGV[i + 4]) end
    result[#result + 1] = 1
  end
end
return result

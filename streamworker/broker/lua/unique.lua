-- unique: store new jobs of one queue whose deduplication keys are held until they start or end. While a key is held, the
-- answer is the earlier job's id; a job that replaces takes the place of an earlier one that has not started: of a delayed
-- one in place, under its id; a ready one is cancelled, and the new one takes its key. Repeating a call is safe: the same
-- id under the same key is our own first try. The stored payload that a rewritten job had is noted.
--
-- KEYS[1..3]  keys of ready jobs: high, normal, low
-- KEYS[4]     due set: notifications are published on the channel named like it
-- KEYS[5]     bodies hash
-- KEYS[6]     cancelled set
-- KEYS[7]     meta hash
-- KEYS[8..]   two a job: its deduplication key, its mark (it has not started yet: ms at which it was stored, and the id of the job
--             that it superseded, for a repeated call)
-- ARGV[1]     type of the ready keys: stream or list
-- ARGV[2]     ms for which a cancellation is remembered
-- ARGV[3..]   ten a job: its level, when ("" now, "+ms" from now, "ms" since the epoch), ms after which the key is free whatever
--             became of its job, job id, 1 if it replaces, ms by which it debounces (0: not at all), most ms of that
--             (0: any), where the document goes on behind its id, body, what members of the due set end with
--
-- returns two values a job: "new", "earlier", "rewritten" or "superseded", and the id of the job that has the key now, of the
-- superseded one in that case
local now, base = now_ms(), base_of(KEYS[4])
local result = {}

local function due_at(i, since)
  local at, push, most = ARGV[i + 1], tonumber(ARGV[i + 5]), tonumber(ARGV[i + 6])
  if push > 0 then return most > 0 and math.min(now + push, since + most) or now + push end
  if string.sub(at, 1, 1) == '+' then return now + tonumber(string.sub(at, 2)) end
  return at ~= '' and tonumber(at) or 0
end

local function hold(key, mark, id, since, due, life)
  local ms = string.format('%d', math.max(0, due - now) + tonumber(life))
  redis.call('SET', key, id, 'PX', ms)
  redis.call('SET', mark, string.format('%d', since), 'PX', ms)
end

local function store(i, k, since, superseded)
  local id, body, due = ARGV[i + 3], ARGV[i + 8], due_at(i, since)
  if due > now then
    put_off(KEYS[4], KEYS[5], ARGV[i] .. '/' .. id .. '/' .. ARGV[i + 9], body, due, now)
  else
    local reply = enter(ARGV[1], base, ARGV[i], body, 'new')
    if failed(reply) then return reply end
  end
  hold(KEYS[k], KEYS[k + 1], id, since, due, ARGV[i + 2])
  if superseded then
    redis.call('SET', KEYS[k + 1], string.format('%d', since) .. ' ' .. superseded, 'KEEPTTL')
  end
end

local function parked(id, ending)
  for _, level in ipairs({ 'high', 'normal', 'low' }) do
    local member = level .. '/' .. id .. '/' .. ending
    if redis.call('ZSCORE', KEYS[4], member) then return member end
  end
end

-- The mark of a job that has not started yet: ms at which it was stored, and the id of the job that it superseded, if it did.
local function mark_of(key)
  local mark = redis.pcall('GET', key)
  if type(mark) ~= 'string' then return nil end
  return tonumber(string.match(mark, '^%d+')), string.match(mark, '^%d+ (.*)$')
end

-- Replace the job that has the key. Returns the word, or nil if that job has started.
local function replace(i, k, earlier)
  local since = mark_of(base .. ':held:' .. earlier)
  if not since then return nil end
  local member = parked(earlier, ARGV[i + 9])
  if member then
    local due, mine = due_at(i, since), ARGV[i] .. '/' .. earlier .. '/' .. ARGV[i + 9]
    local before = redis.pcall('HGET', KEYS[5], member)
    if mine ~= member then
      redis.call('ZREM', KEYS[4], member)
      redis.call('HDEL', KEYS[5], member)
    end
    local body = '{"id":' .. cjson.encode(earlier) .. string.sub(ARGV[i + 8], tonumber(ARGV[i + 7]) + 1)
    put_off(KEYS[4], KEYS[5], mine, body, due, now)
    unstore(base, before, body)
    hold(KEYS[k], base .. ':held:' .. earlier, earlier, since, due, ARGV[i + 2])
    return 'rewritten'
  end
  redis.call('ZADD', KEYS[6], string.format('%d', now + ARGV[2]), earlier)
  redis.call('PEXPIRE', KEYS[6], ARGV[2])
  redis.call('HSET', KEYS[7], 'cancelled', '1')
  redis.call('DEL', base .. ':held:' .. earlier)
  redis.pcall('PUBLISH', KEYS[4], 'cancel')
  return 'superseded'
end

for i = 3, #ARGV, 10 do
  local k = 8 + (i - 3) / 5
  local earlier, word = redis.call('GET', KEYS[k]), 'new'
  if earlier == ARGV[i + 3] then
    local _, superseded = mark_of(KEYS[k + 1])
    word, earlier = superseded and 'repeated' or 'new', superseded
  elseif earlier then
    word = ARGV[i + 4] == '1' and replace(i, k, earlier) or 'earlier'
  end
  if word == 'superseded' or word == 'new' and redis.call('GET', KEYS[k]) ~= ARGV[i + 3] then
    local refused = store(i, k, now, word == 'superseded' and earlier)
    if refused then return refused end
  end
  result[#result + 1], result[#result + 2] = word == 'repeated' and 'superseded' or word, earlier or ARGV[i + 3]
end
return result

-- dispatch: put jobs of the ledger behind the ready ones of their level, or into their lines, each at most once: an addition is remembered as
-- "id/hop" until the relay has noted it in the ledger (ZREM), so that repeating the call adds nothing twice. After the
-- deadline, by this server's clock, nothing is added: the relay that sent the call was frozen.
--
-- KEYS[1]     meta hash of the queue
-- KEYS[2]     sorted set of what was added and is not noted yet
-- KEYS[3..5]  keys of ready jobs: high, normal, low
-- ARGV[1]     type of the ready keys: stream or list
-- ARGV[2]     the deadline, in ms since the epoch
-- ARGV[3]     a fresh random epoch, taken by a queue of lists that has none
-- ARGV[4]     ms after which even additions that no relay noted are forgotten
-- ARGV[5..]   eight a job: number of its place in KEYS, "id/hop", body, the epoch without which it is not added ("": any): an
--             earlier job with its order key may be lost; job id, its deduplication key ("": none), 1 if that is held until the
--             job has started or ended and not for a time, ms after which it is free in any case
--
-- returns { ms since the epoch, what was done: "added", "late" or "groups" (they must be made first), the queue's epoch,
--           one value a job: 1 added, 0 was there, -1 another epoch, -2 another job holds its key, or the error }
local now = now_ms()
if now > tonumber(ARGV[2]) then return { now, 'late', '', {} } end

local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch and ARGV[1] == 'list' then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[3])
  epoch = ARGV[3]
end
if not epoch then return { now, 'groups', '', {} } end

local result, added, base = {}, 0, base_of(KEYS[1])

-- Whether another job holds the deduplication key of a job.
local function taken(i)
  if ARGV[i + 6] ~= '1' then return false end
  local holder = redis.call('GET', base .. ':key:' .. ARGV[i + 5])
  return holder and holder ~= ARGV[i + 4]
end

-- The job takes its key, as it does when a producer stores it here: see `publish` and `unique`.
local function hold(i)
  if ARGV[i + 6] == '1' then
    redis.call('SET', base .. ':key:' .. ARGV[i + 5], ARGV[i + 4], 'PX', ARGV[i + 7])
    redis.call('SET', base .. ':held:' .. ARGV[i + 4], string.format('%d', now), 'PX', ARGV[i + 7])
  elseif ARGV[i + 5] ~= '' then
    redis.call('SET', base .. ':key:' .. ARGV[i + 5], ARGV[i + 4], 'PX', ARGV[i + 7], 'NX')
  end
end

for i = 5, #ARGV, 8 do
  local answer = 0
  if ARGV[i + 3] ~= '' and ARGV[i + 3] ~= epoch then
    answer = -1
  elseif redis.call('ZSCORE', KEYS[2], ARGV[i + 1]) then
    answer = 0
  elseif taken(i) then
    answer = -2
  else
    -- Remembered first: if there is no memory for that, the job must not be added, or the next try would add it again.
    local known = redis.pcall('ZADD', KEYS[2], string.format('%d', now), ARGV[i + 1])
    local reply = failed(known) and known or enter(ARGV[1], base, level_of(KEYS[tonumber(ARGV[i])]), ARGV[i + 2], 'line')
    answer = failed(reply) or 1
    if answer == 1 then
      hold(i)
      added = added + 1
    elseif not failed(known) then
      redis.call('ZREM', KEYS[2], ARGV[i + 1])
    end
  end
  result[#result + 1] = answer
end
if added > 0 then redis.pcall('HINCRBY', KEYS[1], 'relayed', added) end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%d', now - tonumber(ARGV[4])))
return { now, 'added', epoch, result }

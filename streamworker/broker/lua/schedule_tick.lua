-- schedule_tick: add the jobs of due ticks, each once: a tick holds only as long as its schedule is as it was read, and moves the
-- schedule to its next tick in the same step. What cannot be stored stays due.
--
-- KEYS[1]  sorted set of the queue: schedule to the ms of its next tick
-- KEYS[2]  hash of the queue: schedule to its definition
-- KEYS[3]  hash of the queue: schedule to the ms of its last tick
-- KEYS[4]  meta hash of the queue
-- ARGV[1]  type of the ready keys: stream or list
-- ARGV[2..]  seven a tick: schedule, the ms at which it was due, SHA-1 of its definition, ms of its next tick, level of the job,
--          the job ("": the tick passes without one), ms of the tick ("": it is not noted)
--
-- returns for each: 1 the job was added, 0 the tick passed or was another process's, or the error that the server gave
local base, answer = base_of(KEYS[4]), {}
for k = 2, #ARGV, 7 do
  local name, due, digest, after, level, body, tick = unpack(ARGV, k, k + 6)
  local score, result = redis.call('ZSCORE', KEYS[1], name), 0
  if score and tonumber(score) == tonumber(due) and redis.sha1hex(redis.call('HGET', KEYS[2], name) or '') == digest then
    local reply = body ~= '' and enter(ARGV[1], base, level, body, 'new')
    if failed(reply) then
      result = reply.err
    else
      if body ~= '' then result = 1 end
      if after ~= due then redis.call('ZADD', KEYS[1], after, name) end
      if tick ~= '' then redis.call('HSET', KEYS[3], name, tick) end
    end
  end
  answer[#answer + 1] = result
end
return answer

-- prelude: functions that several scripts share. `scripts` puts those that a script calls before its text, so that a
-- script pays for none that it does not call.
--
-- KEYS  of the script that calls; a function takes keys as parameters
--
-- returns nothing

-- The server's clock, in ms since the epoch.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The error of a reply, else false.
local function failed(reply) return type(reply) == 'table' and reply.err or false end

-- Whether an error says that there are no claims: the group, the stream or its type is gone. Any other error does not tell
-- whether a claim holds, and a claim that may hold is not lost.
local function no_group(err)
  return string.find(err, 'NOGROUP', 1, true) or string.find(err, 'WRONGTYPE', 1, true)
end

-- Pending entry { id, consumer, ms idle, delivery count } of one id, nil if there is none; and the error that does not tell.
local function pending_entry(key, group, id)
  local reply = redis.pcall('XPENDING', key, group, id, id, 1)
  if not reply.err then return reply[1] end
  return nil, not no_group(reply.err) and reply.err
end

-- The error reply of a replica, else nil: a replica answers from its past, so only a server that takes a write may say that a
-- claim is lost. The write changes nothing: there is no entry 0-0, and no member ''.
local function read_only(key, group)
  local proof
  if group then proof = redis.pcall('XACK', key, group, '0-0') else proof = redis.pcall('ZREM', key, '') end
  local err = failed(proof)
  return err and string.find(err, 'READONLY', 1, true) and redis.error_reply(err) or nil
end

-- Keep a result note for some ms (0: not at all) and publish it. Out of memory it is only published: the job has ended all the
-- same. Key `ended`, if given, remembers a minute longer for how long the note of a completed job was kept.
local function keep(key, ms, note, ended)
  if tonumber(ms) > 0 then
    redis.pcall('SET', key, note, 'PX', ms)
    if ended and string.find(note, '"completed"', 1, true) then
      redis.pcall('SET', ended, ms, 'PX', string.format('%d', ms + 60000))
    end
  end
  redis.pcall('PUBLISH', key, note)
end

-- Put a job behind the others of a ready key; returns the reply, which may be an error.
local function add(shape, key, body)
  if shape == 'list' then return redis.pcall('LPUSH', key, body) end
  return redis.pcall('XADD', key, '*', 'job', body)
end

-- Park a job for `delay` ms, or make it ready at once: for a negative delay, and if it was called for its limit meanwhile. A job
-- that becomes the first to be due is published on the channel named like the due set, as the ms until then. Returns the error
-- why it cannot be stored, else false.
local function park(job, delay, now, shape, key, due, bodies, calls)
  local member, body = job[1], job[2]
  if delay < 0 or type(redis.pcall('ZSCORE', calls, member)) == 'string' then return failed(add(shape, key, body)) end
  local err = failed(redis.pcall('HSET', bodies, member, body))
  if err then return err end
  err = failed(redis.pcall('ZADD', due, string.format('%d', now + delay), member))
  if err then
    redis.call('HDEL', bodies, member)
    return err
  end
  if redis.call('ZRANGE', due, 0, 0)[1] == member then redis.pcall('PUBLISH', due, string.format('%d', delay)) end
  return false
end

-- A key lives for some ms at least: its members of other workers may need it for longer.
local function outlive(key, ms)
  local left = redis.pcall('PTTL', key)
  if not failed(left) and left < ms then redis.call('PEXPIRE', key, string.format('%d', ms)) end
end

-- Leases in ms by worker, from the field "leases" of a meta hash; the shortest and the longest, `lease` included.
local function leases_of(key, lease)
  local leases, shortest, longest = {}, lease, lease
  for name, ms in string.gmatch(redis.call('HGET', key, 'leases') or '', '(%S+) (%d+)\n') do
    leases[name] = tonumber(ms)
    shortest, longest = math.min(shortest, leases[name]), math.max(longest, leases[name])
  end
  return leases, shortest, longest
end

-- Whether a token that says when the next look is due has fallen since this worker saw it. Tokens only rise, but by what
-- different leases make of them: another worker looked while the clock was put back, and it has been put right since. A lease
-- that was renewed meanwhile looks as old as that leap: no claim expires before every worker had one lease to renew.
local function fell(token, seen, shortest, longest)
  local slack = shortest == longest and math.max(shortest / 2, 1000) or longest
  return token > 0 and token < seen - slack
end

-- Whether this worker is the one that drains for a suspect, from now on or for another second: the field "drainer" of a meta
-- hash holds its name and the ms until which it holds, so that another worker follows when it dies.
local function appointed(key, worker, now)
  local TERM = 1000
  local who, till = string.match(redis.call('HGET', key, 'drainer') or '', '^(.*) (%d+)$')
  till = tonumber(till or 0)
  if who and who ~= worker and till > now and till - now <= TERM then return false end
  redis.pcall('HSET', key, 'drainer', worker .. ' ' .. string.format('%d', now + TERM)) -- out of memory, every worker drains
  return true
end

-- The group of a suspect at a delivery: those with the same one run together. Each delivery from the third on splits each
-- group in two, by the digest of the entry; `streamworker.policy.half_of` does the same.
local function half_of(id, delivery)
  local digest, half = redis.sha1hex(id), ''
  for digit = 1, math.min(delivery - 2, #digest) do
    half = half .. tonumber(string.sub(digest, digit, digit), 16) % 2
  end
  return half
end

-- Numbers of a text, from the first one on.
local function numbers(text)
  local found = {}
  for number in string.gmatch(text, '%d+') do found[#found + 1] = tonumber(number) end
  return found
end

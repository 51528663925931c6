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

-- What all keys of a queue start with, given one that ends in a word of ours, as its due set does.
local function base_of(key) return string.match(key, '^(.*):%a+$') end

-- Delete the deduplication key of a job that needs it no longer, unless another job has it by now.
local function let_go(key, id)
  if redis.pcall('GET', key) == id then redis.call('DEL', key) end
end

-- Name and id of the deduplication key in a document that is held until its job has started or ended; nil without one. Only
-- documents in which such a word stands are decoded.
local function held_in(body)
  if type(body) ~= 'string' or not string.find(body, '"unique":"', 1, true) then return nil end
  local ok, job = pcall(cjson.decode, body)
  if not ok or type(job) ~= 'table' or type(job.unique) ~= 'string' or type(job.key) ~= 'string' then return nil end
  if type(job.id) == 'string' then return job.key, job.id end
end

-- A job has ended: its deduplication key is free, if it was held until then.
local function release(base, body)
  local name, id = held_in(body)
  if name then let_go(base .. ':key:' .. name, id) end
end

-- A job goes on after `delay` ms: its deduplication key, if it is held until the job ends, stays for a week longer at least.
local function prolong(base, body, delay)
  local name, id = held_in(body)
  if not name then return end
  local key, ms = base .. ':key:' .. name, math.max(0, delay) + 7 * 86400000
  if redis.pcall('GET', key) == id and redis.call('PTTL', key) < ms then
    redis.call('PEXPIRE', key, string.format('%d', ms))
  end
end

-- A document was deleted for good, and no worker had its claim. Where its payload is in a store, that is noted for a process that has
-- the store, unless the document in its place, `heir`, has the same. Every script that deletes documents calls this. A document
-- without an id may be named by `id`. The oldest of very many notes go: the relay's sweep finds what they named.
local function unstore(base, body, heir, id)
  if not body or not string.find(body, '"streamworker_stored"', 1, true) then return end
  local ok, job = pcall(cjson.decode, body)
  local payload = ok and type(job) == 'table' and job.payload
  local stored = type(payload) == 'table' and payload.streamworker_stored
  local name = type(stored) == 'table' and stored.id
  if type(name) ~= 'string' or heir and string.find(heir, name, 1, true) then return end
  if type(job.id) == 'string' and job.id ~= '' then id = job.id end
  local set, MOST = base .. ':payloads', 100000
  redis.pcall('ZADD', set, string.format('%d', now_ms()), cjson.encode({ name, id or '', tonumber(job.hop) or 0 }))
  if redis.pcall('ZCARD', set) == MOST + 1 then redis.pcall('ZPOPMIN', set) end
  redis.pcall('PUBLISH', set, '')
end

-- Put a job behind the others of a ready key; returns the reply, which may be an error.
local function add(shape, key, body)
  if shape == 'list' then return redis.pcall('LPUSH', key, body) end
  return redis.pcall('XADD', key, '*', 'job', body)
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

-- The key of a level's ready jobs; the lists of list mode have no prefix.
local function ready_of(shape, base, level)
  local normal = shape == 'list' and 'queue:' .. string.match(base, '{([^{}]*)}$') or base
  return level == 'normal' and normal or normal .. ':' .. level
end

-- The level of a key of ready jobs.
local function level_of(key)
  local word = string.match(key, ':(%a+)$')
  return (word == 'high' or word == 'low') and word or 'normal'
end

-- Order key and fairness key of a document ("" without), its id and its hop; nil if it has neither key, or no id. Only
-- documents in which such a name stands are decoded.
local function flow_of(body)
  if not string.find(body, '_key"', 1, true) then return nil end
  local ok, job = pcall(cjson.decode, body)
  if not ok or type(job) ~= 'table' then return nil end
  local id = job.id
  if (type(id) ~= 'string' or id == '') and type(job.streamworker) == 'table' then id = job.streamworker.id end
  local order = type(job.order_key) == 'string' and #job.order_key <= 200 and job.order_key or ''
  local fair = type(job.fair_key) == 'string' and #job.fair_key <= 200 and job.fair_key or ''
  if type(id) ~= 'string' or order .. fair == '' then return nil end
  return order, fair, id, tonumber(job.hop) or 0
end

-- Move up to `most` jobs of a level from its tenants' lines to its ready key, in the order of their starts in virtual time, see
-- `join`; the level's virtual time is that of the last one. In a stream they are marked: an idle worker that reads one makes the
-- next one ready. Returns how many were moved.
local function pull(shape, base, level, most)
  if most < 1 then return 0 end
  local set, tenants = base .. ':fair:' .. level, base .. ':fair:' .. level .. ':tenants'
  local ready, moved = ready_of(shape, base, level), 0
  local rows = redis.call('ZPOPMIN', set, most)
  for r = 1, #rows, 2 do
    local body, added = string.sub(rows[r], 17), nil
    if shape == 'list' then added = redis.pcall('LPUSH', ready, body) else
      added = redis.pcall('XADD', ready, '*', 'job', body, 'line', '1')
    end
    if failed(added) then break end
    moved = moved + 1
  end
  for r = 2 * moved + 1, #rows, 2 do redis.call('ZADD', set, rows[r + 1], rows[r]) end -- what cannot be stored stays in its line
  if moved == 0 then return 0 end
  local now = rows[2 * moved]
  redis.call('HSET', base .. ':fair', 'now:' .. level, now)
  if moved == #rows / 2 and redis.call('EXISTS', set) == 0 then
    redis.call('UNLINK', tenants)
  else
    redis.call('ZREMRANGEBYSCORE', tenants, '-inf', now)
  end
  return moved
end

-- Number of ready jobs of a level that no worker has claimed.
local function unclaimed(shape, base, level)
  local ready = ready_of(shape, base, level)
  local length = redis.pcall(shape == 'list' and 'LLEN' or 'XLEN', ready)
  if type(length) ~= 'number' or length == 0 or shape == 'list' then return type(length) == 'number' and length or 0 end
  local info = (redis.call('XINFO', 'GROUPS', ready) or {})[1] or {}
  for f = 1, #info, 2 do
    if info[f] == 'pending' then return length - info[f + 1] end
  end
  return length
end

-- Move jobs from the lines of a queue's tenants to its ready keys, until of each level as many are ready as a worker is about to
-- claim, and one more, for which the others wait. Returns the number of jobs that still wait in lines.
local function fill(shape, key, most)
  local base, left = base_of(key), 0
  for _, level in ipairs({ 'high', 'normal', 'low' }) do
    local waiting = redis.call('ZCARD', base .. ':fair:' .. level)
    if waiting > 0 then left = left + waiting - pull(shape, base, level, most + 1 - unclaimed(shape, base, level)) end
  end
  if left == 0 then redis.call('HDEL', key, 'fair') end
  return left
end

-- Numbers of a queue's jobs in the lines of order keys, of those in the lines of tenants, and of order keys that halt at dead jobs.
local function in_lines(base)
  local waiting, tenants = redis.pcall('HGET', base .. ':meta', 'waiting'), 0
  for _, level in ipairs({ 'high', 'normal', 'low' }) do
    local count = redis.pcall('ZCARD', base .. ':fair:' .. level)
    if not failed(count) then tenants = tenants + count end
  end
  local halted = redis.pcall('HLEN', base .. ':halted')
  return type(waiting) == 'string' and tonumber(waiting) or 0, tenants, failed(halted) and 0 or halted
end

-- Put a job at the end of its tenant's line: start-time fair queuing. A job starts, in the virtual time of its level, when its
-- tenant's last one ends, and at once if that has ended; it takes 1 / weight. All lines of a level are one sorted set by these
-- starts, and a number in front of each document keeps those apart that start at one time. While lines have jobs, their level
-- has a ready one, for which workers wait. Returns the reply, which may be an error.
local function join(shape, base, level, fair, body)
  local set, tenants = base .. ':fair:' .. level, base .. ':fair:' .. level .. ':tenants'
  local state = base .. ':fair'
  local number = redis.pcall('HINCRBY', state, 'number', 1)
  if failed(number) then return number end
  local told = redis.call('HMGET', state, 'now:' .. level, 'weight:' .. fair)
  local ends = redis.call('ZSCORE', tenants, fair)
  local start = math.max(tonumber(told[1] or 0), tonumber(ends or 0))
  local reply = redis.pcall('ZADD', set, string.format('%.17g', start), string.format('%016d', number) .. body)
  if failed(reply) then return reply end
  redis.call('ZADD', tenants, string.format('%.17g', start + 1 / (tonumber(told[2] or '') or 1)), fair)
  if redis.call('ZCARD', set) == 1 then
    redis.call('HSET', base .. ':meta', 'fair', '1')
    if unclaimed(shape, base, level) == 0 then pull(shape, base, level, 1) end
  end
  return reply
end

-- The partition of a value, of so many; see `streamworker.broker.partitions`.
local function partition_of(value, count) return tonumber(string.sub(redis.sha1hex(value), 1, 8), 16) % count end

-- Whether a queue has another partition for a value than the one with these keys, given the numbers of partitions it has had.
local function strays(base, value, sizes)
  local own, count = tonumber(string.match(base, '#(%d+)}$') or 0), tonumber(string.match(sizes, '%d+$') or 1)
  return partition_of(value, count) ~= own
end

-- Make a job ready, unless it has to wait: behind the job that holds its order key, in its tenant's line, or because its order
-- key belongs to another partition. `how` is "new" for
-- a job that is stored for the first time, "line" for one that has to go to its tenant's line, "back" for one that has
-- had its turn there, and "due" where its hop tells. Returns the reply, which may be an error.
local function enter(shape, base, level, body, how)
  local order, fair, id, hop = flow_of(body)
  if not order then return add(shape, ready_of(shape, base, level), body) end
  local holder
  if order ~= '' then
    local told = redis.pcall('HMGET', base .. ':order', order, '')
    if failed(told) then return told end
    holder = told[1]
    if not holder and told[2] and strays(base, order, told[2]) then -- it waits here until it moves, held by nothing: see `depart`
      local time = redis.call('TIME')
      local token = string.format('%d %s', time[1] * 1000000 + time[2], string.match(told[2], '%d+$'))
      local noted = redis.pcall('HSETNX', base .. ':moving', order, token)
      if not failed(noted) then noted = redis.pcall('HSET', base .. ':order', order, '') end
      if failed(noted) then return noted end
      holder = ''
    end
    if holder and (holder ~= id or how == 'new') then
      local waiting = string.format('%s %d %d %s%s%s', level, #id, #fair, id, fair, body)
      local reply = redis.pcall('RPUSH', base .. ':order:' .. order, waiting)
      if failed(reply) then return reply end
      if reply == 1 then redis.call('SADD', base .. ':lines', order) end
      redis.call('HINCRBY', base .. ':meta', 'waiting', 1)
      return reply
    end
    local held = redis.pcall('HSET', base .. ':order', order, id)
    if failed(held) then return held end
  end
  local reply
  if fair ~= '' and (how == 'new' or how == 'line' or how == 'due' and hop <= 1) then
    reply = join(shape, base, level, fair, body)
  else
    reply = add(shape, ready_of(shape, base, level), body)
  end
  if order ~= '' then
    if failed(reply) and not holder then redis.call('HDEL', base .. ':order', order) end
    if holder and not failed(reply) then redis.call('HDEL', base .. ':halted', order) end
  end
  return reply
end

-- Pass order keys on that ended jobs hold, each named with its job: the next job of each line becomes ready. What cannot be
-- stored stays in its line, and the key stays with the job that ended, until the sweep finds it.
local function pass_on(shape, base, keys, ids)
  local holders, heirs, free, passed = redis.pcall('HMGET', base .. ':order', unpack(keys)), {}, {}, {}
  for k = 1, failed(holders) and 0 or #keys do
    local line = base .. ':order:' .. keys[k]
    local first = holders[k] == ids[k] and not passed[keys[k]] and redis.pcall('LPOP', line)
    if first and not failed(first) then
      local level, named, tenant, at = string.match(first, '^(%a+) (%d+) (%d+) ()')
      local fair, body, reply = string.sub(first, at + named, at + named + tenant - 1), string.sub(first, at + named + tenant), nil
      if fair ~= '' then
        reply = join(shape, base, level, fair, body)
      else
        reply = add(shape, ready_of(shape, base, level), body)
      end
      if failed(reply) then
        redis.call('LPUSH', line, first)
      else
        heirs[#heirs + 1], heirs[#heirs + 2] = keys[k], string.sub(first, at, at + named - 1)
      end
      passed[keys[k]] = true
    elseif first == false and holders[k] == ids[k] and not passed[keys[k]] then
      free[#free + 1], passed[keys[k]] = keys[k], true
    end
  end
  if heirs[1] then
    redis.call('HSET', base .. ':order', unpack(heirs))
    redis.call('HINCRBY', base .. ':meta', 'waiting', -#heirs / 2)
  end
  if free[1] then
    redis.call('HDEL', base .. ':order', unpack(free))
    redis.call('SREM', base .. ':lines', unpack(free))
  end
end

-- A field of a stream's entry, nil without.
local function field_of(fields, name)
  for f = 1, #fields, 2 do
    if fields[f] == name then return fields[f + 1] end
  end
end

-- The document of a stream's entry, "" without.
local function job_in(fields) return field_of(fields, 'job') or '' end

-- The job that holds an order key waits in the ledger: the key halts, so that no sweep takes the job for a lost one.
local function keep_order(base, order)
  redis.pcall('HSET', base .. ':halted', order, '')
end

-- Pass the order key of a dead job on, or let it halt with the job, if that holds it.
local function bereave(shape, base, body, id, halts)
  local order = flow_of(body)
  if not order or order == '' or redis.pcall('HGET', base .. ':order', order) ~= id then return end
  if halts then
    redis.pcall('HSET', base .. ':halted', order, id)
  else
    pass_on(shape, base, { order }, { id })
  end
end

-- Pass the order key on that halts with a dead letter which is deleted.
local function unhalt(shape, base, body)
  local order, _, id = flow_of(body)
  if order and redis.pcall('HGET', base .. ':halted', order) == id then
    redis.call('HDEL', base .. ':halted', order)
    pass_on(shape, base, { order }, { id })
  end
end

-- A job that was parked for `delay` ms is published if it is the first to be due: on the channel named like the due set.
local function announce(due, member, delay)
  if redis.call('ZRANGE', due, 0, 0)[1] == member then redis.pcall('PUBLISH', due, string.format('%d', delay)) end
end

-- Store a job of a producer that is due at `at`, ms since the epoch.
local function put_off(due, bodies, member, body, at, now)
  redis.call('HSET', bodies, member, body)
  redis.call('ZADD', due, string.format('%d', at), member)
  announce(due, member, math.max(0, at - now))
end

-- Park a job for `delay` ms, or make it ready at once: for a negative delay (-2: by way of its tenant's line), and if it was
-- called for its limit meanwhile. Returns the error why it cannot be stored, else false.
local function park(job, delay, now, shape, key, due, bodies, calls)
  local member, body = job[1], job[2]
  if delay < 0 or type(redis.pcall('ZSCORE', calls, member)) == 'string' then
    return failed(enter(shape, base_of(due), level_of(key), body, delay < -1 and 'line' or 'back'))
  end
  local err = failed(redis.pcall('HSET', bodies, member, body))
  if err then return err end
  err = failed(redis.pcall('ZADD', due, string.format('%d', now + delay), member))
  if err then
    redis.call('HDEL', bodies, member)
    return err
  end
  announce(due, member, delay)
  return false
end

-- Append a batch { attempt, chunks that the run stored before, number of chunks, chunks } of a run to a job's output, within
-- { ms it lives, most chunks, most bytes }: the oldest chunks go first. An entry's id is the position of its last chunk. The
-- first position of an output is that of its first ms, so that positions rise though the output expires meanwhile; a run is
-- named by its first position. Returns the error why it cannot be stored, else false.
local function append(key, token, batch, bounds)
  local attempt, offset, count, chunks = unpack(batch)
  offset, count = tonumber(offset), tonumber(count)
  local rows = redis.pcall('XREVRANGE', key, '+', '-', 'COUNT', 1)
  local err, last, position, before, run = failed(rows), rows[1], nil, 0, nil
  if err then return err end
  if last then
    local is = last[2]
    position, before = tonumber(string.match(last[1], '^%d+')), tonumber(is[10]) + #is[14]
    if is[12] == token then
      if tonumber(is[6]) >= offset + count then return false end -- it is stored: the reply was lost
      run = is[2]
    end
  else
    position = now_ms() * 1000
  end
  local from = string.format('%d', position + 1)
  local id, stored = string.format('%d-0', position + count), string.format('%d', offset + count)
  local added = redis.pcall('XADD', key, id, 'run', run or from, 'attempt', attempt, 'stored', stored, 'from', from,
    'before', string.format('%d', before), 'token', token, 'chunks', chunks)
  err = failed(added)
  if err then return err end
  -- A chunk has a byte at least: an output that never had more bytes than it may have chunks needs no look at its oldest.
  while before + #chunks > math.min(bounds[2], bounds[3]) do
    local first = redis.call('XRANGE', key, '-', '+', 'COUNT', 1)[1]
    local is = first[2]
    local held, bytes = position + count - tonumber(is[8]) + 1, before + #chunks - tonumber(is[10])
    if first[1] == id or held <= bounds[2] and bytes <= bounds[3] then break end
    redis.call('XDEL', key, first[1])
  end
  redis.call('PEXPIRE', key, bounds[1])
  redis.pcall('PUBLISH', key, string.sub(id, 1, -3))
  return false
end

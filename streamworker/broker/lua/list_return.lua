-- list_return: release expired claims to the right ends of their lists, in the order in which they were first taken, the
-- oldest rightmost. The mark in front of an element keeps its id and its delivery count, sealed (streamworker/codec.py):
-- {"streamworker":{"id":"...","deliveries":N,"seal":"..."}, ...; bytes that are no JSON object stay as they are. Growing
-- writes come first.
--
-- KEYS[1]     lease set of the queue
-- KEYS[2..4]  its lists: high, normal, low
-- KEYS[5]     meta hash of the queue
-- KEYS[6..]   claimed lists of the workers that held the claims
-- ARGV[1]     lease in ms of workers that stored none, see `lease`: claims that were not renewed for a lease have expired
-- ARGV[2..]   two a claim: its member in the lease set, index of its claimed list in KEYS
--
-- returns { number given back, number that were deleted, errors of keys that refused ... }
local lease = tonumber(ARGV[1])
local now = now_ms()
local LISTS = { high = 2, normal = 3, low = 4 }
local secret = string.match(redis.call('HGET', KEYS[5], 'secret') or '', '^%x+')
local wanted, expired, returned, missing, errors = {}, {}, 0, 0, {}

-- A first write that changes nothing: a script that has written may write on when memory is out, and moving does not grow.
redis.call('ZREM', KEYS[1], '')

local leases = leases_of(KEYS[5], lease)
for i = 2, #ARGV, 2 do
  local score, k = redis.call('ZSCORE', KEYS[1], ARGV[i]), tonumber(ARGV[i + 1])
  local its = leases[string.match(ARGV[i], '^%S+ %d+ (.+)$') or ''] or lease
  if score and now - tonumber(score) >= its then
    wanted[k] = wanted[k] or {}
    wanted[k][string.match(ARGV[i], '^%S+ %d+') or ''] = ARGV[i]
  end
end

for k, members in pairs(wanted) do
  local wrappers = redis.pcall('LRANGE', KEYS[k], 0, -1)
  if wrappers.err then
    errors[#errors + 1] = wrappers.err
    members = {}
  end
  for _, wrapper in ipairs(wrappers) do
    local token, level, start = string.match(wrapper, '^(%S+ %d+) (%a+)%?? ()')
    if token and members[token] and LISTS[level] then
      expired[#expired + 1] = { token, k, wrapper, members[token], LISTS[level], string.sub(wrapper, start) }
      members[token] = nil
    end
  end
  for _, member in pairs(members) do
    redis.call('ZREM', KEYS[1], member)
    missing = missing + 1
  end
end

local function marked(token, body)
  local brace, rest = string.match(body, '^(%s*{)(%s*".*)$')
  if not brace then return body end
  local id, count = string.match(token, '^(%S+) (%d+)$')
  local proof = ''
  if secret then
    proof = ',"seal":"' .. redis.sha1hex(secret .. ' deliveries ' .. count .. '\n' .. id .. '\n' .. secret) .. '"'
  end
  return brace .. '"streamworker":{"id":"' .. id .. '","deliveries":' .. count .. proof .. '},' .. rest
end

table.sort(expired, function(a, b) return a[1] > b[1] end)
for _, each in ipairs(expired) do
  local reply = redis.pcall('RPUSH', KEYS[each[5]], marked(each[1], each[6]))
  if failed(reply) then
    errors[#errors + 1] = reply.err
  else
    redis.call('LREM', KEYS[each[2]], 1, each[3])
    redis.call('ZREM', KEYS[1], each[4])
    returned = returned + 1
  end
end
return { returned, missing, unpack(errors, 1, math.min(#errors, 10)) }

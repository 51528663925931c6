-- bury: move claimed entries to the dead letters, each only if the claim still holds. The bytes are taken from the
-- stream, so that a dead letter holds exactly what the producer wrote; an entry without a field "job" keeps all its
-- fields, each prefixed with "field:". The growing write comes first: out of memory, nothing changes. The order key of a dead job
-- is passed on, or halted: kept by the dead job until that is replayed or deleted.
-- A deduplication key that is held until its job ends is free.
--
-- KEYS[1]    stream
-- KEYS[2]    dead stream of the queue
-- KEYS[3..]  one a claim: result note of its job, and the channel on which it is published
-- ARGV[1]    group
-- ARGV[2..]  thirteen a claim: consumer, entry id, delivery count, job id, kind, level, reason, error, attempts, failed_at,
--            ms to keep the note (0: not at all), note, 1 if its order key halts
--
-- returns one number a claim: 1 settled, 0 lost; or the error why it was refused
local group = ARGV[1]
local result, settled = {}, 0

-- Lua cannot pass more values than this to one command; an entry with more fields keeps them as JSON in one.
local MOST = 4000

local function letter(i, fields)
  local out = {}
  for f = 1, #fields, 2 do
    if fields[f] == 'job' then out = { 'job', fields[f + 1] } break end
    if #fields <= MOST then out[#out + 1], out[#out + 2] = 'field:' .. fields[f], fields[f + 1] end
  end
  if not out[1] then out = { 'fields', cjson.encode(fields) } end
  local names = { 'id', 'kind', 'level', 'reason', 'error', 'attempts', 'failed_at' }
  for n, name in ipairs(names) do
    out[#out + 1], out[#out + 2] = name, ARGV[i + 2 + n]
  end
  out[#out + 1], out[#out + 2] = 'deliveries', ARGV[i + 2]
  out[#out + 1], out[#out + 2] = 'worker', ARGV[i]
  out[#out + 1], out[#out + 2] = 'entry', ARGV[i + 1]
  return out
end

for i = 2, #ARGV, 13 do
  local id = ARGV[i + 1]
  local pending, trouble = pending_entry(KEYS[1], group, id)
  if trouble then return redis.error_reply(trouble) end
  if not pending or pending[2] ~= ARGV[i] or pending[4] ~= tonumber(ARGV[i + 2]) then
    result[#result + 1] = 0
  else
    local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
    local added = entry and redis.pcall('XADD', KEYS[2], '*', unpack(letter(i, entry[2])))
    if failed(added) then
      result[#result + 1] = added.err
    else
      redis.call('XACK', KEYS[1], group, id)
      redis.call('XDEL', KEYS[1], id)
      keep(KEYS[3 + #result], ARGV[i + 10], ARGV[i + 11])
      local base, body = base_of(KEYS[2]), entry and job_in(entry[2]) or ''
      bereave('stream', base, body, ARGV[i + 3], ARGV[i + 12] == '1')
      release(base, body)
      result[#result + 1], settled = 1, settled + 1
    end
  end
end
-- Last, because a script that has written once is not stopped any more when memory runs out.
return settled < #result and read_only(KEYS[1], group) or result

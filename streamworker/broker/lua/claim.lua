-- claim: read new entries from streams in the order given, never more than asked for. A stream that cannot be read (no
-- group, wrong type) is reported, and the others are read all the same. A queue is skipped while its meta hash has the
-- field "paused" (set by an operator) or "inactive" (set by the relay: is_active is false in PostgreSQL).
--
-- KEYS[1..Q]    meta hash of each queue
-- KEYS[Q+1..]   the streams, three a queue: high, normal, low
-- ARGV[1]       group
-- ARGV[2]       consumer
-- ARGV[3]       most entries to take
-- ARGV[4]       Q, number of queues
-- ARGV[5]       B, number of budgets
-- ARGV[6..]     Q allowances: most entries to take of each queue; -N shares that of the Nth one
-- then          B budgets: most entries to take on each budget
-- then          the walk, three numbers a step: index of the stream in KEYS, of its queue, of its budget
--
-- returns { taken, trouble, paused, epochs, cancelled, secrets, fair }
--   taken    { index of the stream in KEYS, value that ids are derived from, entries } ...; entries are flat: the id of each,
--            then its document (nil: it has no field "job"), which costs server and worker less than nesting
--   trouble  { index of the stream in KEYS, error } ...
--   paused   indexes of queues
--   epochs   value that ids are derived from, three a queue: high, normal, low ("": not said yet)
--   cancelled  indexes of queues with jobs that were cancelled and have not ended yet
--   secrets  secret of each queue ("": nothing yet)
--   fair     indexes of queues with jobs in tenants' lines, see `pull`
local group, consumer, left = ARGV[1], ARGV[2], tonumber(ARGV[3])
local queues, budgets = tonumber(ARGV[4]), tonumber(ARGV[5])
local allowance, shares, derived, budget = {}, {}, {}, {}
local taken, trouble, paused, cancelled, secrets, fair = {}, {}, {}, {}, {}, {}

for q = 1, queues do
  local meta = redis.pcall('HMGET', KEYS[q], 'paused', 'epoch', 'inactive', 'cancelled', 'secret', 'id:1', 'id:2', 'id:3', 'fair')
  secrets[q] = not meta.err and meta[5] or ''
  allowance[q] = tonumber(ARGV[5 + q])
  shares[q] = allowance[q] < 0 and -allowance[q] or q
  if meta.err then
    trouble[#trouble + 1] = { q, meta.err }
    shares[q] = nil
  else
    for level = 1, 3 do derived[queues + 3 * (q - 1) + level] = meta[2] and meta[5 + level] end
    if meta[4] then cancelled[#cancelled + 1] = q end
    if meta[9] then fair[#fair + 1] = q end
    if meta[1] or meta[3] then
      paused[#paused + 1] = q
      shares[q] = nil
    end
  end
end
for b = 1, budgets do budget[b] = tonumber(ARGV[5 + queues + b]) end

-- The document among the fields of an entry; false if there is none.
local function document(fields)
  for f = 1, #fields, 2 do
    if fields[f] == 'job' then return fields[f + 1] end
  end
  return false
end

local broken = {}
for i = 6 + queues + budgets, #ARGV, 3 do
  local stream, q, b = tonumber(ARGV[i]), tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local own = shares[q]
  local count = own and math.min(left, allowance[own], budget[b]) or 0
  if count > 0 and not broken[stream] then
    local reply
    if derived[stream] then
      reply = redis.pcall('XREADGROUP', 'GROUP', group, consumer, 'COUNT', count, 'STREAMS', KEYS[stream], '>')
    else
      reply = { err = 'NOGROUP the queue has no epoch yet' }
    end
    if reply and reply.err then
      trouble[#trouble + 1] = { stream, reply.err }
      broken[stream] = true
    elseif reply and reply[1] then
      local entries, flat = reply[1][2], {}
      for n = 1, #entries do
        flat[2 * n - 1], flat[2 * n] = entries[n][1], document(entries[n][2])
      end
      taken[#taken + 1] = { stream, derived[stream], flat }
      left, allowance[own], budget[b] = left - #entries, allowance[own] - #entries, budget[b] - #entries
      if left <= 0 then break end
    end
  end
end
local epochs = {}
for k = queues + 1, 4 * queues do epochs[k - queues] = derived[k] or '' end
return { taken, trouble, paused, epochs, cancelled, secrets, fair }

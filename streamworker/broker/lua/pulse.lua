-- pulse: what tells a relay whether the server lost jobs, and which queues the ledger pauses.
--
-- KEYS  meta hash of each queue
--
-- returns { ms since the epoch, the server's run id ("": not told), one triple a queue: { its epoch ("": none), entries
--           that relays added, 1 if the ledger pauses it } ... }
local info = redis.pcall('INFO', 'server')
local server = type(info) == 'string' and string.match(info, 'run_id:(%x+)') or ''
local result = { now_ms(), server }
for k = 1, #KEYS do
  local meta = redis.pcall('HMGET', KEYS[k], 'epoch', 'relayed', 'inactive')
  if meta.err then meta = {} end
  result[#result + 1] = { meta[1] or '', tonumber(meta[2] or 0), meta[3] and 1 or 0 }
end
return result

-- flow: number of entries that ever left a queue's streams. It only grows, so that two readings give a rate.
--
-- KEYS  streams
--
-- returns the number, or -1 if this server does not count (before Redis 7)
local left = 0
for _, stream in ipairs(KEYS) do
  local info = redis.pcall('XINFO', 'STREAM', stream)
  if not info.err then
    local field = {}
    for f = 1, #info, 2 do field[info[f]] = info[f + 1] end
    if not field['entries-added'] then return -1 end
    left = left + field['entries-added'] - field['length']
  end
end
return left

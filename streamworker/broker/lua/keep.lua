-- keep: renew all leases of a worker that is alive and cannot renew by itself, each only if it has not expired. A claim
-- that another worker has taken over is not among the consumer's pending entries.
--
-- KEYS[1]  stream
-- ARGV[1]  group
-- ARGV[2]  consumer
-- ARGV[3]  its lease in ms
--
-- returns the number of leases that were prolonged
local MOST, PAGE = 20, 1000 -- pages of entries
local from, kept = '-', 0
for _ = 1, MOST do
  local rows = redis.pcall('XPENDING', KEYS[1], ARGV[1], from, '+', PAGE, ARGV[2])
  if rows.err then
    return no_group(rows.err) and kept or redis.error_reply(rows.err)
  end
  local ids = {}
  for _, row in ipairs(rows) do
    if row[3] < tonumber(ARGV[3]) then ids[#ids + 1] = row[1] end
    from = '(' .. row[1]
  end
  if #ids > 0 then
    kept = kept + #ids
    ids[#ids + 1] = 'JUSTID'
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(ids))
  end
  if #rows < PAGE then break end
end
return kept

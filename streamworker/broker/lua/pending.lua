-- pending: one page of a group's pending entries with their documents, for operators. Reads only; every entry of the page
-- is read, whether it matches or not, so that one call costs the same however few match.
--
-- KEYS[1]  stream
-- ARGV[1]  group
-- ARGV[2]  first entry id, or "(" and the cursor: id to go on after
-- ARGV[3]  last entry id
-- ARGV[4]  entries to look at
-- ARGV[5]  ms an entry must have been idle
-- ARGV[6]  consumer ("": any)
--
-- returns { cursor: id to go on after (false: that was all), rows }
--   rows   { id, consumer, ms idle, delivery count, fields (false: deleted) } ...
local reply
if ARGV[6] == '' then
  reply = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4])
else
  reply = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[6])
end
if reply.err then
  if string.sub(reply.err, 1, 7) == 'NOGROUP' then return { false, {} } end
  return reply
end
local rows = {}
for _, pending in ipairs(reply) do
  if pending[3] >= tonumber(ARGV[5]) then
    local entry = redis.call('XRANGE', KEYS[1], pending[1], pending[1])[1]
    rows[#rows + 1] = { pending[1], pending[2], pending[3], pending[4], entry and entry[2] or false }
  end
end
return { #reply == tonumber(ARGV[4]) and reply[#reply][1], rows }

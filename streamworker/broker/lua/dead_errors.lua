-- dead_errors: why jobs of a queue are dead letters, oldest first, without their documents.
--
-- KEYS[1]  dead letters of the queue
-- ARGV[1]  entry id behind which they begin ("": the first)
-- ARGV[2]  most entries
-- ARGV[3]  bytes of an error: its last ones
-- ARGV[4]  1 if entry ids are enough
--
-- returns { entry id, kind, reason, error, … }, or { entry id, … }
local answer = {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[1] == '' and '-' or '(' .. ARGV[1], '+', 'COUNT', ARGV[2])) do
  answer[#answer + 1] = entry[1]
  if ARGV[4] ~= '1' then
    local known = {}
    for f = 1, #entry[2], 2 do known[entry[2][f]] = entry[2][f + 1] end
    answer[#answer + 1] = known.kind or ''
    answer[#answer + 1] = known.reason or ''
    answer[#answer + 1] = string.sub(known.error or '', -tonumber(ARGV[3]))
  end
end
return answer

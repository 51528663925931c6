-- fair_take: what `list_take` does, in a claim from queues of which some have jobs in tenants' lines: these are filled up before, and
-- primed after it, so that idle workers find a ready job as long as there is one in a line.
--
-- KEYS     as `list_take` takes them: the meta hashes of the queues first
-- ARGV[1..]  as `list_take` takes them
--
-- returns what `list_take` returns
for q = 1, tonumber(ARGV[3]) do
  if redis.pcall('HGET', KEYS[q], 'fair') == '1' then fill('list', KEYS[q], tonumber(ARGV[2])) end
end
local reply = inner(KEYS, ARGV)
for q = 1, tonumber(ARGV[3]) do
  if redis.pcall('HGET', KEYS[q], 'fair') == '1' then fill('list', KEYS[q], 0) end
end
return reply

-- fair_claim: what `claim` does, in a claim from queues of which some have jobs in tenants' lines: these are filled up before, and
-- primed after it, so that idle workers find a ready job as long as there is one in a line.
--
-- KEYS     as `claim` takes them: the meta hashes of the queues first
-- ARGV[1..]  as `claim` takes them
--
-- returns what `claim` returns
for q = 1, tonumber(ARGV[4]) do
  if redis.pcall('HGET', KEYS[q], 'fair') == '1' then fill('stream', KEYS[q], tonumber(ARGV[3])) end
end
local reply = inner(KEYS, ARGV)
for q = 1, tonumber(ARGV[4]) do
  if redis.pcall('HGET', KEYS[q], 'fair') == '1' then fill('stream', KEYS[q], 0) end
end
return reply

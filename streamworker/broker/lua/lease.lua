-- lease: store the lease of a worker, or delete it. Reclaiming judges each claim by the lease of the worker that holds
-- it. The field "leases" of the meta hash has a line "NAME MS" for each worker.
--
-- KEYS[1]  meta hash of the queue
-- ARGV[1]  worker id
-- ARGV[2]  its lease in ms; 0 forgets it
--
-- returns 1 changed, 0 it was so already, or there is no memory for it
local before = redis.call('HGET', KEYS[1], 'leases') or ''
local line = ARGV[1] .. ' ' .. ARGV[2] .. '\n'
local lines, found = {}, false
for name, ms in string.gmatch(before, '(%S+) (%d+)\n') do
  if name ~= ARGV[1] then lines[#lines + 1] = name .. ' ' .. ms .. '\n' else found = ms == ARGV[2] end
end
if found then return 0 end
if ARGV[2] ~= '0' then lines[#lines + 1] = line end
local after = table.concat(lines)
if after == before then return 0 end
if after == '' then return redis.call('HDEL', KEYS[1], 'leases') end
local reply = redis.pcall('HSET', KEYS[1], 'leases', after)
return failed(reply) and 0 or 1

-- stay: which keys a partition still holds, that belong to another one since its queue has more partitions. It takes none of the
-- others any more, see `resize`.
--
-- KEYS[1]    hash of the order keys of the partition
-- KEYS[2..]  deduplication keys
-- ARGV[1]    the numbers of partitions, as text
-- ARGV[2..]  order keys
--
-- returns 1 or 0 for each order key, then for each deduplication key
local known = redis.call('HGET', KEYS[1], '') or ''
local last, wanted = tonumber(string.match(known, '%d+$') or 0), tonumber(string.match(ARGV[1], '%d+$'))
if wanted > last then redis.call('HSET', KEYS[1], '', ARGV[1]) end
local found = {}
for i = 2, #ARGV do found[i - 1] = redis.call('HEXISTS', KEYS[1], ARGV[i]) end
for k = 2, #KEYS do found[#found + 1] = redis.call('EXISTS', KEYS[k]) end
return found

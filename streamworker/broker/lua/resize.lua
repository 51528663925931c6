-- resize: a partition learns the numbers of partitions that its queue has had; the last one is that of today, and only rises.
-- From then on no order key is taken here that belongs to another partition, but by jobs behind one that holds it.
--
-- KEYS[1]    hash of the order keys of the partition
-- KEYS[2..]  of the first partition: keys of which a queue that is in use has some
-- ARGV[1]    the numbers, as text
--
-- returns the numbers, as text
local known = redis.call('HGET', KEYS[1], '')
if not known and KEYS[2] and redis.call('EXISTS', KEYS[1], unpack(KEYS, 2)) > 0 then known = '1' end
local last, wanted = tonumber(string.match(known or '', '%d+$') or 0), tonumber(string.match(ARGV[1], '%d+$'))
if wanted > last then
  known = known and KEYS[2] and known .. ' ' .. ARGV[1] or ARGV[1]
  redis.call('HSET', KEYS[1], '', known)
end
return known

-- replay: put a dead letter back on its queue, once: whoever comes second finds no letter.
--
-- KEYS[1]  dead stream
-- KEYS[2]  where the ready jobs of its level lie
-- KEYS[3]  where it is kept how its job ended
-- ARGV[1]  id of the dead letter
-- ARGV[2]  body
-- ARGV[3]  what ready jobs lie in: stream or list
--
-- returns 1 moved, 0 the letter is gone
if not redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1] then return 0 end
if ARGV[3] == 'list' then
  redis.call('LPUSH', KEYS[2], ARGV[2])
else
  redis.call('XADD', KEYS[2], '*', 'job', ARGV[2])
end
redis.call('XDEL', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[3])
return 1

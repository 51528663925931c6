-- replay: put a dead letter back on its stream, once: whoever comes second finds no letter.
--
-- KEYS[1]  dead stream
-- KEYS[2]  stream the job goes to
-- ARGV[1]  id of the dead letter
-- ARGV[2]  body
--
-- returns 1 moved, 0 the letter is gone
if not redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1] then return 0 end
redis.call('XADD', KEYS[2], '*', 'job', ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[1])
return 1

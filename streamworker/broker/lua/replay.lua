-- replay: put a dead letter back on its queue, or into its lines, once: a second call finds no letter.
--
-- KEYS[1]  dead stream
-- KEYS[2]  ready jobs of its level
-- KEYS[3]  where it is kept how its job ended
-- ARGV[1]  id of the dead letter
-- ARGV[2]  body
-- ARGV[3]  type of the ready keys: stream or list
--
-- returns 1 moved, 0 the letter is gone
if not redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1] then return 0 end
local reply = enter(ARGV[3], base_of(KEYS[1]), level_of(KEYS[2]), ARGV[2], 'line')
if failed(reply) then return reply end
redis.call('XDEL', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[3])
return 1

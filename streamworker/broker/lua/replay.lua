-- replay: put a dead letter back on its queue, or into its lines, once: a second call finds no letter. A deduplication key
-- that is held until its job ends is taken again; while another job has it, nothing changes.
--
-- KEYS[1]  dead stream
-- KEYS[2]  ready jobs of its level
-- KEYS[3]  where it is kept how its job ended
-- KEYS[4..] deduplication key that it takes, if there is one
-- ARGV[1]  id of the dead letter
-- ARGV[2]  body
-- ARGV[3]  type of the ready keys: stream or list
-- ARGV[4]  id of the job, if there is such a key
-- ARGV[5]  ms for which it is held at most
--
-- returns 1 moved, 0 the letter is gone, -1 another job has the key
if not redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1] then return 0 end
if KEYS[4] then
  local holder = redis.call('GET', KEYS[4])
  if holder and holder ~= ARGV[4] then return -1 end
  redis.call('SET', KEYS[4], ARGV[4], 'PX', ARGV[5])
end
local reply = enter(ARGV[3], base_of(KEYS[1]), level_of(KEYS[2]), ARGV[2], 'line')
if failed(reply) then return reply end
redis.call('XDEL', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[3])
return 1

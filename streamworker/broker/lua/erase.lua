-- erase: delete a dead letter for good. The deduplication key of its job is deleted too, unless another job has it by
-- now, an order key that it halts is passed on, and its stored payload is noted.
--
-- KEYS[1]  dead stream
-- KEYS[2..] deduplication key of the job, if it has one
-- ARGV[1]  id of the dead letter
-- ARGV[2]  type of the ready keys: stream or list
-- ARGV[3]  id of the job, if it has such a key
--
-- returns 1 deleted, 0 the letter is gone
local letter = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
local gone = redis.call('XDEL', KEYS[1], ARGV[1])
if gone == 1 and KEYS[2] then let_go(KEYS[2], ARGV[3]) end
if gone == 1 and letter then
  unstore(base_of(KEYS[1]), job_in(letter[2]), nil, field_of(letter[2], 'id'))
  unhalt(ARGV[2], base_of(KEYS[1]), job_in(letter[2]))
end
return gone

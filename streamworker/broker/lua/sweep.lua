-- sweep: pass order keys on whose jobs are nowhere: deleted by hand, lost with a worker that popped, or ended by a version that
-- knew no order. The caller has looked for the jobs everywhere.
--
-- KEYS[1]  meta hash of the queue; all its other keys start like it
-- ARGV[1]  type of the ready keys: stream or list
-- ARGV[2..] two a key: the order key, the job that was not found, or was cancelled while it waited in the ledger
--
-- returns the number of keys that were passed on; the jobs in lines are counted anew, unless they are of very many keys
local base, healed, waiting = base_of(KEYS[1]), 0, 0
if redis.call('SCARD', base .. ':lines') <= 5000 then -- the number is lost with the meta hash, and the lines are not
  for _, order in ipairs(redis.call('SMEMBERS', base .. ':lines')) do
    waiting = waiting + redis.call('LLEN', base .. ':order:' .. order)
  end
  redis.call('HSET', base .. ':meta', 'waiting', waiting)
end
for i = 2, #ARGV, 2 do
  if redis.call('HGET', base .. ':order', ARGV[i]) == ARGV[i + 1] then
    redis.call('HDEL', base .. ':halted', ARGV[i])
    pass_on(ARGV[1], base, { ARGV[i] }, { ARGV[i + 1] })
    healed = healed + 1
  end
end
return healed

-- depart: the next job of an order key that moves to another partition. A job leaves when it is stored there (see `arrive`), and
-- the key with the last one. Its token is a number that is never used again, so that two workers that move one job store it
-- once, and the number of partitions by which it moves.
--
-- KEYS[1]  meta hash of the partition; all its other keys start like it
-- ARGV[1]  the order key
-- ARGV[2]  token of the job that is stored in the other partition now ("": none)
--
-- returns { token, element of the line } of the next job, false if there is none
local base, order = base_of(KEYS[1]), ARGV[1]
local token = redis.call('HGET', base .. ':moving', order)
if not token then return false end
if token == ARGV[2] then
  redis.call('LPOP', base .. ':order:' .. order)
  redis.call('HINCRBY', base .. ':meta', 'waiting', -1)
  local number, count = string.match(token, '^(%d+) (%d+)$')
  token = string.format('%d %s', number + 1, count)
  redis.call('HSET', base .. ':moving', order, token)
end
local moves = redis.call('HGET', base .. ':order', order) == ''
local first = moves and redis.call('LINDEX', base .. ':order:' .. order, 0)
if first then return { token, first } end
if moves then redis.call('HDEL', base .. ':order', order) end
redis.call('HDEL', base .. ':moving', order)
if redis.call('EXISTS', base .. ':order:' .. order) == 0 then redis.call('SREM', base .. ':lines', order) end
return false

-- secret: the secret that seals a queue's state of jobs (streamworker/codec.py), made if there is none yet. Behind it
-- stands the moment at which it was made if earlier versions had worked on the queue before, else 0: for a while after
-- that moment their unsealed state is believed.
--
-- KEYS[1]  meta hash of the queue
-- ARGV[1]  random hexadecimal digits, taken if there is no secret yet
--
-- returns the secret as "DIGITS MS"; empty where none can be stored
local known = redis.pcall('HGET', KEYS[1], 'secret')
if type(known) == 'table' then return '' end -- a key of another type: reading it reports that
if known then return known end
local met = redis.call('HGET', KEYS[1], 'epoch') and now_ms() or 0
local made = ARGV[1] .. ' ' .. string.format('%d', met)
local reply = redis.pcall('HSET', KEYS[1], 'secret', made)
if failed(reply) then return '' end
return made

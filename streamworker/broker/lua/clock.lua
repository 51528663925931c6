-- clock: what the server's clock shows.
--
-- KEYS  meta hash of a queue, so that in a cluster the server of that queue answers
--
-- returns ms since the epoch
local time = redis.call('TIME')
return time[1] * 1000 + math.floor(time[2] / 1000)

-- clock: the server's clock.
--
-- KEYS  meta hash of a queue, so that in a cluster the server of that queue answers
--
-- returns ms since the epoch
return now_ms()

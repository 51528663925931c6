-- pull: move jobs from the lines of a queue's tenants to its ready keys, each time that of the tenant whose turn it is.
--
-- KEYS[1]  meta hash of the queue; all its other keys start like it
-- ARGV[1]  type of the ready keys: stream or list
-- ARGV[2]  most jobs that the worker is about to claim
--
-- returns the number of jobs that still wait in lines; at 0 the field "fair" of the meta hash is deleted
return fill(ARGV[1], KEYS[1], tonumber(ARGV[2]))

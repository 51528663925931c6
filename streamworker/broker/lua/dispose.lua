-- dispose: note the stored payload of a job that has ended without a script that deletes its document: in the ledger, or as a
-- claim that an operator dropped.
--
-- KEYS[1]  sorted set of the queue: stored payloads whose jobs have ended, with the ms at which they did
-- ARGV[1]  id of the job
-- ARGV[2]  its document
--
-- returns 1
unstore(base_of(KEYS[1]), ARGV[2], nil, ARGV[1])
return 1

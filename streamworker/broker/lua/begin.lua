-- begin: jobs with deduplication keys are about to start: from now on none of them can be replaced, and a key that is held
-- until its job starts is free. A job that was cancelled meanwhile, or replaced, must not start.
--
-- KEYS[1]   cancelled set of the queue
-- KEYS[2..] two a job: its deduplication key, its mark (it has not started yet)
-- ARGV      two a job: job id, 1 if its key is free now
--
-- returns one number a job: 1 it starts, 0 it was cancelled
local now, result = now_ms(), {}
for i = 1, #ARGV, 2 do
  local till = redis.pcall('ZSCORE', KEYS[1], ARGV[i])
  if type(till) == 'string' and tonumber(till) > now then
    result[#result + 1] = 0
  else
    redis.call('DEL', KEYS[i + 2])
    if ARGV[i + 1] == '1' then let_go(KEYS[i + 1], ARGV[i]) end
    result[#result + 1] = 1
  end
end
return result

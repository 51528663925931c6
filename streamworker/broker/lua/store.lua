-- store: put new jobs of one queue behind the others of their levels: what `publish` does, for jobs without a delay or a
-- deduplication key, which are nearly all.
--
-- KEYS[1..3]  keys of ready jobs: high, normal, low
-- ARGV[1]     type of the ready keys: stream or list
-- ARGV[2..4]  how many jobs of each level follow
-- ARGV[5..]   bodies, level by level
--
-- returns 1
local n = 4
for level = 1, 3 do
  for _ = 1, tonumber(ARGV[level + 1]) do
    n = n + 1
    if ARGV[1] == 'list' then
      redis.call('LPUSH', KEYS[level], ARGV[n])
    else
      redis.call('XADD', KEYS[level], '*', 'job', ARGV[n])
    end
  end
end
return 1

-- done_in_order: what `done` does, for jobs with order keys, which are passed on: the next job of each key is ready.
--
-- KEYS[1..]  as `done` takes them: the stream, the meta hash of the queue
-- ARGV[1]    N, number of claims
-- ARGV[2..]  N order keys, then N job ids ("": the job waits in the ledger, and keeps its key: it halts until the job is back)
-- then       as `done` takes them
--
-- returns what `done` returns
local count = tonumber(ARGV[1])
local reply = inner(KEYS, { unpack(ARGV, 2 + 2 * count) })
if reply.err then return reply end
local lost, orders, ids = {}, {}, {}
for n = 2, #reply do lost[reply[n]] = true end
for n = 1, count do
  if not lost[n] and ARGV[1 + count + n] == '' then
    keep_order(base_of(KEYS[2]), ARGV[1 + n])
  elseif not lost[n] then
    orders[#orders + 1], ids[#ids + 1] = ARGV[1 + n], ARGV[1 + count + n]
  end
end
if orders[1] then pass_on('stream', base_of(KEYS[2]), orders, ids) end
return reply

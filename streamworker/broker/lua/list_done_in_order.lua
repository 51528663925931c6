-- list_done_in_order: what `list_done` does, for jobs with order keys, which are passed on: the next job of each key is ready.
--
-- KEYS[1..]  as `list_done` takes them: claimed list, lease set, meta hash of the queue
-- ARGV[1]    N, number of claims
-- ARGV[2..]  N order keys, then N job ids ("": the job waits in the ledger, and keeps its key: it halts until the job is back)
-- then       as `list_done` takes them
--
-- returns what `list_done` returns
local count = tonumber(ARGV[1])
local reply, orders, ids = inner(KEYS, { unpack(ARGV, 2 + 2 * count) }), {}, {}
for n = 1, count do
  if reply[n] == 1 and ARGV[1 + count + n] == '' then
    keep_order(base_of(KEYS[3]), ARGV[1 + n])
  elseif reply[n] == 1 then
    orders[#orders + 1], ids[#ids + 1] = ARGV[1 + n], ARGV[1 + count + n]
  end
end
if orders[1] then pass_on('list', base_of(KEYS[3]), orders, ids) end
return reply

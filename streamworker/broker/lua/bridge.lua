-- bridge: move elements of lists to the streams of the same level: from the right end, the oldest first, byte for byte.
-- The growing write comes first: where it fails, the element and those behind it stay in the list. One call moves a
-- bounded batch, so that it never blocks the server for long.
--
-- KEYS     two a lane: list, stream
-- ARGV[1]  most elements to move
-- ARGV[2]  bytes after which no further element is moved
--
-- returns one quadruple a lane: { elements moved, their bytes, elements left (-1: unknown), the error of a key that refused
--   ("": none) }
local count, bytes_left = tonumber(ARGV[1]), tonumber(ARGV[2])

local function move(k)
  -- Take none first: a script that may not take must not add. And a script that has written may go on writing out of memory:
  -- moving does not grow, and workers of streams cannot free memory by working off jobs that stay in lists.
  local none = redis.pcall('RPOP', KEYS[k], 0)
  if failed(none) then return { 0, 0, -1, none.err } end
  local moved, bytes, refused = 0, 0, ''
  while count > 0 and bytes_left > 0 do
    local element = redis.call('LINDEX', KEYS[k], -1)
    if not element then break end
    local added = redis.pcall('XADD', KEYS[k + 1], '*', 'job', element)
    if failed(added) then
      refused = added.err
      break
    end
    redis.call('RPOP', KEYS[k])
    moved, bytes, count, bytes_left = moved + 1, bytes + #element, count - 1, bytes_left - #element
  end
  return { moved, bytes, redis.call('LLEN', KEYS[k]), refused }
end

local result = {}
for k = 1, #KEYS, 2 do result[#result + 1] = move(k) end
return result

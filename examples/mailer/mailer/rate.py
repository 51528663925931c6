"""How fast one domain is mailed, over all workers: every mail gets a turn, and holds it until the turn has come.

A mail whose turn is some time away is snoozed exactly until then and comes back to the turn it holds. Without that, a
thousand waiting mails would wake each second to fight for ten turns.
"""

from __future__ import annotations

from typing import Any, Final

_TURN: Final = """
-- KEYS  1 when the domain's next free turn is (ms)   2 the turn this mail holds (ms)
-- ARGV  1 ms between two turns
-- returns ms until this mail's turn; 0: now, and the turn is used up
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local turn = tonumber(redis.call('GET', KEYS[2]) or '')
if turn and turn < now - 10000 then turn = nil end  -- missed, as many are after an outage: they must not all go at once
if not turn then
  turn = math.max(now, tonumber(redis.call('GET', KEYS[1]) or '0'))
  local next = turn + ARGV[1]
  redis.call('SET', KEYS[1], string.format('%.3f', next), 'PX', string.format('%.0f', next - now + 1000))
end
if turn <= now then redis.call('DEL', KEYS[2]) return 0 end
redis.call('SET', KEYS[2], string.format('%.0f', turn), 'PX', string.format('%.0f', turn - now + 60000))
return math.ceil(turn - now)
"""


async def wait_for_turn(redis: Any, domain: str, mail: str, per_second: float) -> float:
    """Seconds until ``mail`` may go to ``domain``; 0 means now.

    Args:
        redis: ``ctx.redis``.
        domain: the recipient's.
        mail: what holds the turn, such as a delivery's id.
        per_second: mails a second.
    """
    keys = (f"mailer:{{{domain}}}:next", f"mailer:{{{domain}}}:turn:{mail}")
    return float(await redis.eval(_TURN, len(keys), *keys, str(1000 / per_second))) / 1000

"""Witnesses on the server: scripts that move claims also write down, in the same atomic step, who held what.

Every settling script and the renewal are wrapped. Before the original runs, the owner and delivery count of each claim
are read from the pending list; afterwards "script entry claimed-by claimed-count true-owner true-count result" is
pushed to ``queue:crash:witness``. Whatever the scripts believe, the list tells what was so.
"""

from __future__ import annotations

from hashlib import sha1
from typing import Any, Final

from streamworker.broker import scripts

LIST: Final = "queue:crash:witness"
"""Under a prefix that looks like a key of ours; it is on the same server so that it shares the scripts' atomicity."""

_WRAP: Final = """
local function original() %(text)s
end
local function held(id)
  local reply = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  local pending = not reply.err and reply[1]
  return pending and (pending[2] .. ' ' .. pending[4]) or '- 0'
end
local before = {}
for i = %(first)d, #ARGV, %(step)d do
  before[#before + 1] = held(ARGV[i + %(entry)d])
end
local result = original()
if type(result) == 'table' and result.err then return result end
local n = 0
for i = %(first)d, #ARGV, %(step)d do
  n = n + 1
  local id, count = ARGV[i + %(entry)d], ARGV[i + %(entry)d + 1]
  local who = %(who)s
  local outcome = %(outcome)s
  if outcome then
    redis.pcall('RPUSH', '%(list)s', table.concat({ '%(name)s', KEYS[1], id, who, count, before[n], outcome }, ' '))
  end
end
return result
"""
# A renewal is worth a line only if it changed the owner or the count.
_RENEWED: Final = "(before[n] ~= held(id)) and held(id) or nil"
_SHAPES: Final[dict[str, dict[str, Any]]] = {
    "DONE": {"first": 3, "step": 2, "entry": 0, "who": "ARGV[2]", "outcome": "tostring(result[n])"},
    "PARK": {"first": 2, "step": 6, "entry": 1, "who": "ARGV[i]", "outcome": "tostring(result[n])"},
    "BURY": {"first": 2, "step": 10, "entry": 1, "who": "ARGV[i]", "outcome": "tostring(result[n])"},
    "RENEW": {"first": 3, "step": 2, "entry": 0, "who": "ARGV[2]", "outcome": _RENEWED},
}


def install() -> None:
    """Replace the scripts' texts in this process."""
    for name, shape in _SHAPES.items():
        script = getattr(scripts, name)
        text = _WRAP % {**shape, "text": script.text, "name": name.lower(), "list": LIST}
        script.text, script.sha = text, sha1(text.encode(), usedforsecurity=False).hexdigest()

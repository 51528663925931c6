"""Witnesses on the server: scripts that move claims also write down, in the same atomic step, who held what.

Every settling script, the renewal and the sweep are wrapped. Before the original runs, the owner and delivery count of each claim
are read from the pending list; afterwards "script entry claimed-by claimed-count true-owner true-count result" is
pushed to a list. Whatever the scripts believe, the list tells what was so.
"""

from __future__ import annotations

import re
from hashlib import sha1
from typing import Any, Final

from streamworker import results
from streamworker.broker import scripts
from tests.crash.ground import MODE, WITNESSES

_WRAP: Final = """
local function original() %(text)s
end
local function held(id)
  local reply = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  local pending = not reply.err and reply[1]
  return pending and (pending[2] .. ' ' .. pending[4]) or '- 0'
end
local before = {}
for i = %(first)s, #ARGV, %(step)s do
  before[#before + 1] = held(ARGV[i + %(entry)d])
end
local result = original()
if type(result) == 'table' and result.err then return result end
local n, named = 0, {}
for k = 2, type(result) == 'table' and #result or 0 do named[result[k]] = true end
for i = %(first)s, #ARGV, %(step)s do
  n = n + 1
  local id, count = ARGV[i + %(entry)d], %(count)s
  local who = %(who)s
  local outcome = %(outcome)s
  if outcome then
    redis.pcall('RPUSH', '%(list)s', table.concat({ %(name)s, KEYS[1], id, who, count, before[n], outcome }, ' '))
  end
end
return result
"""
# What a sweep took over or reserved: until it ends, whoever dies with it delays it by another lease.
_SWEEP: Final = """
local function original() %(text)s
end
local result = original()
if type(result) == 'table' and not result.err then
  for _, taken in ipairs(result[2]) do
    redis.pcall('RPUSH', '%(list)s', table.concat({ 'sweep', KEYS[taken[1]], taken[2], ARGV[2], taken[3], ARGV[2], taken[3] }, ' '))
  end
end
return result
"""
# A renewal is worth a line only if it changed the owner or the count.
_RENEWED: Final = "(before[n] ~= held(id)) and held(id) or nil"
# What is finished was done, unless its note says that it was cancelled or has expired; a job that expired may never have run.
_FINISHED: Final = f"""(ARGV[i + 4] == '{results.CANCELLED.decode()}' and 'drop'
  or string.find(ARGV[i + 4], '"expired"', 1, true) and 'expired:' .. ARGV[i + 2] or 'done')"""
_SHAPES: Final[dict[str, dict[str, Any]]] = {
    # One delivery count for all claims, or one behind each; the claims that are lost are named by their numbers.
    "DONE": {
        "entry": 0,
        "count": "ARGV[3] ~= '' and ARGV[3] or ARGV[i + 1]",
        "who": "ARGV[2]",
        "outcome": "named[n] and '0' or '1'",
    },
    "FINISH": {"name": _FINISHED, "entry": 0, "who": "ARGV[2]", "outcome": "tostring(result[n])"},
    "PARK": {"entry": 1, "who": "ARGV[i]", "outcome": "tostring(result[n])"},
    "BURY": {"entry": 1, "who": "ARGV[i]", "outcome": "tostring(result[n])"},
    "RENEW": {"entry": 0, "who": "ARGV[2]", "outcome": _RENEWED},
}


# In list mode the truth is what lies in the workers' lists, all of them: who has an id, and how often it was delivered.
_LIST_WRAP: Final = """
local function original() %(text)s
end
local function holders()
  local found = {}
  for _, name in ipairs(redis.call('KEYS', 'queue:q*:claimed:*')) do
    for _, wrapper in ipairs(redis.call('LRANGE', name, 0, -1)) do
      local id, count = string.match(wrapper, '^(%%S+) (%%d+) ')
      if id then found[id] = string.match(name, ':claimed:(.*)$') .. ' ' .. count end
    end
  end
  return found
end
local before = holders()
local result = original()
if type(result) == 'table' and result.err then return result end
%(after)s
return result
"""
_LIST_SETTLED: Final = """
local n = 0
for i = %(first)s, #ARGV, %(step)s do
  n = n + 1
  local id, count, who = string.match(ARGV[i], '^(%%S+) (%%d+) (.*)$')
  local level = string.match(ARGV[i + 1], '^%%S+ %%d+ (%%a+)')
  if level then -- what was popped lies nowhere
    local home = string.match(KEYS[1], '^(queue:[^:]+):')
    local place = level == 'normal' and home or home .. ':' .. level
    local line = { %(name)s, place, id, who, count, before[id] or '- 0', tostring(result[n]) }
    redis.pcall('RPUSH', '%(list)s', table.concat(line, ' '))
  end
end
"""
_LIST_RENEWED: Final = """
local now = holders()
for i = 3, #ARGV do
  local id, count, who = string.match(ARGV[i], '^(%%S+) (%%d+) (.*)$')
  if before[id] ~= now[id] then
    redis.pcall('RPUSH', '%(list)s', table.concat({ 'renew', string.match(KEYS[2], '^(queue:[^:]+):'), id, who, count, before[id] or '- 0', now[id] or '' }, ' '))
  end
end
"""
_LIST_TAKEN: Final = """
if type(result) == 'table' then
  for _, each in ipairs(result[1]) do
    for _, row in ipairs(each[2]) do
      if row[2] > 1 or row[3] == 1 then
        redis.pcall('RPUSH', '%(list)s', table.concat({ 'sweep', KEYS[each[1]], row[1], ARGV[1], row[2], ARGV[1], row[2] }, ' '))
      end
    end
  end
end
"""
_LIST_SHAPES: Final[dict[str, dict[str, Any]]] = {
    "LIST_DONE": {"after": _LIST_SETTLED, "name": "'done'"},
    "LIST_FINISH": {"after": _LIST_SETTLED, "name": _FINISHED},
    "LIST_PARK": {"after": _LIST_SETTLED, "name": "'park'"},
    "LIST_BURY": {"after": _LIST_SETTLED, "name": "'bury'"},
    "LIST_RENEW": {"after": _LIST_RENEWED},
    "LIST_TAKE": {"after": _LIST_TAKEN},
    "FAIR_TAKE": {"after": _LIST_TAKEN},
}


def install() -> None:
    """Replace the scripts' texts in this process."""
    {"stream": _install_stream, "list": _install_list}[MODE]()


def _install_stream() -> None:
    for name, shape in _SHAPES.items():
        script = getattr(scripts, name)
        counted = f"ARGV[i + {shape['entry']} + 1]"
        facts = {
            "name": f"'{name.lower()}'",
            "count": counted,
            **_loop(script.text),
            **shape,
            "text": script.text,
            "list": WITNESSES,
        }
        wrapped = _WRAP % facts
        if name == "DONE":
            _replace_inner(scripts.DONE_IN_ORDER, script, wrapped)
        _replace(script, wrapped)
    _replace(scripts.RECLAIM, _SWEEP % {"text": scripts.RECLAIM.text, "list": WITNESSES})


def _install_list() -> None:
    for name, shape in _LIST_SHAPES.items():
        script = getattr(scripts, name)
        after = shape["after"] % {**_loop(script.text), **shape, "list": WITNESSES}
        wrapped = _LIST_WRAP % {"text": script.text, "after": after}
        if name == "LIST_DONE":
            _replace_inner(scripts.LIST_DONE_IN_ORDER, script, wrapped)
        _replace(script, wrapped)


def _loop(text: str) -> dict[str, str]:
    """How a script walks over its claims: the first argument of the first claim, and how many a claim has."""
    loops = re.findall(r"^for i = (\d+), #ARGV, (.+) do$", text, re.MULTILINE)
    if not loops:
        return {}
    first, step = loops[-1]
    step = step.replace("size", "tonumber(ARGV[1])").replace("step", "(tonumber(ARGV[3]) and 1 or 2)")
    return {"first": first, "step": step}


def _replace_inner(outer: Any, inner: Any, wrapped: str) -> None:
    """Wrap a script where another one calls it: there it has the keys and arguments that it has by itself."""
    text = scripts._LUA.joinpath(f"{inner.name}.lua").read_text("utf-8")
    assert outer.text.count(text) == 1
    _replace(outer, outer.text.replace(text, wrapped))


def _replace(script: Any, text: str) -> None:
    script.text, script.sha = text, sha1(text.encode(), usedforsecurity=False).hexdigest()

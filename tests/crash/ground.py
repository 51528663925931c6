"""What the harness knows of the server's keys: the only place where it does. A mode is a class here, chosen by `CRASH_MODE`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import redis

from streamworker.broker.keys import ListKeys, QueueKeys, home_name
from streamworker.job import LEVELS

QUEUE: Final = "q"
GROUP: Final = "workers"
WITNESSES: Final = "queue:crash:witness"
"""What the scripts' witnesses write down; on the same server, so that it shares the scripts' atomicity."""
MODE: Final = os.environ.get("CRASH_MODE", "stream")
PARTITIONS: Final = int(os.environ.get("CRASH_PARTITIONS", "1"))
"""Partitions of the queue: all of the suite runs with it."""
HOMES: Final = [home_name(QUEUE, number) for number in range(PARTITIONS)]


def home_of(place: str) -> str:
    """The queue or partition of a ready key."""
    return re.sub(r":(high|low)$", "", place)


_BODIES: Final = """
local function bodies(key, out)
  local kind = redis.call('TYPE', key).ok
  if kind == 'stream' then for _, e in ipairs(redis.call('XRANGE', key, '-', '+')) do out[#out + 1] = e[2][2] end
  elseif kind == 'list' then for _, v in ipairs(redis.call('LRANGE', key, 0, -1)) do out[#out + 1] = v end
  elseif kind == 'hash' and string.find(key, 'bodies') then
    for _, v in ipairs(redis.call('HVALS', key)) do out[#out + 1] = v end
  end
end
local out = {}
"""

_COUNT: Final = """
local commands, n = { stream = 'XLEN', list = 'LLEN', zset = 'ZCARD', hash = 'HLEN' }, 0
if ARGV[1] ~= '' then
  for _, key in ipairs(redis.call('KEYS', ARGV[1])) do KEYS[#KEYS + 1] = key end
end
for _, key in ipairs(KEYS) do
  local command = commands[redis.call('TYPE', key).ok]
  if command then n = n + redis.call(command, key) end
  if command == 'HLEN' then n = n - redis.call('HEXISTS', key, '') end -- numbers of partitions
end
return n
"""


class Ground:
    """Stream mode, and what both modes share.

    Args:
        client: decodes its answers.
    """

    keys: QueueKeys = QueueKeys(QUEUE)
    """Of the queue, or of its first partition."""
    homes: Sequence[QueueKeys] = [QueueKeys(home) for home in HOMES]
    elsewhere: str = ""
    """Where else jobs lie, as a pattern."""
    taking: str = "xreadgroup"
    """A command without which no worker can take a job."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    @property
    def places(self) -> list[str]:
        """Where ready jobs lie, in the order they are taken."""
        return [place for keys in self.homes for place in keys.places]

    @property
    def everything(self) -> set[str]:
        """Keys that may be there when all is done."""
        # A worker that dies right after a cancelled job leaves marks in the other partitions, which expire.
        parted = [name for keys in self.homes for name in (keys.order, keys.arrived, keys.cancelled)]
        parted = parted if PARTITIONS > 1 else []
        kept = [name for keys in self.homes for name in (keys.meta, keys.ids, keys.dead, keys.crons, keys.fair)]
        return {*self.places, *kept, *parted, WITNESSES}

    @property
    def no_more(self) -> list[str]:
        """Keys that are gone when a cancelled job is settled."""
        return [
            name for keys in self.homes for name in ((keys.dead, keys.cancelled) if PARTITIONS == 1 else (keys.dead,))
        ]

    def length(self, place: str) -> int:
        """Jobs in a place, running ones included."""
        return int(self._client.xlen(place))

    def backlog(self) -> int:
        """Jobs that are neither done nor dead."""
        # At one moment: a job that moves from one key to the next between two looks would lie nowhere.
        # Tenants' lines, too: where the ready job of a level was deleted, they wait for the next look at what is due.
        names = [*self.places, *(name for keys in self.homes for name in (keys.due, keys.order))]
        names += [keys.fair_line(level) for keys in self.homes for level in LEVELS]
        return int(self._client.eval(_COUNT, len(names), *names, self.elsewhere))

    def held(self) -> dict[str, int]:
        """How many jobs each worker id holds."""
        found: dict[str, int] = {}
        for place in self.places:
            with suppress(redis.ResponseError):
                for each in self._client.xpending(place, GROUP)["consumers"]:
                    found[each["name"]] = found.get(each["name"], 0) + each["pending"]
        return found

    def names(self) -> set[str]:
        """Worker ids that are known, holding something or not."""
        found: set[str] = set()
        for place in self.places:
            with suppress(redis.ResponseError):
                found |= {info["name"] for info in self._client.xinfo_consumers(place, GROUP)}
        return found

    def forget_groups(self, *places: str) -> None:
        """The consumer groups are deleted underneath."""
        for place in places or self.places:
            with suppress(redis.ResponseError):
                self._client.xgroup_destroy(place, GROUP)

    def delete(self, keys: Sequence[str]) -> list[str]:
        """Delete keys; returns the ids of the jobs in them."""
        script = _BODIES + "for _, key in ipairs(KEYS) do bodies(key, out) redis.call('DEL', key) end return out"
        return _ids(self._client.eval(script, len(keys), *keys))

    def flush(self) -> list[str]:
        """FLUSHALL; returns the ids of the jobs. The witness list survives, or the checker would be blind for what was."""
        script = _BODIES + (
            "local kept = redis.call('LRANGE', KEYS[1], 0, -1) redis.call('DEL', KEYS[1]) "
            "for _, key in ipairs(redis.call('KEYS', '*')) do bodies(key, out) end redis.call('FLUSHALL') "
            "for _, line in ipairs(kept) do redis.call('RPUSH', KEYS[1], line) end return out"
        )
        return _ids(self._client.eval(script, 1, WITNESSES))

    def witnesses(self) -> list[str]:
        """The witnesses' lines."""
        return list(self._client.lrange(WITNESSES, 0, -1))

    def restore(self, lines: Sequence[str]) -> None:
        """Put the witnesses' lines of before in front, after a server lost them."""
        if lines:
            self._client.lpush(WITNESSES, *reversed(lines))

    def dead_ids(self) -> list[str]:
        """Ids of the dead letters."""
        return [
            fields["id"] or json.loads(fields["job"])["id"]
            for keys in self.homes
            for _, fields in self._client.xrange(keys.dead, "-", "+")
        ]

    def all_ids(self) -> list[str]:
        """Ids of every job that lies anywhere, dead ones included."""
        script = _BODIES + "for _, key in ipairs(KEYS) do bodies(key, out) end return out"
        keys = [*self.places, *(each.bodies for each in self.homes)]
        return [*_ids(self._client.eval(script, len(keys), *keys)), *self.dead_ids()]

    def keys_left(self) -> list[str]:
        """Keys that are no part of an idle system; heartbeats included."""
        return [key for key in self._client.keys("*") if key not in self.everything and not self._ends_by_itself(key)]

    def _ends_by_itself(self, key: str) -> bool:
        """What is noted of turns and calls of limits, and how jobs ended: forgotten after a while."""
        noted = tuple(
            name for keys in self.homes for name in (f"{keys.base}:limit:", keys.result(""), keys.ended(""), keys.swept)
        )
        if key in ("stream:history", "stream:partitions") or key.startswith(
            f"{self.keys.base}:history:"
        ):  # kept for sixty days
            return True
        return key.startswith(noted) and 0 <= int(self._client.pttl(key)) < 600_000

    def state(self) -> str:
        """What the server holds, for a failing run."""
        lines = []
        with suppress(redis.RedisError):
            lines.append(", ".join(f"{place}: {self.length(place)}" for place in self.places))
            due = sum(int(self._client.zcard(keys.due)) for keys in self.homes)
            lines.append(f"due {due}, held {self.held()}, names {self.names()}")
        return "; ".join(lines)


class ListGround(Ground):
    """List mode."""

    keys: ListKeys = ListKeys(QUEUE)
    homes: Sequence[ListKeys] = [ListKeys(home) for home in HOMES]
    elsewhere = "queue:q*:claimed:*"
    taking = "llen"

    def _claims(self) -> list[tuple[str, list[str]]]:
        """(worker id, [id, delivery count, level, document]) of what is held."""
        found = []
        for name in [name for keys in self.homes for name in self._client.keys(keys.claimed("*"))]:
            worker = name.partition(":claimed:")[2]
            found += [(worker, wrapper.split(" ", 3)) for wrapper in self._client.lrange(name, 0, -1)]
        return found

    def length(self, place: str) -> int:
        """See `Ground.length`."""
        keys = next(keys for keys in self.homes if place in keys.places)
        level = place.removeprefix(keys.ready("normal")).removeprefix(":") or "normal"
        names = self._client.keys(keys.claimed("*"))
        wrappers = [wrapper.split(" ", 3) for name in names for wrapper in self._client.lrange(name, 0, -1)]
        held = sum(claim[2].removesuffix("?") == level for claim in wrappers)
        return int(self._client.llen(place)) + held

    def held(self) -> dict[str, int]:
        """See `Ground.held`."""
        found: dict[str, int] = {}
        for worker, _ in self._claims():
            found[worker] = found.get(worker, 0) + 1
        return found

    def names(self) -> set[str]:
        """See `Ground.names`: whoever holds nothing lies nowhere."""
        return set(self.held())

    def forget_groups(self, *places: str) -> None:
        """Lists have no groups; what paces the workers is deleted underneath."""
        self._client.delete(*(keys.meta for keys in self.homes))

    def all_ids(self) -> list[str]:
        """See `Ground.all_ids`."""
        return [*super().all_ids(), *_ids([claim[3] for _, claim in self._claims()])]


GROUNDS: Final[dict[str, type[Ground]]] = {"stream": Ground, "list": ListGround}


def ground(client: redis.Redis) -> Ground:
    """The ground of the mode under test."""
    return GROUNDS[MODE](client)


_HELD: Final = re.compile(r"\S+ \d+ [a-z]+\?? ")
"""What stands before the document of a job that a worker of list mode holds."""


def _ids(bodies: Sequence[str]) -> list[str]:
    found = []
    for body in bodies:
        with suppress(ValueError):
            found.append(json.loads(_HELD.sub("", body, count=1))["id"])
    return found

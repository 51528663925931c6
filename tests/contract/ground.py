"""What the brokers' contract stands on, one class a mode: what producers write, what bad luck does, what the server holds.

Tests say what happens to a job; how that looks on the server is said here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis

from streamworker.broker.claim import Options, StreamOptions
from streamworker.broker.keys import ListKeys, QueueKeys, lease_of
from streamworker.broker.lists import ListBroker
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.stream import StreamBroker
from streamworker.codec import unmarked
from streamworker.job import LEVELS, Claim, Level

GROUP = "workers"


class Ground:
    """A server in one mode."""

    mode: str

    def __init__(self, raw: redis.Redis) -> None:
        self.raw = raw

    def broker(self, url: str, queues: Any, **options: Any) -> Any:
        raise NotImplementedError

    def sweep_soon(self, broker: Any, *after: float) -> None:
        """The next claim looks for orphans, whatever the pace says; or each queue's one after so many seconds."""
        raise NotImplementedError

    def keys(self, queue: str = "q", namespace: str = "") -> Any:
        raise NotImplementedError

    def place(self, level: Level = "normal", queue: str = "q") -> str:
        return str(self.keys(queue).ready(level))

    def push(self, body: bytes | str, level: Level = "normal", queue: str = "q", *, client: Any = None) -> None:
        """What a producer of another language does; ``client`` may be a pipeline."""
        (client or self.raw).execute_command(*self.keys(queue).adding(level, body))

    def ready(self, level: Level = "normal", queue: str = "q") -> int:
        """Jobs that wait to be claimed."""
        raise NotImplementedError

    def left(self, level: Level = "normal", queue: str = "q") -> int:
        """Jobs that wait or run."""
        raise NotImplementedError

    def open_jobs(self, queue: str = "q") -> int:
        """Jobs of all levels that wait or run."""
        raise NotImplementedError

    def empty(self, queue: str = "q") -> bool:
        """No job of any level waits, runs or is parked."""
        return not any(self.left(level, queue) for level in LEVELS) and not self.raw.exists(self.keys(queue).due)

    def waiting(self, level: Level = "normal", queue: str = "q") -> list[bytes]:
        """The documents that wait to be claimed, the next one first."""
        raise NotImplementedError

    def names(self, queue: str = "q") -> list[str]:
        """Names of workers that lie on the server, heartbeats aside."""
        raise NotImplementedError

    def held(self, queue: str = "q") -> int:
        """Jobs that are claimed."""
        return sum(1 for _ in self.claims(queue))

    def claims(self, queue: str = "q") -> Iterator[tuple[bytes, bytes, int]]:
        """(entry, owner, delivery count) of what is claimed."""
        raise NotImplementedError

    def owner(self, claim: Claim) -> tuple[bytes, int] | None:
        """Who holds what a claim was made of, and how often it was delivered."""
        return self.owner_of(claim.place, claim.entry, claim.queue)

    def owner_of(self, place: str, entry: bytes, queue: str = "q") -> tuple[bytes, int] | None:
        """The same by place and entry."""
        del place  # only streams give the same entry ids
        found = [(owner, count) for each, owner, count in self.claims(queue) if each == entry]
        return found[0] if found else None

    def owners(self, keys: Iterable[tuple[str, bytes]], queue: str = "q") -> dict[tuple[str, bytes], tuple[bytes, int]]:
        """The same for many at once: those that are held."""
        found = {entry: (owner, count) for entry, owner, count in self.claims(queue)}
        return {key: found[key[1]] for key in keys if key[1] in found}

    def deliveries(self, claim: Claim) -> int | None:
        """How often it was delivered, whoever holds it now."""
        owner = self.owner(claim)
        return owner[1] if owner is not None else None

    def idle(self, claim: Claim) -> int:
        """ms since the claim was renewed."""
        raise NotImplementedError

    def hand_over(self, claim: Claim, to: str, *, count: int | None = None, idle: int = 0) -> None:
        """Give a claim to somebody else, counting no delivery unless told to."""
        raise NotImplementedError

    def ripen(self, claim: Claim, idle: int = 10_000_000, count: int | None = None) -> None:
        """Make a claim's lease run out now."""
        owner = self.owner(claim)
        assert owner is not None
        self.hand_over(claim, owner[0].decode(), count=count, idle=idle)
        self.forget_pace(claim.queue)

    def ripen_all(self, claims: Sequence[Claim], idle: int) -> None:
        """`ripen` many of one queue."""
        for claim in claims:
            self.ripen(claim, idle)

    def forget_pace(self, queue: str = "q") -> None:
        """Nobody has looked for orphans lately."""
        self.raw.hdel(self.keys(queue).meta, "sweep", "returns")

    def finish(self, claim: Claim) -> None:
        """Somebody else ended it for good."""
        raise NotImplementedError

    def blocked(self) -> list[Any]:
        """Clients that wait."""
        return [client for client in self.raw.client_list() if "b" in client["flags"]]

    def state(self, queue: str = "q") -> dict[str, Any]:
        """Everything the server holds of a queue but times, to compare before and after."""
        keys = self.keys(queue)
        return {
            "claimed": sorted(self.claims(queue)),
            "due": self.raw.zrange(keys.due, 0, -1, withscores=True),
            "bodies": self.raw.hgetall(keys.bodies),
            "dead": self.raw.xrange(keys.dead),
        }


class StreamGround(Ground):
    mode = "stream"

    def broker(self, url: str, queues: Any, **options: Any) -> StreamBroker:
        return StreamBroker(RedisAddress(url), StreamOptions(queues=queues, **options))

    def sweep_soon(self, broker: Any, *after: float) -> None:
        for intake in getattr(broker._source, "_parts", [broker._source]):  # in a cluster there is one per slot
            intake._reclaim_at = [time.monotonic() + each for each in after] or [0.0] * len(intake._reclaim_at)

    def keys(self, queue: str = "q", namespace: str = "") -> QueueKeys:
        return QueueKeys(queue, namespace)

    def ready(self, level: Level = "normal", queue: str = "q") -> int:
        place = self.place(level, queue)
        return self.left(level, queue) - len(self._pending(place))

    def left(self, level: Level = "normal", queue: str = "q") -> int:
        return int(self.raw.xlen(self.place(level, queue)))

    def open_jobs(self, queue: str = "q") -> int:
        with self.raw.pipeline(transaction=False) as pipe:
            for place in self.keys(queue).streams:
                pipe.xlen(place)
            return sum(pipe.execute())

    def waiting(self, level: Level = "normal", queue: str = "q") -> list[bytes]:
        place = self.place(level, queue)
        pending = {each["message_id"] for each in self._pending(place)}
        return [fields.get(b"job", b"") for entry, fields in self.raw.xrange(place) if entry not in pending]

    def names(self, queue: str = "q") -> list[str]:
        places = [place for place in self.keys(queue).streams if self.raw.exists(place)]
        return [each["name"].decode() for place in places for each in self.raw.xinfo_consumers(place, GROUP)]

    def _pending(self, place: str) -> list[Any]:
        try:
            return list(self.raw.xpending_range(place, GROUP, "-", "+", 10_000))
        except redis.ResponseError:
            return []  # no such stream or group

    def claims(self, queue: str = "q") -> Iterator[tuple[bytes, bytes, int]]:
        for place in self.keys(queue).streams:
            for each in self._pending(place):
                yield each["message_id"], each["consumer"], each["times_delivered"]

    def owner_of(self, place: str, entry: bytes, queue: str = "q") -> tuple[bytes, int] | None:
        del queue
        try:
            found = list(self.raw.xpending_range(place, GROUP, entry, entry, 1))
        except redis.ResponseError:
            return None  # no such stream or group
        return (found[0]["consumer"], found[0]["times_delivered"]) if found else None

    def owners(self, keys: Iterable[tuple[str, bytes]], queue: str = "q") -> dict[tuple[str, bytes], tuple[bytes, int]]:
        del queue
        keys = list(keys)
        places = {place for place, _ in keys}
        found = {
            (place, each["message_id"]): (each["consumer"], each["times_delivered"])
            for place in places
            for each in self._pending(place)
        }
        return {key: found[key] for key in keys if key in found}

    def idle(self, claim: Claim) -> int:
        return int(self.raw.xpending_range(claim.place, GROUP, claim.entry, claim.entry, 1)[0]["time_since_delivered"])

    def hand_over(self, claim: Claim, to: str, *, count: int | None = None, idle: int = 0) -> None:
        extra = [*(["RETRYCOUNT", count] if count is not None else []), "IDLE", idle]
        script = "return redis.call('XCLAIM', KEYS[1], unpack(ARGV))"  # redis-py stumbles over the reply to JUSTID
        self.raw.eval(script, 1, claim.place, GROUP, to, 0, claim.entry, *extra, "JUSTID")

    def finish(self, claim: Claim) -> None:
        self.raw.xack(claim.place, GROUP, claim.entry)
        self.raw.xdel(claim.place, claim.entry)

    def state(self, queue: str = "q") -> dict[str, Any]:
        keys = self.keys(queue)
        return {**super().state(queue), **{place: self.raw.xrange(place) for place in keys.streams}}


class ListGround(Ground):
    mode = "list"

    def broker(self, url: str, queues: Any, **options: Any) -> ListBroker:
        return ListBroker(RedisAddress(url), Options(queues=queues, **options))

    def sweep_soon(self, broker: Any, *after: float) -> None:
        look_at = broker._reclaimer.look_at
        broker._reclaimer.look_at = [time.monotonic() + each for each in after] or [0.0] * len(look_at)

    def keys(self, queue: str = "q", namespace: str = "") -> ListKeys:
        return ListKeys(queue, namespace)

    def ready(self, level: Level = "normal", queue: str = "q") -> int:
        return int(self.raw.llen(self.place(level, queue)))

    def left(self, level: Level = "normal", queue: str = "q") -> int:
        words = (level.encode(), level.encode() + b"?")
        return self.ready(level, queue) + sum(w.split(b" ", 3)[2] in words for _, w in self._wrappers(queue))

    def open_jobs(self, queue: str = "q") -> int:
        with self.raw.pipeline(transaction=False) as pipe:
            for place in self.keys(queue).lists:
                pipe.llen(place)
            return sum(pipe.execute()) + self.held(queue)

    def waiting(self, level: Level = "normal", queue: str = "q") -> list[bytes]:
        return list(reversed(self.raw.lrange(self.place(level, queue), 0, -1)))

    def names(self, queue: str = "q") -> list[str]:
        return [name.decode().partition(":claimed:")[2] for name in self.raw.keys(f"queue:{queue}:claimed:*")]

    def _leases(self, queue: str) -> dict[bytes, tuple[bytes, int, str]]:
        members = self.raw.zrange(self.keys(queue).leases, 0, -1)
        return {member: lease for member in members if (lease := lease_of(member)) is not None}

    def _wrappers(self, queue: str) -> Iterator[tuple[str, bytes]]:
        """(claimed list, string in it)."""
        for name in self.raw.keys(f"queue:{queue}:claimed:*"):
            for wrapper in self.raw.lrange(name, 0, -1):
                yield name.decode(), wrapper

    def claims(self, queue: str = "q") -> Iterator[tuple[bytes, bytes, int]]:
        for name, wrapper in self._wrappers(queue):
            entry, count, *_ = wrapper.split(b" ", 3)
            yield entry, name.removeprefix(f"queue:{queue}:claimed:").encode(), int(count)

    def deliveries(self, claim: Claim) -> int | None:
        secret = self.raw.hget(self.keys(claim.queue).meta, "secret") or b""
        marks = (unmarked(element, secret)[1] for element in self.raw.lrange(claim.place, 0, -1))
        waiting = [mark.deliveries for mark in marks if mark is not None and mark.id == claim.entry.decode()]
        return waiting[0] if waiting else super().deliveries(claim)

    def _one(self, claim: Claim) -> tuple[bytes, str, bytes]:
        """(member of the lease set, claimed list, string in it)."""
        (member,) = (m for m, lease in self._leases(claim.queue).items() if lease[0] == claim.entry)
        ((name, wrapper),) = ((n, w) for n, w in self._wrappers(claim.queue) if w.startswith(claim.entry))
        return member, name, wrapper

    def _now(self) -> int:
        seconds, micros = self.raw.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def idle(self, claim: Claim) -> int:
        return self._now() - int(self.raw.zscore(self.keys(claim.queue).leases, self._one(claim)[0]) or 0)

    def hand_over(self, claim: Claim, to: str, *, count: int | None = None, idle: int = 0) -> None:
        keys = self.keys(claim.queue)
        member, name, wrapper = self._one(claim)
        entry, before, rest = wrapper.split(b" ", 2)
        count = int(before) if count is None else count
        with self.raw.pipeline(transaction=True) as pipe:
            pipe.lrem(name, 1, wrapper)
            pipe.zrem(keys.leases, member)
            pipe.rpush(keys.claimed(to), b"%b %d %b" % (entry, count, rest))
            pipe.zadd(keys.leases, {b"%b %d %b" % (entry, count, to.encode()): self._now() - idle})
            pipe.execute()

    def ripen_all(self, claims: Sequence[Claim], idle: int) -> None:
        members = {lease[0]: member for member, lease in self._leases(claims[0].queue).items()}
        at = self._now() - idle
        self.raw.zadd(self.keys(claims[0].queue).leases, {members[claim.entry]: at for claim in claims}, xx=True)
        self.forget_pace(claims[0].queue)

    def finish(self, claim: Claim) -> None:
        member, name, wrapper = self._one(claim)
        self.raw.lrem(name, 1, wrapper)
        self.raw.zrem(self.keys(claim.queue).leases, member)

    def state(self, queue: str = "q") -> dict[str, Any]:
        keys = self.keys(queue)
        return {
            **super().state(queue),
            **{place: self.raw.lrange(place, 0, -1) for place in keys.lists},
            "leases": sorted(self._leases(queue)),
            "held": sorted(self._wrappers(queue)),
        }


GROUNDS = {"stream": StreamGround, "list": ListGround}


@contextmanager
def out_of_memory(raw: redis.Redis) -> Iterator[None]:
    """The server has no memory left, from now on until the end."""
    raw.config_set("maxmemory", 1)
    try:
        yield
    finally:
        raw.config_set("maxmemory", 0)


__all__ = ["GROUNDS", "GROUP", "Ground", "ListGround", "StreamGround", "out_of_memory"]

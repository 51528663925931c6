"""What of a server can lose jobs: looked at, never changed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, TypeAlias

from redis import exceptions as redis_errors

from streamworker.broker import Finding, permissions
from streamworker.broker.keys import QueueKeys
from streamworker.broker.listings import Desk, text
from streamworker.errors import ConfigurationError, StreamworkerError

OLDEST_SERVER: Final = (6, 2)
MOST_SKEW: Final = 1.0
"""Seconds the clocks may differ."""

_ELSEWHERE: Final = {
    "stream": "lie in lists, which stream mode does not read: run streamworker bridge",
    "list": "lie in streams, which list mode does not read: run workers in stream mode until they are done",
}

Severity: TypeAlias = Literal["error", "warning", "ok"]


async def examine(desk: Desk, queues: Sequence[QueueKeys], keys_of: Callable[[str], QueueKeys]) -> list[Finding]:
    """Look at the server and at the keys of ``queues``; ``keys_of`` knows the keys of any queue by its name."""
    info: dict[str, Any] = {}
    servers: list[Finding] = []
    for each in await desk.each():
        info = await _info(each)
        servers += (_server(info), await _memory(each, info), await _persistence(each, info))
    found = [
        *dict.fromkeys(servers),  # the nodes of a cluster are mostly alike
        *await permissions.look(desk, queues, keys_of),
        *await _keys(desk, queues),
        *await _groups(desk, queues),
        *await _elsewhere(desk, queues),
        await _clock(desk),
        *_renewal(desk),
    ]
    denied = Finding("error", "permissions", "this user may not run INFO: extend its ACL")
    return found if info else [denied, *found[1:]]


async def _info(desk: Desk) -> dict[str, Any]:
    try:
        return dict(await desk.ask("INFO"))
    except ConfigurationError:
        return {}


def _renewal(desk: Desk) -> list[Finding]:
    if desk.address.bare() is not None:
        return []
    sentence = (
        "only redis-py can log in here, so that no process renews beside a worker: code that keeps the interpreter "
        "lock for longer than STREAMWORKER_LEASE loses its claim; use a user and a password, or a longer lease"
    )
    return [Finding("warning", "lease", sentence)]


def _server(info: dict[str, Any]) -> Finding:
    valkey, version = info.get("valkey_version"), str(info.get("redis_version", "0"))
    name = f"Valkey {valkey}" if valkey else f"Redis {version}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
        return Finding("error", "server", f"{name} is too old: streamworker needs Redis 6.2 or newer, or Valkey")
    if info.get("role", "master") != "master":
        return Finding("error", "server", f"{name} is a replica and refuses writes: point REDIS_URL to its primary")
    return Finding("ok", "server", name)


async def _config(desk: Desk, name: str) -> str | None:
    """A setting of the server; ``None`` if it does not tell, as managed services do not."""
    try:
        answer = await desk.ask("CONFIG GET", name)
    except StreamworkerError as error:
        if isinstance(error.__cause__, redis_errors.ResponseError):
            return None
        raise
    return text(answer.get(name, "")) if isinstance(answer, dict) else None


async def _memory(desk: Desk, info: dict[str, Any]) -> Finding:
    subject = "memory"
    policy = await _config(desk, "maxmemory-policy") or info.get("maxmemory_policy")
    if policy is None:
        return Finding("warning", subject, "CONFIG is not permitted: make sure that maxmemory-policy is noeviction")
    if str(policy).startswith("allkeys"):
        return Finding(
            "error", subject, f"maxmemory-policy is {policy}: a full server deletes jobs; set it to noeviction"
        )
    if policy != "noeviction":
        return Finding(
            "warning",
            subject,
            f"maxmemory-policy is {policy}: a full server forgets heartbeats and deduplication keys; "
            "set it to noeviction",
        )
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if most and used > 0.9 * most:
        return Finding(
            "warning", subject, f"{used / most:.0%} of maxmemory are used: enqueueing and retries fail when it is full"
        )
    return Finding("ok", subject, "maxmemory-policy is noeviction")


async def _persistence(desk: Desk, info: dict[str, Any]) -> Finding:
    subject = "persistence"
    if "err" in (info.get("aof_last_write_status"), info.get("rdb_last_bgsave_status")):
        return Finding("error", subject, "the last write to disk failed: look at the server's log and its disk")
    if info.get("aof_enabled"):
        if await _config(desk, "appendfsync") == "no":
            lost = "a crash loses what the kernel had not written"
            return Finding("warning", subject, f"appendfsync is no: {lost}; set it to everysec")
        return Finding("ok", subject, "the append-only file is on")
    save = await _config(desk, "save")
    if save is None:
        return Finding(
            "warning", subject, "CONFIG is not permitted: make sure that the append-only file, or a replica, keeps jobs"
        )
    if not save:
        return Finding(
            "error",
            subject,
            "nothing is written to disk, a restart loses every job: turn the append-only file on (appendonly yes)",
        )
    return Finding(
        "warning",
        subject,
        "there are snapshots but no append-only file, a crash loses what came after the last one: set appendonly yes",
    )


async def _keys(desk: Desk, queues: Sequence[QueueKeys]) -> list[Finding]:
    expected: dict[str, str] = {}
    for keys in queues:
        expected |= keys.types
    answers = await desk.gather([("TYPE", name) for name in expected])
    wrong = [
        Finding("error", "keys", f"the key {name} is a {text(kind)}, not a {expected[name]}: rename or delete it")
        for name, kind in zip(expected, answers, strict=True)
        if not isinstance(kind, Exception) and text(kind) not in (expected[name], "none")
    ]
    return wrong or [Finding("ok", "keys", f"the keys of {len(queues)} queues have the right types")]


async def _groups(desk: Desk, queues: Sequence[QueueKeys]) -> list[Finding]:
    if not desk.group:
        return []  # lists have none
    places = [place for keys in queues for place in keys.streams]
    answers = await desk.gather([("XINFO GROUPS", place) for place in places])
    foreign = [
        Finding(
            "error",
            "groups",
            f"the stream {place} is also read by the group {text(group['name'])!r}, which misses what streamworker "
            "deletes when it is done: destroy that group (XGROUP DESTROY), or give one of them another queue",
        )
        for place, answer in zip(places, answers, strict=True)
        if not isinstance(answer, Exception)
        for group in answer
        if text(group["name"]) != desk.group
    ]
    return foreign or [Finding("ok", "groups", f"no group but {desk.group!r} reads our streams")]


async def _elsewhere(desk: Desk, queues: Sequence[QueueKeys]) -> list[Finding]:
    """Jobs that lie where the other mode reads."""
    commands = [(keys, command) for keys in queues for command in keys.counting_elsewhere()]
    counts: Counter[QueueKeys] = Counter()
    for (keys, _), answer in zip(commands, await desk.gather([c for _, c in commands]), strict=True):
        counts[keys] += answer if isinstance(answer, int) else 0  # no access, or a key of somebody else's
    return [
        Finding("warning", "mode", f"{count} jobs of {keys.queue} {_ELSEWHERE[keys.shape]}")
        for keys, count in counts.items()
        if count
    ]


async def _clock(desk: Desk) -> Finding:
    best: tuple[float, float] | None = None
    for _ in range(3):
        before = time.time()
        seconds, micros = await desk.ask("TIME")
        after = time.time()
        skew = int(seconds) + int(micros) / 1e6 - (before + after) / 2
        if best is None or after - before < best[0]:
            best = (after - before, skew)
    skew = best[1] if best is not None else 0.0
    if abs(skew) > MOST_SKEW:
        side = "ahead of" if skew > 0 else "behind"
        return Finding(
            "warning",
            "clock",
            f"the server's clock is {abs(skew):.1f} s {side} this host's: run_at and ages are off by that; run a time "
            "service on both",
        )
    return Finding("ok", "clock", f"the server's clock is within {max(abs(skew), 0.001):.3f} s of this host's")

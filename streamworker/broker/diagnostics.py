"""Checks of a server for settings that lose jobs. Reads only."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, TypeAlias

from redis import exceptions as redis_errors

from streamworker.broker import Finding
from streamworker.broker.keys import ListKeys, QueueKeys, worker_key
from streamworker.broker.redis.session import OperatorSession, text, too_old
from streamworker.errors import ConfigurationError, StreamworkerError

MOST_SKEW: Final = 1.0
"""Seconds the clocks may differ."""

_ELSEWHERE: Final = {
    "stream": "are in lists, which stream mode does not read: run streamworker bridge",
    "list": "are in streams, which list mode does not read: run workers in stream mode until they are done",
}

LAST_ID: Final = f"{2**64 - 1}-{2**64 - 1}"
"""The last id that a stream can have (Redis, XADD)."""
SHOWN: Final = 3
"""Order keys that a sentence names."""
LOOKED_AT: Final = 1000
"""Order keys with waiting jobs that are looked at."""
Severity: TypeAlias = Literal["error", "warning", "ok"]


async def examine(
    session: OperatorSession, queues: Sequence[QueueKeys], keys_of: Callable[[str], QueueKeys]
) -> list[Finding]:
    """Check the server and the keys of ``queues``; ``keys_of`` returns the keys of any queue by its name."""
    info: dict[str, Any] = {}
    servers: list[Finding] = []
    for each in await session.each():
        info = await _info(each)
        servers += (_server(info), await _memory(each, info), await _persistence(each, info))
    found = [
        *dict.fromkeys(servers),  # the nodes of a cluster are mostly alike
        *await look(session, queues, keys_of),
        *await _keys(session, queues),
        *await _groups(session, queues),
        *await _closed(session, queues),
        *await _elsewhere(session, queues),
        *await _stalled(session, queues),
        *await _unserved(session, queues),
        await _clock(session),
        *_renewal(session),
    ]
    denied = Finding("error", "permissions", "this user may not run INFO: extend its ACL")
    return found if info else [denied, *found[1:]]


async def _info(session: OperatorSession) -> dict[str, Any]:
    try:
        return dict(await session.ask("INFO"))
    except ConfigurationError:
        return {}


def _renewal(session: OperatorSession) -> list[Finding]:
    if session.address.bare() is not None:
        return []
    sentence = (
        "only redis-py can log in here, so that no process renews beside a worker: code that keeps the interpreter "
        "lock for longer than STREAMWORKER_LEASE loses its claim; use a user and a password, or a longer lease"
    )
    return [Finding("warning", "lease", sentence)]


def _server(info: dict[str, Any]) -> Finding:
    valkey = info.get("valkey_version")
    name = f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version', '0')}"
    if too_old(info):
        return Finding("error", "server", f"{name} is too old: streamworker needs Redis 6.2 or newer, or Valkey")
    if info.get("role", "master") != "master":
        return Finding("error", "server", f"{name} is a replica and refuses writes: point REDIS_URL to its primary")
    return Finding("ok", "server", name)


async def _config(session: OperatorSession, name: str) -> str | None:
    """A setting of the server; ``None`` if CONFIG is refused, as managed services do."""
    try:
        answer = await session.ask("CONFIG GET", name)
    except StreamworkerError as error:
        if isinstance(error.__cause__, redis_errors.ResponseError):
            return None
        raise
    return text(answer.get(name, "")) if isinstance(answer, dict) else None


async def _memory(session: OperatorSession, info: dict[str, Any]) -> Finding:
    subject = "memory"
    policy = await _config(session, "maxmemory-policy") or info.get("maxmemory_policy")
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


async def _persistence(session: OperatorSession, info: dict[str, Any]) -> Finding:
    subject = "persistence"
    if "err" in (info.get("aof_last_write_status"), info.get("rdb_last_bgsave_status")):
        return Finding("error", subject, "the last write to disk failed: look at the server's log and its disk")
    if info.get("aof_enabled"):
        if await _config(session, "appendfsync") == "no":
            lost = "a crash loses what the kernel had not written"
            return Finding("warning", subject, f"appendfsync is no: {lost}; set it to everysec")
        return Finding("ok", subject, "the append-only file is on")
    save = await _config(session, "save")
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


async def _keys(session: OperatorSession, queues: Sequence[QueueKeys]) -> list[Finding]:
    expected: dict[str, str] = {}
    for keys in queues:
        expected |= keys.types
    answers = await session.gather([("TYPE", name) for name in expected])
    wrong = [
        Finding("error", "keys", f"the key {name} is a {text(kind)}, not a {expected[name]}: rename or delete it")
        for name, kind in zip(expected, answers, strict=True)
        if not isinstance(kind, Exception) and text(kind) not in (expected[name], "none")
    ]
    return wrong or [Finding("ok", "keys", f"the keys of {len(queues)} queues have the right types")]


async def _groups(session: OperatorSession, queues: Sequence[QueueKeys]) -> list[Finding]:
    if not session.group:
        return []  # lists have none
    places = [place for keys in queues for place in keys.streams]
    answers = await session.gather([("XINFO GROUPS", place) for place in places])
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
        if text(group["name"]) != session.group
    ]
    return foreign or [Finding("ok", "groups", f"no group but {session.group!r} reads our streams")]


async def _closed(session: OperatorSession, queues: Sequence[QueueKeys]) -> list[Finding]:
    """Streams that take no entry any more: XADD wants an id above the last one, and theirs is the last possible."""
    places = [place for keys in queues for place in keys.streams] if session.group else []
    answers = await session.gather([("XINFO STREAM", place) for place in places])
    return [
        Finding(
            "error",
            "queues",
            f"the stream {place} has had the last possible id, so XADD to it fails: delete the key when it is empty "
            "(DEL), and workers make it anew",
        )
        for place, answer in zip(places, answers, strict=True)
        if isinstance(answer, dict) and text(answer.get("last-generated-id", "")) == LAST_ID
    ]


async def _elsewhere(session: OperatorSession, queues: Sequence[QueueKeys]) -> list[Finding]:
    """Jobs in the ready keys of the other mode."""
    commands = [(keys, command) for keys in queues for command in keys.counting_elsewhere()]
    counts: Counter[QueueKeys] = Counter()
    for (keys, _), answer in zip(commands, await session.gather([c for _, c in commands]), strict=True):
        counts[keys] += answer if isinstance(answer, int) else 0  # no access, or a key of another type
    return [
        Finding("warning", "mode", f"{count} jobs of {keys.queue} {_ELSEWHERE[keys.shape]}")
        for keys, count in counts.items()
        if count
    ]


async def _stalled(session: OperatorSession, queues: Sequence[QueueKeys]) -> list[Finding]:
    """Order keys that halt at dead jobs, and such for which jobs wait and that no job holds."""
    found = []
    for keys in queues:
        halted, some, waiting = await session.gather(
            [("HLEN", keys.halted), ("HRANDFIELD", keys.halted, SHOWN), ("SRANDMEMBER", keys.lines, LOOKED_AT)]
        )
        if isinstance(halted, int) and halted:
            shown = ", ".join(text(each) for each in some) if isinstance(some, list) else "see HGETALL"
            cure = "replay or drop the dead jobs that hold them"
            found.append(Finding("warning", "order", f"{keys.queue}: {halted} order keys halt ({shown}): {cure}"))
        if isinstance(waiting, list) and waiting:
            holders = await session.ask("HMGET", keys.order, *waiting)
            stuck = [text(key) for key, holder in zip(waiting, holders, strict=True) if holder is None]
            if stuck:
                cure = "a worker passes them on within a minute"
                shown = ", ".join(stuck[:SHOWN])
                found.append(Finding("warning", "order", f"{keys.queue}: no job holds the order keys {shown}: {cure}"))
    return found


async def _unserved(session: OperatorSession, queues: Sequence[QueueKeys]) -> list[Finding]:
    """Queues that have had more partitions than the settings name: jobs in the others wait."""
    found = []
    served = Counter(keys.name for keys in queues)
    firsts = [keys for keys in queues if keys.name == keys.queue]
    answers = await session.gather([("HGET", keys.order, "") for keys in firsts])
    for keys, answer in zip(firsts, answers, strict=True):
        count = int(answer.split()[-1]) if isinstance(answer, bytes) and answer else 1
        if count > served[keys.name]:
            sentence = (
                f"{keys.name} has {count} partitions, of which {served[keys.name]} are served here: jobs in the others "
                f"wait; set STREAMWORKER_PARTITIONS={keys.name}={count}, their number can only grow"
            )
            found.append(Finding("error", "partitions", sentence))
    return found


async def _clock(session: OperatorSession) -> Finding:
    best: tuple[float, float] | None = None
    for _ in range(3):
        before = time.time()
        seconds, micros = await session.ask("TIME")
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


PROBE: Final = "streamworker-check"
"""Name of a queue for trying commands; it has no jobs."""


# Every command of a worker that an ACL can deny, in an order that works on keys that do not exist yet; docs/security.md
# has the same lists.
_BOTH: Final = """
    XADD @dead * job x
    ZADD @due 1 x                   | ZRANGE @due 0 0       | ZRANGEBYSCORE @due 0 1  | ZREM @due x
    HSET @bodies x x                | HGET @bodies x        | HDEL @bodies x
    HSET @meta x x                  | HSETNX @meta x x      | HMGET @meta x           | HGET @meta x
    HDEL @meta x                    | ZSCORE @cancelled x   | ZREM @cancelled x       | EXISTS @cancelled
    SET @key x PX 1000              | GET @key              | PUBLISH @due 0          | HSET @beat x x
    PEXPIRE @beat 1000              | EXISTS @beat          | DEL @beat               | TIME
    ZSCORE @calls x                 | ZCARD @holds          | ZCOUNT @holds 0 1      | PTTL @holds
    ZREMRANGEBYSCORE @holds 0 0
    EVALSHA @sha 1 @ready           | EVAL return(1) 1 @ready                         | CLIENT ID   | CLIENT UNBLOCK 0
"""
_OWN: Final[dict[str, str]] = {
    "stream": """
    XADD @ready * job x             | XGROUP CREATE @ready @group 0 MKSTREAM        | XPENDING @ready @group
    XREADGROUP GROUP @group @me COUNT 1 STREAMS @ready >                            | XACK @ready @group 1-1
    XCLAIM @ready @group @me 0 1-1 JUSTID                                           | XDEL @ready 1-1
    XAUTOCLAIM @ready @group @me 999999999 0-0 COUNT 1                              | XRANGE @ready - + COUNT 1
    XINFO GROUPS @ready             | XINFO CONSUMERS @ready @group | XINFO STREAM @ready
    XGROUP DELCONSUMER @ready @group @me
""",
    "list": """
    LPUSH @ready x                  | BLMOVE @ready @ready RIGHT RIGHT 0.01         | LINDEX @ready -1
    LRANGE @ready -1 -1             | LLEN @ready           | LREM @ready -1 x      | LTRIM @ready 0 -2
    RPUSH @claimed x                | LPOS @claimed x       | LRANGE @claimed 0 -1  | LREM @claimed 1 x
    RPUSH @ready x                  | LLEN @claimed         | LTRIM @claimed 0 -2   | TYPE @claimed
    ZADD @leases 1 x                | ZSCORE @leases x      | ZRANGE @leases 0 0    | ZRANGEBYSCORE @leases 0 1
    ZREM @leases x                  | HINCRBY @meta left 1  | TYPE @ready           | HGET @beat x
""",
}


def _commands(keys: QueueKeys, group: str, beat: str) -> list[tuple[str, ...]]:
    names = {
        **_places(keys),
        "@dead": keys.dead,
        "@due": keys.due,
        "@bodies": keys.bodies,
        "@meta": keys.meta,
        "@cancelled": keys.cancelled,
        "@key": keys.key("x"),
        "@calls": keys.calls,
        "@holds": keys.limit("x")[0],
        "@beat": beat,
        "@group": group,
        "@me": PROBE,
        "@sha": "0" * 40,
    }
    lines = (_OWN[keys.shape].strip() + _BOTH.rstrip()).replace("|", "\n").splitlines()
    return [tuple(names.get(word, word) for word in line.split()) for line in lines]


def _places(keys: QueueKeys) -> dict[str, str]:
    """Keys of ready and claimed jobs of a queue."""
    places = {"@ready": keys.ready("normal")}
    return places | ({"@claimed": keys.claimed(PROBE), "@leases": keys.leases} if isinstance(keys, ListKeys) else {})


async def look(
    session: OperatorSession, queues: Sequence[QueueKeys], keys_of: Callable[[str], QueueKeys]
) -> list[Finding]:
    """All commands, on the keys of ``queues`` where the server can be asked about them, else on keys of our own.

    Args:
        session: the connection.
        queues: their keys are tried.
        keys_of: the keys of any queue, by its name.
    """
    beat = worker_key(session.namespace, PROBE)
    probe = keys_of(f"{PROBE}-{secrets.token_hex(4)}")
    user = await _user(session)
    denied = _Denied()
    if user is not None:
        await _ask(
            session, user, [c for keys in queues or [probe] for c in _commands(keys, session.group, beat)], denied
        )
    else:
        user = "this user"
        await _try(session, probe, beat, denied)
    found = []
    if denied.commands:
        words = ", ".join(sorted(denied.commands))
        found.append(Finding("error", "permissions", f"{user} may not run {words}: extend its ACL"))
    if denied.keys:
        words = ", ".join(sorted(denied.keys))
        # Without DRYRUN the keys were not those of the queues, which may well be permitted.
        severity: Literal["error", "warning"] = "warning" if user == "this user" else "error"
        found.append(Finding(severity, "permissions", f"{user} has no access to {words}: extend its key patterns"))
    if denied.channels:
        late = "delayed jobs of other processes start up to 5 s late; allow the channels named like the :due keys"
        found.append(Finding("warning", "permissions", f"{user} may not publish: {late}"))
    return found or [Finding("ok", "permissions", "every command is permitted")]


class _Denied:
    def __init__(self) -> None:
        self.commands: set[str] = set()
        self.keys: set[str] = set()
        self.channels = False

    def note(self, command: tuple[str, ...], complaint: str) -> None:
        """``complaint`` is empty, or the server's words about a command, its keys or its channel."""
        words = complaint.lower()
        if "permission" not in words:
            return  # allowed, or a complaint of another kind, such as a missing group
        if "channel" in words:
            self.channels = True
        elif "key" in words and "command" not in words:
            self.keys |= {
                word for word in command if any(part in word for part in ("stream:{", "queue:", "streamworker:worker:"))
            }
        else:
            self.commands.add(" ".join(command[: 2 if command[0] in ("XGROUP", "XINFO", "CLIENT") else 1]))


async def _user(session: OperatorSession) -> str | None:
    """The user's name, if the server can be asked what it may do (Redis 7, and permitted)."""
    try:
        user = text(await session.ask("ACL WHOAMI"))
        await session.ask("ACL DRYRUN", user, "TIME")
    except StreamworkerError as error:
        if isinstance(error.__cause__, redis_errors.ResponseError):
            return None
        raise
    return user


async def _ask(session: OperatorSession, user: str, commands: Sequence[tuple[str, ...]], denied: _Denied) -> None:
    for start in range(0, len(commands), 500):
        batch = commands[start : start + 500]
        answers = await session.gather([("ACL DRYRUN", user, *command) for command in batch])
        for command, answer in zip(batch, answers, strict=True):
            denied.note(command, "" if answer in (b"OK", "OK", True) else text(answer))


async def _try(session: OperatorSession, keys: QueueKeys, beat: str, denied: _Denied) -> None:
    """Run them on keys of a name of its own, which are deleted again and would end by themselves."""
    names = [*_places(keys).values(), keys.dead, keys.due, keys.bodies, keys.meta, keys.key("x"), beat]
    commands = _commands(keys, session.group, beat)
    try:
        for command, answer in zip(commands, await session.gather(commands), strict=True):
            denied.note(command, str(answer) if isinstance(answer, redis_errors.NoPermissionError) else "")
    finally:
        clean: list[tuple[Any, ...]] = [("PEXPIRE", name, 60_000) for name in names]
        await session.gather([*clean, *(("DEL", name) for name in names)])

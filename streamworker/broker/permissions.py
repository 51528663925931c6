"""Whether this user may do what workers do: asked with ACL DRYRUN, else tried on keys made for it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from redis import exceptions as redis_errors

from streamworker.broker import Finding
from streamworker.broker.keys import ListKeys, QueueKeys, worker_key
from streamworker.broker.listings import Desk, text
from streamworker.errors import StreamworkerError

PROBE: Final = "streamworker-check"
"""The queue whose keys are tried on; nobody can have jobs there."""


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
    """Where jobs of a queue lie that are not parked or dead."""
    places = {"@ready": keys.ready("normal")}
    return places | ({"@claimed": keys.claimed(PROBE), "@leases": keys.leases} if isinstance(keys, ListKeys) else {})


async def look(desk: Desk, queues: Sequence[QueueKeys], keys_of: Callable[[str], QueueKeys]) -> list[Finding]:
    """All commands, on the keys of ``queues`` where the server can be asked about them, else on keys of our own.

    Args:
        desk: asks.
        queues: whose keys.
        keys_of: the keys of any queue, by its name.
    """
    beat = worker_key(desk.namespace, PROBE)
    probe = keys_of(f"{PROBE}-{secrets.token_hex(4)}")
    user = await _user(desk)
    denied = _Denied()
    if user is not None:
        await _ask(desk, user, [c for keys in queues or [probe] for c in _commands(keys, desk.group, beat)], denied)
    else:
        user = "this user"
        await _try(desk, probe, beat, denied)
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


async def _user(desk: Desk) -> str | None:
    """The user's name, if the server can be asked what it may do (Redis 7, and permitted)."""
    try:
        user = text(await desk.ask("ACL WHOAMI"))
        await desk.ask("ACL DRYRUN", user, "TIME")
    except StreamworkerError as error:
        if isinstance(error.__cause__, redis_errors.ResponseError):
            return None
        raise
    return user


async def _ask(desk: Desk, user: str, commands: Sequence[tuple[str, ...]], denied: _Denied) -> None:
    for start in range(0, len(commands), 500):
        batch = commands[start : start + 500]
        answers = await desk.gather([("ACL DRYRUN", user, *command) for command in batch])
        for command, answer in zip(batch, answers, strict=True):
            denied.note(command, "" if answer in (b"OK", "OK", True) else text(answer))


async def _try(desk: Desk, keys: QueueKeys, beat: str, denied: _Denied) -> None:
    """Run them on keys of a name of its own, which are deleted again and would end by themselves."""
    names = [*_places(keys).values(), keys.dead, keys.due, keys.bodies, keys.meta, keys.key("x"), beat]
    commands = _commands(keys, desk.group, beat)
    try:
        for command, answer in zip(commands, await desk.gather(commands), strict=True):
            denied.note(command, str(answer) if isinstance(answer, redis_errors.NoPermissionError) else "")
    finally:
        clean: list[tuple[Any, ...]] = [("PEXPIRE", name, 60_000) for name in names]
        await desk.gather([*clean, *(("DEL", name) for name in names)])

"""Names and leases of dead workers: deleted once nothing is pending under them and no heart beats."""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

from redis import exceptions as redis_errors

from streamworker.broker import scripts
from streamworker.broker.keys import QueueKeys, worker_key
from streamworker.broker.link import Link

LEASES: Final = 10
"""Most names of one queue that are looked at in one go."""
_LINE: Final = re.compile(rb"(\S+) \d+\n")


def tidy_pause(lease: float) -> float:
    """Seconds between two goes, for workers of that lease."""
    return max(2.0, min(60.0, 4 * lease)) * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load


async def tidy(link: Link, keys: QueueKeys, group: str, *, namespace: str, idle: float) -> list[str]:
    """Delete the names of dead workers from one queue's groups.

    Args:
        link: the connections.
        keys: the queue's keys.
        group: the consumer group.
        namespace: goes before every key.
        idle: seconds a name must have been silent.

    Returns:
        The names that are gone.
    """
    silent: dict[str, float] = {}
    for stream in keys.streams:
        for info in await _consumers(link, stream, group):
            name = info["name"].decode(errors="replace")
            silent[name] = min(silent.get(name, float("inf")), info["idle"] / 1000)
    gone = []
    for name in [name for name, seconds in silent.items() if seconds > idle]:
        with link.watched():
            alive = await link.commands.exists(worker_key(namespace, name))
        # The script looks again for pending entries: deleting a consumer deletes them with it.
        if not alive and await link.run(scripts.LEAVE, keys.streams, [group, name]):
            gone.append(name)
    return gone


async def forget_leases(link: Link, keys: QueueKeys, namespace: str, gone: Callable[[str], Awaitable[bool]]) -> None:
    """Forget the leases of some workers that are dead and hold nothing any more.

    Args:
        link: the connections.
        keys: the queue's keys.
        namespace: goes before every key.
        gone: whether a name holds nothing.
    """
    names = [
        name.decode(errors="replace") for name in _LINE.findall(await link.ask("HGET", keys.meta, "leases") or b"")
    ]
    for name in random.sample(names, min(LEASES, len(names))):  # whoever looks next takes others
        if not await link.ask("EXISTS", worker_key(namespace, name)) and await gone(name):
            await link.run(scripts.LEASE, [keys.meta], [name, 0])


async def _consumers(link: Link, stream: str, group: str) -> list[dict[str, Any]]:
    try:
        with link.watched():
            return list(await link.commands.xinfo_consumers(stream, group))
    except Exception as error:
        if isinstance(error.__cause__, redis_errors.ResponseError):
            return []  # no such stream or group: the next claim makes it
        raise

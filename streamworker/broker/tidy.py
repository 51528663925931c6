"""Names of dead workers in the groups: deleted once nothing is pending under them and no heart beats."""

from __future__ import annotations

from typing import Any

from redis import exceptions as redis_errors

from streamworker.broker import scripts
from streamworker.broker.keys import QueueKeys, worker_key
from streamworker.broker.link import Link


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


async def _consumers(link: Link, stream: str, group: str) -> list[dict[str, Any]]:
    try:
        with link.watched():
            return list(await link.commands.xinfo_consumers(stream, group))
    except Exception as error:
        if isinstance(error.__cause__, redis_errors.ResponseError):
            return []  # no such stream or group: the next claim makes it
        raise

"""Clients of a Redis Cluster that send each command to the node that serves its keys.

redis-py's own cluster client sends a command again after a lost reply unless told not to, asks the server for a table
of all commands, and cannot be unblocked; these know our commands, and repeat only what a node refused to execute.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final

import anyio
import redis.asyncio as aioredis
from redis import exceptions as redis_errors
from redis.crc import key_slot

from streamworker.broker.redis.connection import CommandPool, Reader
from streamworker.broker.redis.url import Host, NotExecuted, RedisUrl
from streamworker.errors import ConfigurationError


class ClusterClient(aioredis.Redis):
    """Client of a cluster: one client with a pool for each node.

    Once a node did not answer in time, commands for it fail at once until it answers a PING: each would cost its
    caller the seconds of a timeout, and callers have commands for other nodes, too.

    Args:
        slots: the map.
        connect: makes a node's client.
        hot: makes what sends single commands to a node; its client if not given.
        probes: find out that a node is silent, and that it answers again; else only what others found is known.
    """

    def __init__(
        self,
        slots: ClusterSlots | PartitionServers,
        connect: Callable[[Host], aioredis.Redis],
        hot: Callable[[Host], CommandPool] | None = None,
        *,
        probes: bool = True,
    ) -> None:
        super().__init__()
        self._slots = slots
        self._connect = connect
        self._clients: dict[Host, aioredis.Redis] = {}
        self._hot = hot
        self._pools: dict[Host, CommandPool] = {}
        self._looking = anyio.Lock()
        self._probing: dict[Host, asyncio.Task[None]] | None = {} if probes else None

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send a command to the node that serves its keys."""
        route = Route(self._slots, key_of(args))
        while True:
            host = await self.find(route)
            try:
                if host in self._slots.silent:
                    # By the word "connecting" the publisher knows that nothing was sent.
                    raise redis_errors.ConnectionError(
                        f"no reply lately, not connecting to {host[0]}: it is tried again"
                    )
                if route.asking is None:
                    if self._hot is None:
                        return await self.at(host).execute_command(*args, **options)
                    return await (self._pools.get(host) or self._pool(host, self._hot)).execute_command(*args)
                async with self.at(host).pipeline(transaction=False) as pipe:  # ASKING holds for one connection
                    pipe.execute_command("ASKING")
                    pipe.execute_command(*args, **options)
                    return (await pipe.execute())[1]
            except Exception as error:  # noqa: BLE001 - judged, and raised again unless it is a redirection
                if isinstance(error, redis_errors.TimeoutError):
                    self._no_reply(host)
                await anyio.sleep(route.refused(error, host))

    def _pool(self, host: Host, hot: Callable[[Host], CommandPool]) -> CommandPool:
        pool = self._pools[host] = hot(host)
        return pool

    def _no_reply(self, host: Host) -> None:
        if self._probing is not None and host not in self._slots.silent:
            self._slots.silent.add(host)
            self._probing[host] = asyncio.ensure_future(self._probe(host))

    async def _probe(self, host: Host) -> None:
        """Ask a silent node until it answers, or serves nothing any more."""
        try:
            while host in self._slots.masters:
                with suppress(redis_errors.RedisError, OSError):
                    await self.at(host).execute_command("PING")
                    return
                await anyio.sleep(PROBE_EVERY)
        finally:  # closed, too: another client may find out again
            self._slots.silent.discard(host)

    async def find(self, route: Route) -> Host:
        """The node for a command; reads the map again if it is unknown or in doubt."""
        while True:
            host = route.asking or route.home()
            if host is not None:
                return host
            async with self._looking:
                if self._slots.stale:
                    await self._look()
            if route.home() is None:
                await anyio.sleep(route.uncovered())

    async def _look(self) -> None:
        if not isinstance(self._slots, ClusterSlots):
            return
        lookup = SlotsLookup(self._slots)
        for host in self._slots.candidates():
            try:
                self._slots.load(await self.at(host).execute_command("CLUSTER", "SLOTS"), host)
                return
            except (redis_errors.RedisError, OSError) as error:
                lookup.failed(error, host)
        raise lookup.error()

    def at(self, host: Host) -> aioredis.Redis:
        """A node's own client."""
        client = self._clients.get(host)
        if client is None:
            client = self._clients[host] = self._connect(host)
        return client

    async def masters(self) -> list[aioredis.Redis]:
        """Clients of all nodes that serve slots, by a fresh map."""
        if isinstance(self._slots, ClusterSlots):
            async with self._looking:
                await self._look()
        return [self.at(host) for host in self._slots.masters]

    def pipeline(self, transaction: bool = False, shard_hint: Any = None) -> Any:  # noqa: ARG002 - redis-py's signature
        """A pipeline that sends commands one by one, because they may go to different nodes. Answers are in order."""
        return _Commands(self)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close all nodes' connections."""
        for probe in (self._probing or {}).values():
            probe.cancel()
        clients, self._clients = list(self._clients.values()), {}
        pools, self._pools = list(self._pools.values()), {}
        for client in clients:
            await client.aclose(close_connection_pool)
        for pool in pools:
            await pool.aclose()


class _Commands:
    """Commands of a pipeline."""

    def __init__(self, client: ClusterClient) -> None:
        self._client = client
        self._commands: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    async def __aenter__(self) -> _Commands:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._commands.clear()

    def execute_command(self, *args: Any, **options: Any) -> None:
        self._commands.append((args, options))

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        answers: list[Any] = []
        for args, options in self._commands:
            try:
                answers.append(await self._client.execute_command(*args, **options))
            except redis_errors.ResponseError as error:
                if raise_on_error:
                    raise
                answers.append(error)
        return answers


class ClusterReader:
    """A `Reader` at the node that serves a key.

    Args:
        client: finds the node.
        slots: the map.
        key: its slot is read.
        connect: makes a reader at a node.
    """

    def __init__(
        self, client: ClusterClient, slots: ClusterSlots | PartitionServers, key: str, connect: Callable[[Host], Reader]
    ) -> None:
        self._client, self._slots, self._key, self._connect = client, slots, key, connect
        self._at: tuple[Host, Reader] | None = None

    async def execute_command(self, *args: Any, **_: Any) -> Any:
        """Send one command and return its raw reply."""
        route = Route(self._slots, self._key)
        while True:
            host = await self._client.find(route)
            if self._at is None or self._at[0] != host:
                await self.close()
                self._at = (host, self._connect(host))
            reader = self._at[1]
            try:
                if route.asking is not None:
                    await reader.execute_command("ASKING")
                return await reader.execute_command(*args)
            except Exception as error:  # noqa: BLE001 - judged, and raised again unless it is a redirection
                await anyio.sleep(route.refused(error, host))

    async def unblock(self) -> None:
        """End its blocking read, if there is one."""
        if self._at is not None:
            await self._at[1].unblock()

    async def close(self) -> None:
        """Close the connection."""
        at, self._at = self._at, None
        if at is not None:
            await at[1].close()


PROBE_EVERY: Final = 1.0
"""Seconds between questions to a node that does not answer."""
PATIENCE: Final = 8
"""Most redirections and refusals of one command; the pauses between them add up to about 2 s."""
PAUSE: Final = 0.05
_KEYLESS: Final = frozenset({"ACL", "CLIENT", "CLUSTER", "CONFIG", "INFO", "PING", "PUBLISH", "SCAN", "TIME"})


@lru_cache(8192)
def slot_of(key: str) -> int:
    """The slot of a key."""
    return int(key_slot(key.encode()))


def key_of(args: tuple[Any, ...]) -> str | None:
    """The first key of one of our commands; ``None`` if any node may answer it."""
    name, _, sub = str(args[0]).partition(" ")
    if name in _KEYLESS:
        return None
    at = 2 if name in ("XINFO", "XGROUP", "OBJECT", "MEMORY") and not sub else 1
    if name in ("EVAL", "EVALSHA"):
        at = 3 if int(args[2]) else len(args)
    elif name in ("XREADGROUP", "XREAD"):
        at = args.index("STREAMS") + 1
    key = args[at] if at < len(args) else None
    return key.decode() if isinstance(key, bytes) else None if key is None else str(key)


class ClusterSlots:
    """Map of slots to nodes: shared by the event loop and the lease thread, always replaced as a whole.

    Args:
        url: a url of the kind "cluster".
    """

    def __init__(self, url: RedisUrl) -> None:
        self.url: Final = url
        self._ranges: tuple[list[int], list[tuple[int, Host]]] = ([], [])
        self._moved: dict[int, Host] = {}
        self._doubted: dict[Host, float] = {}
        self.silent: Final[set[Host]] = set()
        """Nodes that did not answer in time and have not answered since."""
        self.stale = True

    def slot(self, key: str) -> int:
        """The slot of a key."""
        return slot_of(key)

    def node(self, slot: int) -> Host | None:
        """The node that serves a slot, as far as it is known."""
        moved = self._moved.get(slot)
        if moved is not None:
            return moved
        starts, ranges = self._ranges
        at = bisect_right(starts, slot) - 1
        return ranges[at][1] if at >= 0 and slot <= ranges[at][0] else None

    @property
    def masters(self) -> list[Host]:
        """All nodes that serve slots."""
        return list(dict.fromkeys([*(host for _, host in self._ranges[1]), *self._moved.values()]))

    def candidates(self) -> list[Host]:
        """Nodes to ask for the map: those that serve slots, then the URL's hosts; silent ones come last."""
        known = dict.fromkeys([*self.masters, *self.url.hosts])
        return sorted(known, key=lambda host: self._doubted.get(host, 0.0))

    def doubt(self, host: Host) -> None:
        """A node did not answer: the map may have changed."""
        self._doubted[host] = time.monotonic()
        self.stale = True

    def moved(self, slot: int, host: Host) -> None:
        """A node redirected a slot; the rest of the map is read again soon."""
        self._moved = {**self._moved, slot: host}
        self.stale = True

    def load(self, reply: Any, asked: Host) -> None:
        """Load the reply to CLUSTER SLOTS; a node without a name of its own has the host at which it was asked."""
        found = []
        for first, last, (name, port, *_), *_replicas in reply:
            host = name.decode() if isinstance(name, bytes) else name
            found.append((int(first), (int(last), (host or asked[0], int(port)))))
        found.sort()
        self._ranges = ([first for first, _ in found], [rest for _, rest in found])
        self._moved = {}
        self._doubted.pop(asked, None)
        self.stale = False


class PartitionServers:
    """Map of keys to servers that are given by URLs: those of some partitions, and one for all else. It never changes.

    To clients it is the map of a cluster with a slot for each server.

    Args:
        main: the server of all other keys.
        homes: server of each partition that is elsewhere, by its home.
    """

    stale = False

    def __init__(self, main: Host, homes: Mapping[str, Host]) -> None:
        self.masters: Final = list(dict.fromkeys([main, *homes.values()]))
        self._slots = {home: self.masters.index(host) for home, host in homes.items()}
        self.silent: Final[set[Host]] = set()
        """Servers that did not answer in time and have not answered since."""

    def slot(self, key: str) -> int:
        """The number of a key's server."""
        return self._slots.get(key[key.find("{") + 1 : key.find("}")], 0)

    def node(self, slot: int) -> Host:
        """A server."""
        return self.masters[slot]

    def candidates(self) -> list[Host]:
        """Servers that answer what is about no key."""
        return self.masters

    def doubt(self, host: Host) -> None:
        """A server did not answer: no other one has its keys."""


class Route:
    """Route of one command, by the redirections so far."""

    def __init__(self, slots: ClusterSlots | PartitionServers, key: str | None) -> None:
        self._slots = slots
        self.slot: Final = None if key is None else slots.slot(key)
        self.asking: Host | None = None
        self._tries = 0

    def home(self) -> Host | None:
        """The node by the map; ``None`` if the map has to be read first."""
        if self._slots.stale:
            return None
        if self.slot is None:
            return self._slots.candidates()[0]
        return self._slots.node(self.slot)

    def uncovered(self) -> float:
        """The map is fresh and no node serves the slot: seconds to wait before it is read again."""
        if isinstance(self._slots, ClusterSlots):
            self._slots.stale = True
        return self._again(f"no node serves slot {self.slot}")

    def refused(self, error: Exception, host: Host) -> float:
        """Seconds to wait before a refused command is sent again; only a command that was not executed is.

        Raises:
            Exception: ``error``, if it is no redirection or refusal of a cluster.
            NotExecuted: the cluster refused too often.
        """
        self.asking = None
        if not isinstance(self._slots, ClusterSlots):
            raise error
        if isinstance(error, redis_errors.MovedError):
            self._slots.moved(error.slot_id, (error.host or host[0], error.port))
            self._again(str(error))
            return 0.0
        if isinstance(error, redis_errors.AskError):
            self.asking = (error.host or host[0], error.port)
            self._again(str(error))
            return 0.0
        if isinstance(error, redis_errors.ClusterDownError | redis_errors.TryAgainError):
            self._slots.stale = True
            return self._again(str(error))
        if isinstance(error, redis_errors.ConnectionError | redis_errors.TimeoutError | OSError):
            self._slots.doubt(host)
        raise error

    def _again(self, why: str) -> float:
        self._tries += 1
        if self._tries > PATIENCE:
            raise NotExecuted(why)
        return float(PAUSE * min(self._tries, 8))


class SlotsLookup:
    """One round of requests for the map."""

    def __init__(self, slots: ClusterSlots) -> None:
        self._slots = slots
        self._last: Exception | None = None

    def failed(self, error: Exception, host: Host) -> None:
        if "cluster support disabled" in str(error):
            raise ConfigurationError(
                f"Redis at {self._slots.url} is no cluster: write redis:// instead of redis+cluster:// in REDIS_URL"
            ) from error
        if isinstance(error, redis_errors.AuthenticationError | redis_errors.NoPermissionError):
            raise error
        self._slots.doubt(host)
        self._last = error

    def error(self) -> Exception:
        # By the word "connecting" the publisher knows that nothing was sent.
        return redis_errors.ConnectionError(f"no node of the cluster answers; the last, connecting to it: {self._last}")

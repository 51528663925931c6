"""Clients of a Redis Cluster that ask the right node.

redis-py's own cluster client sends a command again after a lost reply unless told not to, asks the server for a table
of all commands, and cannot be unblocked; these know our commands, and repeat only what a node refused to execute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anyio
import redis
import redis.asyncio as aioredis
from redis import exceptions as redis_errors

from streamworker.broker.forms import Host
from streamworker.broker.reader import Reader
from streamworker.broker.slots import Lookup, Route, Slots, key_of


class ClusterClient(aioredis.Redis):
    """Our commands, each to the node that serves its keys. One client with a pool per node.

    Args:
        slots: the map.
        connect: makes a node's client.
    """

    def __init__(self, slots: Slots, connect: Callable[[Host], aioredis.Redis]) -> None:
        super().__init__()
        self._slots = slots
        self._connect = connect
        self._clients: dict[Host, aioredis.Redis] = {}
        self._looking = anyio.Lock()

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send a command where it belongs."""
        route = Route(self._slots, key_of(args))
        while True:
            host = await self.find(route)
            try:
                if route.asking is None:
                    return await self.at(host).execute_command(*args, **options)
                async with self.at(host).pipeline(transaction=False) as pipe:  # ASKING holds for one connection
                    pipe.execute_command("ASKING")
                    pipe.execute_command(*args, **options)
                    return (await pipe.execute())[1]
            except Exception as error:  # noqa: BLE001 - judged, and raised again unless it is a redirection
                await anyio.sleep(route.refused(error, host))

    async def find(self, route: Route) -> Host:
        """Where a command goes next; looks the map up if it is not known or in doubt."""
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
        lookup = Lookup(self._slots)
        for host in self._slots.candidates():
            try:
                self._slots.load(await self.at(host).execute_command("CLUSTER", "SLOTS"), host)
                return
            except (redis_errors.RedisError, OSError) as error:
                lookup.failed(error, host)
        raise lookup.nobody()

    def at(self, host: Host) -> aioredis.Redis:
        """A node's own client."""
        client = self._clients.get(host)
        if client is None:
            client = self._clients[host] = self._connect(host)
        return client

    async def masters(self) -> list[aioredis.Redis]:
        """Clients of all who serve slots, by a fresh map."""
        async with self._looking:
            await self._look()
        return [self.at(host) for host in self._slots.masters]

    def pipeline(self, transaction: bool = False, shard_hint: Any = None) -> Any:  # noqa: ARG002 - redis-py's signature
        """Commands that are sent one by one: they may belong to different nodes. Answers come in order."""
        return _Commands(self)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close all nodes' connections."""
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.aclose(close_connection_pool)


class _Commands:
    """What a pipeline is for a single server."""

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


class ClusterBlocking:
    """Commands of the lease thread, each to the node that serves its key."""

    def __init__(self, slots: Slots, connect: Callable[[Host], redis.Redis]) -> None:
        self._slots = slots
        self._connect = connect
        self._clients: dict[Host, redis.Redis] = {}

    def execute_command(self, *args: Any) -> Any:
        """Send a command where it belongs."""
        route = Route(self._slots, key_of(args))
        while True:
            host = self._find(route)
            try:
                if route.asking is not None:  # holds for one connection, and there is but one
                    self._at(host).execute_command("ASKING")
                return self._at(host).execute_command(*args)
            except Exception as error:  # noqa: BLE001 - judged, and raised again unless it is a redirection
                time.sleep(route.refused(error, host))

    def _find(self, route: Route) -> Host:
        while True:
            host = route.asking or route.home()
            if host is not None:
                return host
            self._look()
            if route.home() is None:
                time.sleep(route.uncovered())

    def _look(self) -> None:
        lookup = Lookup(self._slots)
        for host in self._slots.candidates():
            try:
                self._slots.load(self._at(host).execute_command("CLUSTER", "SLOTS"), host)
                return
            except (redis_errors.RedisError, OSError) as error:
                lookup.failed(error, host)
        raise lookup.nobody()

    def _at(self, host: Host) -> redis.Redis:
        client = self._clients.get(host)
        if client is None:
            client = self._clients[host] = self._connect(host)
        return client

    @property
    def connection_pool(self) -> ClusterBlocking:
        """What holds the connections: this."""
        return self

    def disconnect(self) -> None:
        """Give up all connections; the next command makes new ones."""
        for client in self._clients.values():
            client.connection_pool.disconnect()

    def close(self) -> None:
        """Close all nodes' connections."""
        self.disconnect()


class ClusterReader:
    """A `Reader` at whatever node serves a key.

    Args:
        client: knows the nodes.
        slots: the map.
        key: whose slot is read.
        connect: makes a reader at a node.
    """

    def __init__(self, client: ClusterClient, slots: Slots, key: str, connect: Callable[[Host], Reader]) -> None:
        self._client, self._slots, self._key, self._connect = client, slots, key, connect
        self._at: tuple[Host, Reader] | None = None

    async def execute_command(self, *args: Any, **_: Any) -> Any:
        """Send one command and return its raw reply; see `Reader`."""
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

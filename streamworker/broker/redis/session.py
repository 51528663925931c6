"""Sessions: the connections of a broker or an operator, with errors of ours and the seconds of an outage."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from time import monotonic
from typing import Any, Final, Protocol

from redis.asyncio import Redis

from streamworker.broker import scripts
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.redis.cluster import ClusterClient
from streamworker.broker.redis.connection import CommandPool
from streamworker.broker.redis.reactions import Reaction, reaction_to, understood
from streamworker.errors import ConfigurationError, StreamworkerError, Unreachable
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

BLOCK: Final = 5.0
"""Most seconds of one blocking read: Redis 6.2 does not wake a blocked reader whose stream was deleted."""


def too_old(info: Mapping[str, Any]) -> bool:
    """Whether INFO's section "server" is that of a server before Redis 6.2."""
    return tuple(int(part) for part in str(info.get("redis_version", "0")).split(".")[:2]) < (6, 2)


class Session:
    """Connections of a broker to one address: commands, the reader, the lease thread's own; it raises our errors.

    Args:
        address: of the server or servers.
        lease: seconds, if the lease thread uses it.
    """

    def __init__(self, address: RedisAddress, lease: float = math.inf) -> None:
        self.address = address
        self._lease = lease
        self.commands: Final = address.commands()
        self.pool: Final = address.pool()
        self.reader = address.reader(BLOCK, self.commands)
        self._branches: list[tuple[Session, str]] = []
        self.lease_pool = self._lease_pool()
        self.clock: tuple[int, float] | None = None
        """The server's time in ms when it was last read, and the monotonic seconds of that moment."""
        self._down_since: float | None = None
        self._outage = 0.0
        self._moved = False
        self._returns = 0

    def _lease_pool(self) -> CommandPool | ClusterClient:
        """The lease thread's connection to each node. One of several that hangs must not cost the others a lease."""
        return self.address.pool(1, limit=self._lease / 6 if self.address.spread else math.inf, probes=False)

    async def greet(self) -> float:
        """Check the server; returns the seconds it has been up.

        Raises:
            ConfigurationError: it cannot be used.
            Unreachable: none answers.
        """
        sent = monotonic()
        with self.watched():
            info = await self.address.greet(self.commands)
        self.clock = (int(info.get("server_time_usec", 0)) // 1000, sent) if "server_time_usec" in info else None
        if too_old(info):
            version = info.get("redis_version", "0")
            raise ConfigurationError(f"Redis at {self.address} is version {version}: streamworker needs 6.2 or newer")
        return float(info.get("uptime_in_seconds", 0))

    def named(self, name: str) -> None:
        """Name the readers and the lease thread's connection, as CLIENT LIST shows them."""
        address = self.address = self.address.renamed(name)
        self.reader, self.lease_pool = address.reader(BLOCK, self.commands), self._lease_pool()
        for branch, key in self._branches:
            branch.reader = address.reader(BLOCK, self.commands, key)

    def branch(self, key: str) -> Session:
        """A copy of the session with a reader of its own, for the slot of a key."""
        other = copy(self)
        other._branches = []
        other.reader = self.address.reader(BLOCK, self.commands, key)
        self._branches.append((other, key))
        return other

    async def unblock(self) -> None:
        """End blocking reads."""
        for session in (self, *(branch for branch, _ in self._branches)):
            with self.watched():
                await session.reader.unblock()

    async def close(self) -> None:
        """Close all connections."""
        for session in (self, *(branch for branch, _ in self._branches)):
            await session.reader.close()
        await self.pool.aclose()
        await self.commands.aclose()
        with suppress(RuntimeError):  # the lease thread is still in a command, and closes it on its own event loop
            await self.lease_pool.aclose()

    async def ask(self, *command: Any) -> Any:
        """Send one command on a command connection."""
        await self.fresh()
        with self.watched():
            return await self.commands.execute_command(*command)

    async def run(self, script: scripts.LuaScript, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script on a command connection."""
        await self.fresh()
        with self.watched():
            return await script(self.pool, keys, args)

    async def read(self, script: scripts.LuaScript, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script on the reader's connection."""
        await self.fresh()
        with self.watched():
            return await script(self.reader, keys, args)

    async def in_thread(self, script: scripts.LuaScript, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script from the lease thread, on the event loop of that thread."""
        try:
            with self.watched():
                return await script(self.lease_pool, keys, args)
        except Unreachable:
            if not self.address.spread:  # else the other nodes' connections may be in use
                await self.leave_thread()
            raise

    async def leave_thread(self) -> None:
        """Close the lease thread's connection, from that thread; the next call connects again."""
        pool, self.lease_pool = self.lease_pool, self._lease_pool()
        await pool.aclose()

    def clock_should_show(self) -> int:
        """The server's time as our monotonic clock expects it, in ms; 0 if it was never read."""
        seen = self.clock
        return 0 if seen is None else seen[0] + int((monotonic() - seen[1]) * 1000)

    def clock_shows(self, shown: int, sent: float, expected: int, lease: float) -> int:
        """Note the server's time in the reply to a command that was sent at ``sent``, and log a leap.

        Returns:
            1 if it leapt ahead, so that all leases look expired, -1 if it leapt back, 0 if neither.
        """
        ahead = shown - expected if expected else 0
        self.clock = (shown, sent)
        if abs(ahead) <= max(lease * 500, 1000):
            return 0
        log.warning("server_clock_jumped", seconds=round(ahead / 1000, 1))
        return 1 if ahead > 0 else -1

    async def fresh(self) -> None:
        """Close connections to a server that has become a replica: the next ones look the master up again."""
        if self._moved:
            self._moved = False
            await self.reader.close()
            # Connections in use fail by themselves and set the flag again.
            await self.commands.connection_pool.disconnect(inuse_connections=False)
            if isinstance(self.pool, CommandPool):
                await self.pool.disconnect()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Translate errors, and note since when no command succeeds."""
        started = monotonic()
        try:
            with understood(self.address):
                yield
        except Unreachable as error:
            if self._down_since is None:
                self._down_since = started
            if error.__cause__ is not None and reaction_to(error.__cause__) is Reaction.RECONNECT:
                self._moved = True
            raise
        except StreamworkerError:
            self._up()
            raise
        self._up()

    def _up(self) -> None:
        down, self._down_since = self._down_since, None
        if down is not None:
            self._outage = max(self._outage, monotonic() - down)
            self._returns += 1

    def reconnects(self) -> int:
        """How often the server answered again after it had not, branches included."""
        return self._returns + sum(branch._returns for branch, _ in self._branches)

    def outage(self) -> float:
        """Seconds of the last outage, or of the current one so far; reading it resets it."""
        down, seconds, self._outage = self._down_since, self._outage, 0.0
        return seconds if down is None else max(seconds, monotonic() - down)

    def longest_outage(self) -> float:
        """The longest `outage` of this session and its branches."""
        return max(self.outage(), *(branch.outage() for branch, _ in self._branches), 0.0)


class CommandSession(Protocol):
    """A session of a broker or an operator."""

    def ask(self, *command: Any) -> Awaitable[Any]:
        """Send one command."""

    def run(self, script: scripts.LuaScript, keys: Sequence[str], args: Sequence[Any]) -> Awaitable[Any]:
        """Run a script."""


class OperatorSession:
    """Connection of an operator; it raises our errors."""

    def __init__(self, client: Redis, address: RedisAddress, group: str, namespace: str) -> None:
        self.client: Final = client
        self.address: Final = address
        self.group: Final = group
        self.namespace: Final = namespace

    async def ask(self, *command: Any) -> Any:
        """Send one command."""
        with understood(self.address):
            return await self.client.execute_command(*command)

    async def run(self, script: scripts.LuaScript, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script."""
        with understood(self.address):
            return await script(self.client, keys, args)

    async def gather(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Send commands in one round trip; an error of the server takes the place of its answer."""
        if not commands:
            return []
        with understood(self.address):
            async with self.client.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                answers: list[Any] = await pipe.execute(raise_on_error=False)
                return answers

    async def scan(self, pattern: str, *kind: str) -> AsyncIterator[str]:
        """Names of keys, of one type if it is named. It walks the whole key space: only for commands of operators."""
        types = [word for name in kind for word in ("TYPE", name)]
        sessions, away = await self.each(), 0
        for session in sessions:
            cursor: Any = 0
            while True:
                try:
                    cursor, names = await session.ask("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN, *types)
                except Unreachable as error:  # the other nodes of a cluster are read all the same
                    away += 1
                    if away == len(sessions):
                        raise
                    log.warning("node_away", error=str(error), hint="what this node holds is missing here")
                    break
                for name in names:
                    yield text(name)
                if not int(cursor):
                    break

    async def each(self) -> list[OperatorSession]:
        """A session for each server that holds keys; outside a cluster this one."""
        with understood(self.address):
            clients = await self.address.masters(self.client)
        return [OperatorSession(client, self.address, self.group, self.namespace) for client in clients]


def text(value: Any) -> str:
    """Bytes as text, with escapes for what is not UTF-8."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


SCAN: Final = 1000
"""Keys of one SCAN step."""

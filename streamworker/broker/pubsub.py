"""The pub/sub connection of a broker: notifications about queues, and ends of jobs that a caller waits for.

One connection serves all subscriptions of the process; it is opened with the first and closed after the last. A message
is a hint: what a subscriber misses, it finds by looking at the server now and then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Final, Literal, Protocol

import anyio
from redis.exceptions import RedisError

from streamworker.broker import scripts
from streamworker.broker.keys import QueueKeys
from streamworker.broker.redis.reactions import understood
from streamworker.broker.redis.session import Session
from streamworker.broker.redis.url import Host
from streamworker.errors import Unreachable
from streamworker.results import READ, OutputEntry, entry_of
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

LISTEN_RETRY: Final = 1.0
"""Seconds between tries to connect again."""
PATIENCE: Final = 10.0
"""Most seconds until a subscription to the end of a job is confirmed."""
_RESULTS: Final = ("subscription_lost", "callers that wait for a result look every 10 s")
_NOTIFICATIONS: Final = ("notifications_lost", "delayed jobs of others may start up to 5 s late")
"""(log event, hint) when the connection is lost."""


class Subscription:
    """Messages of some channels, in order.

    Args:
        channels: their names.
        lost: (log event, hint) when the connection is lost.
        heard: called with whether messages arrive.
    """

    def __init__(self, channels: Sequence[bytes], lost: tuple[str, str], heard: Callable[[bool], None]) -> None:
        self.missing = set(channels)
        self.lost: Final = lost
        self.heard: Final = heard
        self.open = asyncio.Event()
        self._messages: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()

    def subscribed(self, channel: bytes) -> None:
        """The server confirmed a channel. If it did so before, messages may have been missed: an empty one says so."""
        if self.open.is_set():
            self.put(channel, b"")
        self.missing.discard(channel)
        if not self.missing:
            self.open.set()
        self.heard(True)

    def put(self, channel: bytes, data: bytes) -> None:
        """A message arrived."""
        self._messages.put_nowait((channel, data))

    async def get(self) -> tuple[bytes, bytes]:
        """The next message, as (channel, data); data is empty if messages may have been missed."""
        return await self._messages.get()


class Subscriber:
    """The subscriptions of one broker, and the task that receives for them.

    Args:
        session: knows the server's address.
        host: one of its servers, where partitions are on several.
    """

    def __init__(self, session: Session, host: Host | None = None) -> None:
        self._session, self._host = session, host
        self._by_channel: dict[bytes, set[Subscription]] = {}
        self._confirmed: set[bytes] = set()
        self._pubsub: Any = None
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def on(
        self, channels: Sequence[str], lost: tuple[str, str] = _RESULTS, heard: Callable[[bool], None] = lambda _: None
    ) -> AsyncIterator[Subscription]:
        """A subscription to some channels; they may not be confirmed yet when the block begins."""
        names = [channel.encode() for channel in channels]
        subscription = Subscription(names, lost, heard)
        async with self.joined(names, subscription):
            yield subscription

    @asynccontextmanager
    async def joined(self, names: list[bytes], subscription: Subscription) -> AsyncIterator[None]:
        """Receive messages of some of a subscription's channels."""
        for name in names:
            self._by_channel.setdefault(name, set()).add(subscription)
        try:
            await self._begin(names, subscription)
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await self._end(names, subscription)

    async def _begin(self, names: list[bytes], subscription: Subscription) -> None:
        if self._task is None or self._task.done():
            self._confirmed.clear()
            self._task = asyncio.create_task(self._receive())
            return
        for name in names:
            if name in self._confirmed:
                subscription.subscribed(name)
        missing = subscription.missing.intersection(names)
        if missing and self._pubsub is not None:
            with suppress(RedisError, OSError):  # then the task subscribes to everything anew
                await self._pubsub.subscribe(*missing)

    async def _end(self, names: list[bytes], subscription: Subscription) -> None:
        gone = []
        for name in names:
            self._by_channel[name].discard(subscription)
            if not self._by_channel[name]:
                del self._by_channel[name]
                gone.append(name)
        self._confirmed.difference_update(gone)
        if gone and self._pubsub is not None:
            with suppress(RedisError, OSError):
                await self._pubsub.unsubscribe(*gone)  # its reply also wakes the task, which ends after the last one

    async def _receive(self) -> None:
        logged: set[str] = set()
        while self._by_channel:
            address = self._session.address
            client = (address if self._host is None else address.at(self._host)).listener()
            try:
                with understood(self._session.address):
                    async with client.pubsub() as pubsub:
                        asked = set(self._by_channel)
                        await pubsub.subscribe(*asked)
                        self._pubsub = pubsub  # from here on each subscription sends its own SUBSCRIBE
                        if late := set(self._by_channel) - asked:
                            await pubsub.subscribe(*late)
                        logged.clear()
                        while self._by_channel:
                            self._on(await pubsub.get_message(timeout=None))
            except Exception as error:  # noqa: BLE001 - messages are hints: a worker goes on without them
                self._lost(error, logged)
                await anyio.sleep(LISTEN_RETRY)
            finally:
                self._pubsub = None
                self._confirmed.clear()
                with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                    await client.aclose()

    def _lost(self, error: Exception, logged: set[str]) -> None:
        for subscription in set().union(*self._by_channel.values()):
            subscription.heard(False)
            event, hint = subscription.lost
            if event not in logged:
                log.info(event, error=str(error), hint=hint)
                logged.add(event)

    def _on(self, message: Any) -> None:
        if message is None:
            return
        channel, kind = message["channel"], message["type"]
        for subscription in list(self._by_channel.get(channel, ())):
            if kind == "subscribe":
                subscription.subscribed(channel)
            elif kind == "message":
                subscription.put(channel, message["data"])
        if kind == "subscribe" and channel in self._by_channel:
            self._confirmed.add(channel)

    async def close(self) -> None:
        """End the task; call it when nothing is subscribed any more."""
        task, self._task = self._task, None
        if task is not None and not task.done():
            if self._pubsub is not None:
                with suppress(RedisError, OSError):
                    await self._pubsub.unsubscribe()
            await asyncio.wait([task], timeout=LISTEN_RETRY)
            task.cancel()


class ServerSubscribers:
    """`Subscriber` of partitions on several servers: one for each, opened with its first channel.

    Args:
        session: knows the servers' addresses.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._by_host: dict[Host | None, Subscriber] = {}

    @asynccontextmanager
    async def on(
        self, channels: Sequence[str], lost: tuple[str, str] = _RESULTS, heard: Callable[[bool], None] = lambda _: None
    ) -> AsyncIterator[Subscription]:
        """`Subscriber.on`."""
        by_host: dict[Host | None, list[bytes]] = {}
        for channel in channels:
            by_host.setdefault(self._session.address.home(channel), []).append(channel.encode())
        subscription = Subscription([channel.encode() for channel in channels], lost, heard)
        async with AsyncExitStack() as stack:
            for host, names in by_host.items():
                subscriber = self._by_host.setdefault(host, Subscriber(self._session, host))
                await stack.enter_async_context(subscriber.joined(names, subscription))
            yield subscription

    async def close(self) -> None:
        """`Subscriber.close`."""
        for subscriber in self._by_host.values():
            await subscriber.close()


def subscriber_of(session: Session) -> Subscriber | ServerSubscribers:
    """The subscriber of a broker's session."""
    return ServerSubscribers(session) if session.address.given else Subscriber(session)


LOOK: Final = b"look"
"""Notification: a queue was paused or resumed."""
CANCEL: Final = b"cancel"
"""Notification: a job was cancelled. Any other is the ms until a job is due."""


class Notified(Protocol):
    """A claim source, which must not wait for jobs of a queue that was just paused."""

    silent: bool
    """No notification arrives: waits have to be short."""

    async def look_again(self) -> None:
        """End a wait that is out of date."""


async def listen(
    subscriber: Subscriber | ServerSubscribers,
    channels: Sequence[str],
    parked: Callable[[float], None],
    source: Notified,
    cancelled: Callable[[bytes], None],
) -> None:
    """Call ``parked(epoch seconds)``, ``cancelled(channel)`` or ``source.look_again()`` for each notification.

    Never returns; cancel it.
    """

    def heard(arriving: bool) -> None:
        source.silent = not arriving

    async with subscriber.on(channels, _NOTIFICATIONS, heard) as subscription:
        while True:
            channel, data = await subscription.get()
            if data == CANCEL:
                cancelled(channel)
            if data in (LOOK, CANCEL):
                await source.look_again()
            elif data.isdigit():
                parked(time.time() + int(data) / 1000)


NOTED: Final = 30.0
"""Seconds for which the ends of a queue's jobs are published after a caller last waited for one."""


class RedisResultWaiter:
    """`ResultWaiter` for a job in one of some queues."""

    def __init__(self, session: Session, subscription: Subscription, queues: Sequence[QueueKeys], job_id: str) -> None:
        self._session = session
        self._subscription = subscription
        self._queues = queues
        self._job_id = job_id

    async def kept(self) -> bytes | None:
        """The result note that is stored, if there is one; ends of the job are published for the next 30 seconds."""
        found: bytes | None = None
        for keys in self._queues:
            names = [keys.meta, keys.result(self._job_id), keys.ended(self._job_id)]
            answer = await self._session.run(scripts.WAIT, names, [round(NOTED * 1000)])
            found = found or answer
        return found

    async def heard(self, timeout: float) -> bytes | None:
        """The next published note; empty if one may have been missed, ``None`` after ``timeout`` seconds."""
        with anyio.move_on_after(timeout):
            return (await self._subscription.get())[1]
        return None


@asynccontextmanager
async def waiting(
    session: Session, subscriber: Subscriber | ServerSubscribers, queues: Sequence[QueueKeys], job_id: str
) -> AsyncIterator[RedisResultWaiter]:
    """Subscribe to the end of a job in one of the queues.

    Raises:
        Unreachable: the server does not confirm the subscription.
    """
    async with _confirmed(session, subscriber, [keys.result(job_id) for keys in queues]) as subscription:
        yield RedisResultWaiter(session, subscription, queues, job_id)


@asynccontextmanager
async def _confirmed(
    session: Session, subscriber: Subscriber | ServerSubscribers, channels: Sequence[str]
) -> AsyncIterator[Subscription]:
    async with subscriber.on(channels) as subscription:
        with anyio.move_on_after(PATIENCE):
            await subscription.open.wait()
        if not subscription.open.is_set():
            raise Unreachable(f"Redis at {session.address} takes no subscription: check the server and its ACL")
        yield subscription


class RedisOutputReader(RedisResultWaiter):
    """`OutputReader` of a job in one of some queues.

    Args:
        session: asks the server.
        subscription: to all of the channels.
        queues: where the job may be.
        job_id: the job's id.
        log: read its log.
    """

    def __init__(
        self,
        session: Session,
        subscription: Subscription,
        queues: Sequence[QueueKeys],
        job_id: str,
        *,
        log: bool = False,
    ) -> None:
        super().__init__(session, subscription, queues, job_id)
        self._log = log

    def _name(self, keys: QueueKeys) -> str:
        return keys.log(self._job_id) if self._log else keys.output(self._job_id)

    async def read(self, after: int) -> list[OutputEntry]:
        """Some of what is stored behind a position; empty if nothing is."""
        for keys in self._queues:
            name = self._name(keys)
            rows = await self._session.ask("XRANGE", name, f"{after + 1}-0", "+", "COUNT", READ)
            entries = [entry for row in rows if (entry := entry_of(*row)) is not None]
            if entries:
                self._queues = [keys]
                return entries
        return []

    async def heard_of(self, timeout: float) -> Literal["output", "end", "look"]:
        """Wait for something new."""
        with anyio.move_on_after(timeout):
            channel, data = await self._subscription.get()
            if not data:
                return "look"
            ours = {self._name(keys).encode() for keys in self._queues}
            return "output" if channel in ours else "end"
        return "look"


@asynccontextmanager
async def reading(
    session: Session, subscriber: Subscriber | ServerSubscribers, queues: Sequence[QueueKeys], job_id: str, *, log: bool
) -> AsyncIterator[RedisOutputReader]:
    """Subscribe to the output of a job in one of the queues, or to its log, and to its end.

    Raises:
        Unreachable: the server does not confirm the subscription.
    """
    told = [keys.log(job_id) if log else keys.output(job_id) for keys in queues]
    channels = [*(keys.result(job_id) for keys in queues), *told]
    async with _confirmed(session, subscriber, channels) as subscription:
        yield RedisOutputReader(session, subscription, queues, job_id, log=log)

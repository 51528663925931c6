"""Listening to the bell, without polling: jobs that others park or cancel, queues that are paused or resumed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Protocol

import anyio
from redis.exceptions import RedisError

from streamworker.broker import scripts
from streamworker.broker.keys import QueueKeys
from streamworker.broker.redis.client import Address
from streamworker.broker.redis.errors import understood
from streamworker.broker.redis.session import Session
from streamworker.errors import Unreachable
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

LISTEN_RETRY: Final = 1.0
"""Seconds between tries to subscribe again."""
PATIENCE: Final = 10.0
"""Seconds a subscription may take."""


class ResultSubscription:
    """One who waits."""

    def __init__(self, channels: Sequence[bytes]) -> None:
        self.missing = set(channels)
        self.open = asyncio.Event()
        self._told: asyncio.Queue[bytes] = asyncio.Queue()

    def subscribed(self, channel: bytes) -> None:
        """From now on a channel is heard. When that begins anew, something may have been missed."""
        if self.open.is_set():
            self.tell(b"")
        self.missing.discard(channel)
        if not self.missing:
            self.open.set()

    def tell(self, note: bytes) -> None:
        """Something was said."""
        self._told.put_nowait(note)

    async def heard(self, timeout: float) -> bytes | None:
        """The next note; empty if some may have been missed, ``None`` after ``timeout`` seconds without one."""
        with anyio.move_on_after(timeout):
            return await self._told.get()
        return None


class ResultSubscriptions:
    """Those who wait, and the task that hears for them.

    Args:
        address: the server's.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._ears: dict[bytes, set[ResultSubscription]] = {}
        self._heard: set[bytes] = set()
        self._pubsub: Any = None
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def on(self, channels: Sequence[str]) -> AsyncIterator[ResultSubscription]:
        """An ear on some channels, open before the block begins.

        Raises:
            Unreachable: no server answers.
        """
        names = [channel.encode() for channel in channels]
        ear = ResultSubscription(names)
        for name in names:
            self._ears.setdefault(name, set()).add(ear)
        try:
            await self._begin(names, ear)
            with anyio.move_on_after(PATIENCE):
                await ear.open.wait()
            if not ear.open.is_set():
                raise Unreachable(f"Redis at {self._address} takes no subscription: check the server and its ACL")
            yield ear
        finally:
            with anyio.CancelScope(shield=True):
                await self._end(names, ear)

    async def _begin(self, names: list[bytes], ear: ResultSubscription) -> None:
        if self._task is None or self._task.done():
            self._heard.clear()
            self._task = asyncio.create_task(self._listen())
            return
        for name in names:
            if name in self._heard:
                ear.subscribed(name)
        if ear.missing and self._pubsub is not None:
            with suppress(RedisError, OSError):  # then the task subscribes to everything anew
                await self._pubsub.subscribe(*ear.missing)

    async def _end(self, names: list[bytes], ear: ResultSubscription) -> None:
        gone = []
        for name in names:
            self._ears[name].discard(ear)
            if not self._ears[name]:
                del self._ears[name]
                gone.append(name)
        self._heard.difference_update(gone)
        if gone and self._pubsub is not None:
            with suppress(RedisError, OSError):
                await self._pubsub.unsubscribe(*gone)  # its answer also tells the task to end

    async def _listen(self) -> None:
        said = False
        while self._ears:
            client = self._address.listener()
            try:
                with understood(self._address):
                    async with client.pubsub() as pubsub:
                        asked = set(self._ears)
                        await pubsub.subscribe(*asked)
                        self._pubsub = pubsub  # from here on everybody subscribes for himself
                        if late := set(self._ears) - asked:
                            await pubsub.subscribe(*late)
                        said = False
                        while self._ears:
                            self._on(await pubsub.get_message(timeout=None))
            except Exception as error:  # noqa: BLE001 - those who wait read for themselves meanwhile
                if not said:
                    log.info("ears_closed", error=str(error), hint="whoever waits for a result looks every 10 s")
                said = True
                await anyio.sleep(LISTEN_RETRY)
            finally:
                self._pubsub = None
                self._heard.clear()
                with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                    await client.aclose()

    def _on(self, message: Any) -> None:
        if message is None:
            return
        channel = message["channel"]
        for ear in list(self._ears.get(channel, ())):
            if message["type"] == "subscribe":
                ear.subscribed(channel)
            elif message["type"] == "message":
                ear.tell(message["data"])
        if message["type"] == "subscribe" and channel in self._ears:
            self._heard.add(channel)

    async def close(self) -> None:
        """End the task, when nobody waits any more."""
        task, self._task = self._task, None
        if task is not None and not task.done():
            if self._pubsub is not None:
                with suppress(RedisError, OSError):
                    await self._pubsub.unsubscribe()
            await asyncio.wait([task], timeout=LISTEN_RETRY)
            task.cancel()


NOTIFY_RETRY: Final = 2.0
"""Seconds between tries to subscribe again; until then the regular ticks find what is due."""
LOOK: Final = "look"
"""The message that a queue was paused or resumed."""
CANCEL: Final = "cancel"
"""The message that a job was cancelled; any other is the ms until a job is due."""


class Watcher(Protocol):
    """Who waits for jobs, and must not wait for those of a queue that was just paused."""

    silent: bool
    """Nothing is heard of the bell: waits have to be short."""

    async def look_again(self) -> None:
        """End the wait that does not know it yet."""


async def listen(
    address: Address,
    channels: Sequence[str],
    parked: Callable[[float], None],
    watcher: Watcher,
    cancelled: Callable[[bytes], None],
) -> None:
    """Call ``parked(epoch seconds)``, ``cancelled(channel)`` or ``watcher.look_again()`` for every ring of the bell.

    Never returns; cancel it. A subscription waits for no reply, so that cancelling it loses nothing.
    """
    said = False
    while True:
        client = address.listener()
        try:
            with understood(address):
                async with client.pubsub() as pubsub:
                    await pubsub.subscribe(*channels)
                    async for message in pubsub.listen():
                        if message["type"] == "subscribe":
                            watcher.silent = False
                        elif message["data"] == LOOK.encode():
                            await watcher.look_again()
                        elif message["data"] == CANCEL.encode():
                            cancelled(message["channel"])
                            await watcher.look_again()
                        elif message["type"] == "message" and message["data"].isdigit():
                            parked(time.time() + int(message["data"]) / 1000)
        except Exception as error:  # noqa: BLE001 - a hint that fails must not end the worker
            watcher.silent = True
            if not said:
                log.info("bell_silent", error=str(error), hint="delayed jobs of others may start up to 5 s late")
            said = True
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                await client.aclose()
        await anyio.sleep(NOTIFY_RETRY)


TOLD: Final = 30.0
"""Seconds for which ends of a queue's jobs are told after somebody has last asked for it."""


class Waiting:
    """`Hearing` of a job that lies in one of some queues."""

    def __init__(self, link: Session, ear: ResultSubscription, queues: Sequence[QueueKeys], job_id: str) -> None:
        self._link = link
        self._queues = queues
        self._job_id = job_id
        self.heard = ear.heard

    async def kept(self) -> bytes | None:
        """See `Hearing.kept`."""
        found: bytes | None = None
        for keys in self._queues:
            names = [keys.meta, keys.result(self._job_id), keys.ended(self._job_id)]
            answer = await self._link.run(scripts.WAIT, names, [round(TOLD * 1000)])
            found = found or answer
        return found


@asynccontextmanager
async def waiting(
    link: Session, ears: ResultSubscriptions, queues: Sequence[QueueKeys], job_id: str
) -> AsyncIterator[Waiting]:
    """See `Broker.ended`."""
    async with ears.on([keys.result(job_id) for keys in queues]) as ear:
        yield Waiting(link, ear, queues, job_id)

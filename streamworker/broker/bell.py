"""Listening to the bell, without polling: jobs that others park or cancel, queues that are paused or resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import anyio

from streamworker.broker.client import Address, understood
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

RETRY: Final = 2.0
"""Seconds between tries to subscribe again; until then the regular ticks find what is due."""
LOOK: Final = "look"
"""The message that a queue was paused or resumed."""
CANCEL: Final = "cancel"
"""The message that a job was cancelled; any other is the ms until a job is due."""


class Watcher(Protocol):
    """Who waits for jobs, and must not wait for those of a queue that was just paused."""

    deaf: bool
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
                            watcher.deaf = False
                        elif message["data"] == LOOK.encode():
                            await watcher.look_again()
                        elif message["data"] == CANCEL.encode():
                            cancelled(message["channel"])
                            await watcher.look_again()
                        elif message["type"] == "message" and message["data"].isdigit():
                            parked(time.time() + int(message["data"]) / 1000)
        except Exception as error:  # noqa: BLE001 - a hint that fails must not end the worker
            watcher.deaf = True
            if not said:
                log.info("bell_silent", error=str(error), hint="delayed jobs of others may start up to 5 s late")
            said = True
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                await client.aclose()
        await anyio.sleep(RETRY)

"""Listening for jobs that others park, so that delays are kept to the millisecond without polling."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import anyio

from streamworker.broker.client import Address, understood
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

RETRY: Final = 2.0
"""Seconds between tries to subscribe again; until then the regular ticks find what is due."""


async def listen(address: Address, channels: Sequence[str], parked: Callable[[float], None]) -> None:
    """Call ``parked(epoch seconds)`` for every ring of the bell. Never returns; cancel it.

    A subscription waits for no reply, so that cancelling it loses nothing.
    """
    said = False
    while True:
        client = address.listener()
        try:
            with understood(address):
                async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(*channels)
                    async for message in pubsub.listen():
                        if message["data"].isdigit():
                            parked(time.time() + int(message["data"]) / 1000)
        except Exception as error:  # noqa: BLE001 - a hint that fails must not end the worker
            if not said:
                log.info("bell_silent", error=str(error), hint="delayed jobs of others may start up to 5 s late")
            said = True
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                await client.aclose()
        await anyio.sleep(RETRY)

"""The loop that moves due jobs: it sleeps until the next one, and wakes for one that is parked sooner."""

from __future__ import annotations

import time

import anyio

from streamworker.broker import Broker
from streamworker.pause import Pause
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")


class Ticker:
    """Calls `Broker.tick` when it is needed.

    Args:
        broker: whose `tick` is called.
        stopping: ends the loop; call `wake` with it.
    """

    def __init__(self, broker: Broker, stopping: anyio.Event) -> None:
        self._broker = broker
        self._stopping = stopping
        self._wake = anyio.Event()
        self._next = 0.0

    def parked(self, at: float) -> None:
        """A job is due at ``at`` (epoch seconds): no later than that the due set is looked at."""
        if at < self._next:
            self._wake.set()

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    async def run(self) -> None:
        """Tick until stopped; an error is logged and followed by a pause."""
        pause = Pause()
        while not self._stopping.is_set():
            # Before the look, not after it: a stop or a parked job that comes meanwhile must not be slept over.
            self._wake, self._next = anyio.Event(), float("inf")
            try:
                seconds = await self._broker.tick()
                pause.reset()
            except Exception as error:  # noqa: BLE001 - the main loop never crashes
                log.error("tick_failed", error=str(error))
                await pause.wait(self._stopping)
                continue
            self._next = time.time() + seconds
            with anyio.move_on_after(seconds):
                await self._wake.wait()

"""/metrics of one worker: what it counted, what it is, and how its queues are.

Answered by the thread of probes, which has an event loop and connections of its own: a handler that blocks the worker
blocks neither. Depths are asked for when somebody scrapes, and no more often than every few seconds, whoever scrapes.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from importlib.metadata import version
from time import monotonic
from typing import Any, Final

from streamworker import metrics
from streamworker.broker import Broker, Operator
from streamworker.holdings import Holdings
from streamworker.identity import rss_bytes
from streamworker.job import Depth
from streamworker.lease import LeaseKeeper
from streamworker.redact import redact
from streamworker.settings import Settings
from streamworker.telemetry.exposition import CONTENT_TYPE, Family, Numbers, render
from streamworker.telemetry.http import Answer
from streamworker.telemetry.logs import get_logger
from streamworker.workplace import Workplace

log = get_logger("streamworker.http")

FRESH: Final = 5.0
"""Seconds for which depths are told again without asking."""
PATIENCE: Final = 2.0
"""Seconds a scrape waits for depths; then it goes without them."""


class Metering:
    """Answers scrapes.

    Args:
        app: where depths are asked for.
        settings: the worker's.
        redis: what the worker was given.
        queues: the worker's.
    """

    def __init__(self, app: Workplace, settings: Settings, redis: Any, queues: list[str]) -> None:
        self._app, self._settings, self._redis, self._queues = app, settings, redis, queues
        self._started = time.time()
        self._holdings: Holdings | None = None
        self._lease: LeaseKeeper | None = None
        self._broker: Broker | None = None
        self._depths: list[Depth] = []
        self._looked_at = float("-inf")
        self._up = False
        self._ended = False
        self._asked, self._answered = asyncio.Event(), asyncio.Event()
        self.observer: Final = metrics.Metrics()

    def watch(self, holdings: Holdings, lease: LeaseKeeper, broker: Broker) -> None:
        """The groups are joined: from now on these tell how the worker is."""
        self._holdings, self._lease, self._broker = holdings, lease, broker

    def end(self) -> None:
        """Ask for no more depths; call it before the thread is stopped."""
        self._ended = True

    async def answer(self) -> Answer:
        """One scrape."""
        if monotonic() - self._looked_at >= FRESH:
            self._answered.clear()
            self._asked.set()
            waiting = asyncio.ensure_future(self._answered.wait())
            await asyncio.wait([waiting], timeout=PATIENCE)
            waiting.cancel()
        # Depths that are not fresh are not told: an alert shall see that they are missing, not that all is well.
        depths = self._depths if self._up and monotonic() - self._looked_at < 2 * FRESH else []
        families = [*self.observer.numbers(), *self._of_worker(), *metrics.of_queues(depths)]
        return Answer(200, render(families), CONTENT_TYPE)

    async def look(self) -> None:
        """Look at the queues whenever somebody asks; runs on the thread's loop, and ends by `end`."""
        stack, operator = AsyncExitStack(), None
        while not self._ended:
            await self._asked.wait()
            self._asked.clear()
            try:
                if operator is None:
                    opening = self._app.operator(self._settings, self._redis)
                    operator = await stack.enter_async_context(opening)
                await self._ask(operator)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next scrape tries again
                self._up, operator = False, None
                log.warning("depths_unknown", error=redact(str(error)))
                await stack.aclose()
            self._looked_at = monotonic()
            self._answered.set()

    async def _ask(self, operator: Operator) -> None:
        self._depths = await operator.depth(self._queues)
        self._up = True

    def _of_worker(self) -> list[tuple[Family, Numbers]]:
        mode = self._settings.mode
        told: list[tuple[Family, Numbers]] = [
            (metrics.SLOTS, {(): self._settings.concurrency}),
            (metrics.UP, {(): float(self._up)}),
            (metrics.MEMORY, {(): rss_bytes()}),
            (metrics.STARTED, {(): self._started}),
            (metrics.BUILD, {(version("streamworker"), mode): 1}),
        ]
        if self._holdings is None or self._lease is None or self._broker is None:
            return told
        running = Counter(run.claim.queue for run in self._holdings.snapshot() if run.outcome is None)
        counts = self._holdings.counts
        return [
            *told,
            (metrics.RUNNING, {(queue,): running[queue] for queue in self._queues}),
            (metrics.LOST, {(): counts.lost}),
            (metrics.RECLAIMED, {(): counts.recovered}),
            (metrics.SKIPPED, {(): counts.skipped}),
            (metrics.RELEASED, {(): counts.released}),
            (metrics.LAG, {(): self._lease.loop_lag}),
            (metrics.RECONNECTS, {(): self._broker.reconnects}),
        ]

"""What the dashboard knows between requests: one look at the fleet every few seconds, shared by all who watch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Final

import anyio

from streamworker.broker import Operator
from streamworker.errors import StreamworkerError, Unreachable
from streamworker.postgres import Archive
from streamworker.telemetry.logs import get_logger
from streamworker.views.fleet import Fleet, Look, Point
from streamworker.web.bulk import BulkJobs

log = get_logger("streamworker.web")

WATCHED: Final = 2.0
"""Seconds between looks while a page is open."""
UNWATCHED: Final = 10.0
PATIENCE: Final = 0.2
"""Seconds a page waits for a new look when the last one is old."""
QUIET: Final = 60.0
"""Seconds after the last request until no page counts as open."""
HEARTBEAT: Final = 15.0
"""Seconds after which a silent stream of events says that it is there: proxies cut what they take for dead."""


class FleetMonitor:
    """Opens the operator when first needed, and looks at the fleet from then on.

    Args:
        opening: makes the context manager that yields the operator.
        archiving: makes the one that yields the ledger; ``None`` where there is none.
    """

    def __init__(
        self,
        opening: Callable[[], AbstractAsyncContextManager[Operator]],
        archiving: Callable[[], AbstractAsyncContextManager[Archive]] | None,
    ) -> None:
        self._opening = opening
        self._archiving = archiving
        self._stack = AsyncExitStack()
        self._open_lock = anyio.Lock()
        self._archive: Archive | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._seen = time.monotonic()
        self._changed = anyio.Event()
        self._hurried = anyio.Event()
        self._operator: Operator | None = None
        self.fleet: Fleet | None = None
        self.look: Look | None = None
        self._looked_at = time.monotonic()
        self.trouble = ""
        self.number = 0
        """How many looks there were."""
        self.watchers = 0
        self._leaving = False
        self.bulk_jobs: Final = BulkJobs(self.stir)

    async def operator(self) -> Operator:
        """The operator, once the server answered.

        Raises:
            StreamworkerError: it does not.
        """
        self._visit()
        if self._task is None or self._task.done():
            # A task of asyncio's own: when it is mounted, no task group of ours is around the application.
            self._closing = False
            self._task = asyncio.create_task(self._run(), name="streamworker-dashboard")
        with anyio.move_on_after(10):
            while self._operator is None and not self.trouble:
                await self._changed.wait()
        if self._operator is None:
            raise Unreachable(self.trouble or "the server does not answer: check REDIS_URL")
        return self._operator

    async def archive(self) -> Archive | None:
        """The ledger, opened when first asked for; ``None`` where there is none.

        Raises:
            StreamworkerError: it cannot be opened now.
        """
        if self._archiving is None:
            return None
        async with self._open_lock:
            if self._archive is None:
                self._archive = await self._stack.enter_async_context(self._archiving())
        return self._archive

    async def looked(self) -> Look:
        """The last look.

        Raises:
            StreamworkerError: there could be none yet.
        """
        await self.operator()
        with anyio.move_on_after(10):
            while self.look is None and not self.trouble:
                await self._changed.wait()
        if self.look is not None and time.monotonic() - self._looked_at > 2 * WATCHED:
            # No page was open: the old look is not the present state. A server that is slow must not hold the page.
            self.hurry()
            with anyio.move_on_after(PATIENCE):
                await self._changed.wait()
        if self.look is None:
            raise Unreachable(self.trouble or "the server does not answer: check REDIS_URL")
        return self.look

    async def events(self) -> AsyncIterator[bool]:
        """True for each look, False when there was none for a while."""
        self.watchers += 1
        try:
            await self.operator()
            yield True
            while not self._leaving:
                changed, told = self._changed, False
                self._visit()
                with anyio.move_on_after(HEARTBEAT):
                    await changed.wait()
                    told = True
                yield told
        finally:
            self.watchers -= 1

    def leave(self) -> None:
        """End the streams of events: the HTTP server waits for them when it stops."""
        self._leaving = True
        self.stir()

    def stir(self) -> None:
        """Tell all who watch that something is new."""
        changed, self._changed = self._changed, anyio.Event()
        self.number += 1
        changed.set()

    async def aclose(self) -> None:
        """Close the connections; what was begun for many jobs at once ends where it is, and a look is finished."""
        await self.bulk_jobs.aclose()
        self._archive = None
        await self._stack.aclose()
        if self._task is not None:
            self._closing = True
            self.hurry()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while not self._ending():
            try:
                async with self._opening() as operator:
                    self._operator, self.fleet, self.trouble = operator, Fleet(operator, operator.lease), ""
                    while not self._ending():
                        hurried = self._hurried
                        await self._look(self.fleet)
                        await self._rest(self._pause(), hurried)
            except StreamworkerError as error:
                self._operator, self.trouble = None, str(error)
                self.stir()
                await self._rest(WATCHED, self._hurried)
            except Exception as error:
                # Whatever it is: who watches shall see that the page is old, and go on when it is over.
                self._operator, self.trouble = None, f"the dashboard failed: {error}"
                self.stir()
                log.exception("dashboard_failed")
                await self._rest(WATCHED, self._hurried)

    def _ending(self) -> bool:
        # redis-py sends with asyncio.wait_for, which on Python 3.11 may swallow a cancellation: it comes once, from
        # an application that ends without `aclose`, and has to be remembered.
        task = self._task
        return self._closing or (task is not None and task.cancelling() > 0)

    async def _rest(self, seconds: float, hurried: anyio.Event) -> None:
        """Wait until it is time, a change was made, or the first page is opened."""
        if not self._ending():
            with anyio.move_on_after(seconds):
                await hurried.wait()

    async def _look(self, fleet: Fleet) -> None:
        try:
            self.look = await fleet.look()
            self._looked_at = time.monotonic()
            self.trouble = ""
        except StreamworkerError as error:
            if self.trouble != str(error):
                log.warning("dashboard_blind", error=str(error))
            self.trouble = str(error)
        self.stir()

    def _visit(self) -> None:
        waited = self._pause() == UNWATCHED
        self._seen = time.monotonic()
        if waited:
            self.hurry()

    def hurry(self) -> None:
        """Look now: something was changed."""
        hurried, self._hurried = self._hurried, anyio.Event()
        hurried.set()

    def _pause(self) -> float:
        watched = self.watchers or time.monotonic() - self._seen < QUIET
        return WATCHED if watched else UNWATCHED

    def now(self) -> float:
        """The server's clock: what the last look showed, and what has passed since then."""
        look = self.look
        return time.time() if look is None else look.at + time.monotonic() - self._looked_at

    @property
    def alert(self) -> str:
        """What is to be said above every page: the server does not answer, or refuses writes; empty if all is well."""
        return self.trouble or (self.look.refusal if self.look is not None else None) or ""

    def past(self, queue: str) -> Sequence[Point]:
        """What was seen of a queue, or of all together (``""``), the oldest first."""
        return self.fleet.history.of(queue) if self.fleet is not None else ()

    def counts(self) -> dict[str, int]:
        """The numbers beside the names of the pages."""
        look = self.look
        if look is None:
            return {}
        return {
            "running": look.total.running,
            "delayed": look.total.delayed,
            "dead": look.total.dead,
            "workers": sum(worker.alive for worker in look.workers),
            "notices": sum(notice.severity != "note" for notice in look.notices),
        }

    def told(self) -> dict[str, Any]:
        """The state that every open page gets."""
        look = self.look
        told: dict[str, Any] = {"trouble": self.alert, "campaigns": self.bulk_jobs.told()}
        if look is not None:
            told["point"], told["counts"] = look.total, self.counts()
            told["queues"] = {row.queue: self.past(row.queue)[-1:] for row, _ in look.queues[:200]}
        return told

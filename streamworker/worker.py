"""QueueWorker: claims jobs, runs them, settles them, and drains when told to stop.

Stateless: everything it knows of a job comes from the broker and goes back there. Its loops (claiming, slots, settling,
moving due jobs) share nothing but the runs this worker holds. An error in a loop is logged and followed by a pause; running
jobs go on, finished ones wait in memory and keep their lease until they are settled.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Final, Protocol

import anyio
import structlog

from streamworker.broker import Broker
from streamworker.context import Shared
from streamworker.drain import HAND_BACK, drain, hand_back_strays
from streamworker.errors import HandBackFailed, StuckThread
from streamworker.execute import Executor, Middleware, Run
from streamworker.handlers import Handlers
from streamworker.holdings import Holdings
from streamworker.identity import heartbeat, new_worker_id
from streamworker.job import Claim, Interrupted
from streamworker.lease import LeaseKeeper
from streamworker.pause import Pause
from streamworker.settings import Settings
from streamworker.settler import Settler
from streamworker.slots import Slots

log = structlog.get_logger("streamworker.worker")

BLOCK: Final = 5.0
"""Seconds one claim waits for jobs."""
UNSETTLED: Final = 1000
"""Finished runs that may wait to be settled before no more is claimed."""


class Workplace(Protocol):
    """What a worker needs of an app."""

    @property
    def handlers(self) -> Handlers[Any]:
        """Kind to handler."""

    @property
    def middleware(self) -> tuple[Middleware, ...]:
        """Wraps every handler."""

    @property
    def lifespan(self) -> Any:
        """Makes the context manager that yields the services, or ``None``."""

    def resolve(self, settings: Settings | None) -> Settings:
        """The settings in force."""

    def entered(self) -> AbstractAsyncContextManager[Any]:
        """Keeps the app open, so that handlers can enqueue."""

    async def site(
        self, stack: AsyncExitStack, settings: Settings, redis: Any, database: Any
    ) -> tuple[Broker, Any, Any]:
        """(broker, the handlers' Redis client, the database), open until ``stack`` is left."""


class QueueWorker:
    """A worker process's core.

    Args:
        app: handlers, middleware and lifespan.
        redis: a ``redis.asyncio.Redis``, a URL, or ``None`` for ``REDIS_URL``.
        database: an asyncpg pool, a URL, or ``None`` for ``DATABASE_URL``; reaches handlers as ``ctx.database``.
        services: the user's services (an email service, pools …), reach handlers as ``ctx.services``; ``None`` enters the
            app's ``lifespan``.
        settings: instead of the environment's.
        worker_id: a name for this worker; a random part is added, so that it is unique per start.
    """

    def __init__(
        self,
        app: Workplace,
        *,
        redis: Any,
        database: Any,
        services: Any,
        settings: Settings | None = None,
        worker_id: str | None = None,
    ) -> None:
        self._app = app
        self._settings = app.resolve(settings)
        self.worker_id: Final = new_worker_id(worker_id or self._settings.worker_id)
        self._redis, self._database, self._services = redis, database, services
        self._stopping, self._hurry, self._stopped = anyio.Event(), anyio.Event(), anyio.Event()
        self._claimed_out, self._tick_wake = anyio.Event(), anyio.Event()
        self._burst = False
        self._reconcile = False
        self._error: StuckThread | HandBackFailed | None = None
        self._signal = 0
        self._started = time.time()
        self._next_tick = 0.0
        self._suspects: deque[Run] = deque()
        self._alone: Run | None = None

    # -- the lifecycle

    async def start(self) -> None:
        """Initialise and run the main loop until `stop`; returns when everything is cleaned up.

        Raises:
            StreamworkerError: it could not start (logged first), or it could not end as promised.
        """
        log.info("worker_starting", worker_id=self.worker_id)
        try:
            async with AsyncExitStack() as stack:
                try:
                    await self.initialize(stack)
                except Exception as error:
                    log.error("worker_start_failed", worker_id=self.worker_id, error=str(error))
                    raise
                await self._main()
                await self._clean_up()
        finally:
            self._stopped.set()
        log.info("worker_stopped", worker_id=self.worker_id, done=self._holdings.counts.done)
        if self._error is not None:
            raise self._error

    async def stop(self) -> None:
        """Claim no more, finish running jobs up to ``GRACE`` seconds, hand the rest back, clean up; returns when done."""
        self._stopping.set()
        await self._stopped.wait()

    async def run(self, *, burst: bool = False) -> int:
        """`start`, with SIGTERM and SIGINT wired to `stop`; a second signal cancels running jobs.

        Args:
            burst: end when nothing is ready any more.

        Returns:
            0, or 128 + the number of the second signal.
        """
        self._burst = burst
        async with anyio.create_task_group() as group:
            if threading.current_thread() is threading.main_thread():
                await group.start(self._watch_signals)
            try:
                await self.start()
            finally:
                group.cancel_scope.cancel()
        return 128 + self._signal if self._signal else 0

    async def initialize(self, stack: AsyncExitStack) -> None:
        """Connect, check the server, create the groups, make the services; all is closed when ``stack`` is left."""
        settings, app = self._settings, self._app
        await stack.enter_async_context(app.entered())
        self._broker, redis, database = await app.site(stack, settings, self._redis, self._database)
        await self._broker.open()
        await self._broker.join(self.worker_id)
        services = self._services
        if services is None and app.lifespan is not None:
            services = await stack.enter_async_context(app.lifespan())
        self._shared = Shared(self.worker_id, services, redis, database)
        self._holdings = Holdings()
        self._settler = Settler(self._broker, self._holdings, parked=self._parked)
        self._executor = Executor(
            app.handlers,
            self._shared,
            middleware=app.middleware,
            threads=settings.concurrency,
            max_deliveries=settings.max_deliveries,
            max_job_bytes=settings.max_job_bytes,
            unknown_kind_ttl=settings.unknown_kind_ttl,
        )
        self._slots = Slots(
            settings.concurrency,
            self._executor,
            finished=self.finish,
            isolate=self._may_run,
            stuck=self._stuck,
            grace=settings.grace,
        )
        self._lease = LeaseKeeper(
            self._broker, lease=settings.lease, runs=self._holdings.snapshot, report=self._report, lost=self._on_lost
        )

    async def _main(self) -> None:
        self._lease.start()
        try:
            async with anyio.create_task_group() as pool:
                self._slots.open(pool)
                async with anyio.create_task_group() as loops:
                    loops.start_soon(self._settler.run)
                    loops.start_soon(self._ticking)
                    loops.start_soon(self._unblocking)
                    log.info("worker_ready", worker_id=self.worker_id, queues=self._app.handlers.queues)
                    await self._claiming()
                    await drain(self, self._slots, self._holdings, self._settings.grace, self._hurry)
                    self._settler.close(HAND_BACK)
                pool.cancel_scope.cancel()
        finally:
            self._lease.stop()

    async def _clean_up(self) -> None:
        """Leave nothing behind: no pending entry, no consumer, no heartbeat."""
        with anyio.move_on_after(5):
            while self._lease.alive:
                await anyio.sleep(0.01)  # the thread may be in a command; its heartbeat must not outlive us
        try:
            await hand_back_strays(self._broker, self._executor)
            if not await self._broker.leave() or len(self._holdings):
                raise HandBackFailed("some jobs are still pending under this worker's name")
        except Exception as error:  # noqa: BLE001 - whatever keeps us from handing back: the leases will run out
            log.error("hand_back_failed", worker_id=self.worker_id, jobs=len(self._holdings), error=str(error))
            self._error = self._error or HandBackFailed(
                f"{len(self._holdings)} jobs could not be handed back ({error}): they run elsewhere when their lease ends"
            )

    # -- claiming

    async def _claiming(self) -> None:
        pause = Pause()
        while not self._stopping.is_set():
            try:
                await self._turn()
                pause.reset()
            except Exception as error:  # noqa: BLE001 - the main loop never crashes
                # The reply to a claim may have been lost: what it claimed is ours without our knowing.
                self._reconcile = True
                log.error("main_loop_error", worker_id=self.worker_id, error=str(error), type=type(error).__name__)
                await pause.wait(self._stopping)
        self._claimed_out.set()

    async def _turn(self) -> None:
        holdings, concurrency = self._holdings, self._settings.concurrency
        if self._suspects:
            await self._run_alone()
            return
        room = concurrency - holdings.busy
        if room <= 0 or len(holdings) - holdings.busy > UNSETTLED + concurrency:
            await holdings.changed()
            return
        if self._reconcile:
            self._admit(await self._broker.strays(holdings))
            self._reconcile = False
            return
        # Half the slots a turn at most, so that Redis fetches while Python runs what came before.
        claims = await self._broker.claim(min(room, max(1, concurrency // 2)), 0 if self._burst else BLOCK, holdings)
        self._admit(claims)
        if self._burst and not claims:
            if not len(holdings):
                self._stopping.set()
            else:
                await holdings.changed(0.1)

    def _admit(self, claims: list[Claim]) -> None:
        holdings, put = self._holdings, self._slots.put
        for claim in claims:
            run = holdings.admit(claim)
            if run is None:
                continue
            if claim.count > 1:
                holdings.counts.recovered += 1
                log.info("job_recovered", queue=claim.queue, entry=claim.entry.decode(), deliveries=claim.count)
            if claim.suspect:
                self._suspects.append(run)
            else:
                put(run)

    def _may_run(self, run: Run) -> bool:
        """Asked by a slot about a suspect; not now means that the claim loop will run it alone."""
        if run is self._alone or self._stopping.is_set():
            return True
        self._suspects.append(run)
        self._holdings.stir()
        return False

    async def _run_alone(self) -> None:
        """Let everything else finish, then run one suspect by itself: it shall not take its neighbours along."""
        holdings = self._holdings
        while holdings.busy > len(self._suspects):
            if self._stopping.is_set():
                return
            await holdings.changed(1.0)
        run = self._suspects.popleft()
        if run.claim.suspect:
            run.settling = True  # not renewed while its delivery count changes
            claim = await self._confirm(run)
            if claim is None:
                holdings.finished()
                holdings.forget(run)
                return
            run.claim, run.settling = claim, False
        self._alone = run
        self._slots.put(run)
        while run.outcome is None and not self._stopping.is_set():
            await holdings.changed(1.0)
        self._alone = None

    async def _confirm(self, run: Run) -> Claim | None:
        try:
            return await self._broker.confirm(run.claim)
        except Exception:
            # Counted or not, nobody knows: let go of it; the reconciliation finds it with the count it has.
            self._holdings.finished()
            self._holdings.forget(run)
            raise

    # -- what the parts tell

    def finish(self, run: Run) -> None:
        """A run has its outcome: free the slot, settle it."""
        self._holdings.finished()
        self._settler.add(run)

    def abandon_suspects(self) -> list[Run]:
        """Suspects that wait to run alone; they do not wait any more afterwards."""
        waiting, self._suspects = list(self._suspects), deque()
        return waiting

    @property
    def executor(self) -> Executor:
        """What prepares and calls runs."""
        return self._executor

    def _on_lost(self, claims: list[Claim]) -> None:
        for claim in claims:
            run = self._holdings.find(claim)
            if run is None or run.settling or run.outcome is not None:
                continue
            log.warning("claim_lost", job_id=run.job_id, kind=run.kind, queue=claim.queue, deliveries=claim.count)
            if run.started is None:
                run.outcome = Interrupted("the claim was lost")
            else:
                run.cancel(Interrupted("the claim was lost"))

    def _stuck(self, run: Run) -> None:
        if self._error is None:
            name = run.registration.name if run.registration is not None else run.kind
            self._error = StuckThread(f"a thread of {name} did not end after its timeout: restart this worker")
            log.error("thread_stuck", worker_id=self.worker_id, handler=name, job_id=run.job_id)
            self._stopping.set()

    def _report(self) -> dict[str, str | int | float]:
        return heartbeat(self._settings, self._app.handlers.queues, self._started, self._holdings, self._lease.loop_lag)

    # -- due jobs, signals

    def _parked(self, at: float) -> None:
        """A job of ours is due at ``at``: no later than that the due set is looked at."""
        if at < self._next_tick:
            self._tick_wake.set()

    async def _ticking(self) -> None:
        pause = Pause()
        while not self._stopping.is_set():
            try:
                seconds = await self._broker.tick()
                pause.reset()
            except Exception as error:  # noqa: BLE001 - the main loop never crashes
                log.error("tick_failed", worker_id=self.worker_id, error=str(error))
                await pause.wait(self._stopping)
                continue
            self._tick_wake, self._next_tick = anyio.Event(), time.time() + seconds
            with anyio.move_on_after(seconds):
                await self._tick_wake.wait()

    async def _unblocking(self) -> None:
        """At shutdown, end the blocking read; repeated, since it may begin just after it was told."""
        await self._stopping.wait()
        self._shared.stopping = True
        self._tick_wake.set()
        self._holdings.stir()
        while not self._claimed_out.is_set():
            try:
                await self._broker.interrupt()
            except Exception as error:  # noqa: BLE001 - then the read ends by its own timeout
                log.warning("unblock_failed", error=str(error))
            with anyio.move_on_after(0.05):
                await self._claimed_out.wait()

    async def _watch_signals(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                if not self._stopping.is_set():
                    log.info("worker_stopping", worker_id=self.worker_id, signal=signal.Signals(number).name)
                    self._stopping.set()
                else:
                    log.warning("worker_hurrying", worker_id=self.worker_id, signal=signal.Signals(number).name)
                    self._signal = number
                    self._hurry.set()

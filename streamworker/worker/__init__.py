"""QueueWorker: claims jobs, runs them, settles them, and drains when it is stopped.

Stateless: everything it knows of a job comes from the broker and goes back there. Its loops (claiming, running,
settling, moving due jobs) share nothing but the runs this worker holds. An error in a loop is logged and followed by a
pause; running jobs go on, finished ones wait in memory and keep their lease until they are settled.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import socket
import string
import time
from contextlib import AsyncExitStack
from time import monotonic
from typing import Any, Final, NoReturn

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup
from structlog.contextvars import bind_contextvars

from streamworker.broker import Consumer, SettleRequest
from streamworker.context import Shared
from streamworker.errors import ConfigurationError, HandBackFailed, StuckThread, Unreachable, UsageError
from streamworker.execution import Execution
from streamworker.job import Interrupted, Settled, TimedOut
from streamworker.redact import text_of
from streamworker.settings import Settings
from streamworker.telemetry.logs import get_logger
from streamworker.worker import signals, stacks
from streamworker.worker.calls import JobThreads
from streamworker.worker.emission import OutputBuffer
from streamworker.worker.executor import Executor
from streamworker.worker.health import Health, Inherited
from streamworker.worker.history_recorder import recorder_of
from streamworker.worker.host import WorkerHost
from streamworker.worker.inflight import InFlight, LeasedSet
from streamworker.worker.job_logs import LogBuffer
from streamworker.worker.lease import LeaseKeeper, heartbeat, longest_silence
from streamworker.worker.metrics import MetricsEndpoint
from streamworker.worker.observers import dispatch_to
from streamworker.worker.pipeline import Pipeline
from streamworker.worker.scheduler import CronLoop, DelayedPromoter, ScheduleLoop
from streamworker.worker.sealed import stages_of
from streamworker.worker.settler import ending
from streamworker.worker.stored_payloads import lenient_kinds

log = get_logger("streamworker.worker")

HAND_BACK: Final = 5.0
"""Seconds within which what was handed back must be settled."""
UNWIND: Final = 2.0
"""Seconds a cancelled handler has to clean up after itself."""
CLEAN_UP: Final = 10.0
"""Seconds after the grace by which a worker has ended, whatever users' code does."""
HURRIED: Final = 5.0
"""Seconds after a second signal by which it has."""
LAST_CALL: Final = 1.0
"""Seconds that what was told to end, and should have, is given once more."""
FIRST_BEAT: Final = 0.02
"""Seconds between two looks whether the lease thread has reached the server."""
SECOND_TRY: Final = 0.2
"""Seconds before a server that did not let us go is asked once more."""
SHUTDOWN: Final = Interrupted("the worker shut down")


def new_worker_id(name: str | None) -> str:
    """``worker-{hostname}-{pid}-{random}``, or ``{name}-{random}``; random: 9 base-36 characters, unique per start."""
    tail = "".join(secrets.choice(string.digits + string.ascii_lowercase) for _ in range(9))
    if name:
        return f"{name}-{tail}"
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost"
    return f"worker-{host}-{os.getpid()}-{tail}"


class Shutdown:
    """When a worker was stopped, and by when it must have ended.

    Args:
        grace: seconds running jobs may take to finish.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self.began: float | None = None
        """When it was stopped (time.monotonic)."""
        self.hurried: float | None = None
        """When it was stopped again."""
        self.leaving: float | None = None
        """Since when everything is handed back, and only what was opened is closed."""
        self.cut_short = False
        """Running jobs were handed back: nothing of them may go on once the worker has ended."""

    def begin(self) -> None:
        """It is stopped; a second call changes nothing."""
        self.began = self.began or monotonic()

    def hurry(self) -> None:
        """It is stopped again."""
        self.hurried = self.hurried or monotonic()

    def leave(self) -> None:
        """Everything is handed back."""
        self.leaving = self.leaving or monotonic()

    def since(self, now: float) -> float:
        """Seconds since it was stopped."""
        return now - (self.began or now)

    def overdue(self, now: float) -> bool:
        """Closing takes too long: users' code does not end. While jobs are handed back it is the servers that count."""
        return self.leaving is not None and now > max(self.end() - LAST_CALL, self.leaving + LAST_CALL)

    def end(self, *, began: float | None = None, hurried: float | None = None) -> float:
        """By when it must be over (time.monotonic); infinity while nothing stops it.

        Args:
            began: when it was stopped, if the event loop does not know of it yet.
            hurried: the same for the second time.
        """
        told = [at for at in (self.began, began) if at is not None]
        again = [at for at in (self.hurried, hurried) if at is not None]
        ends = [min(told) + self._grace + CLEAN_UP] if told else []
        return min([*ends, *([min(again) + HURRIED] if again else [])], default=float("inf"))


async def drain(pipeline: Pipeline, grace: float, hurry: anyio.Event) -> bool:
    """Wait for running jobs, then cancel and hand back the rest; returns whether a running job was handed back.

    Args:
        pipeline: whose fetcher has ended.
        grace: seconds running jobs may take to finish.
        hurry: set by a second signal: running jobs are cancelled at once.
    """
    tasks, in_flight = pipeline.tasks, pipeline.in_flight
    for run in pipeline.abandon_waiting():
        hand_back(pipeline, run)
    async with anyio.create_task_group() as group:

        async def wait_no_more() -> None:
            await hurry.wait()
            group.cancel_scope.cancel()

        group.start_soon(wait_no_more)
        with anyio.move_on_after(grace):
            while any(not run.stuck for run in tasks.running):
                await in_flight.changed(0.25)
        group.cancel_scope.cancel()
    cut_short = list(tasks.running)
    for run in cut_short:
        run.cancel(SHUTDOWN)
    with anyio.move_on_after(UNWIND):
        while any(not run.in_thread and not run.stuck for run in tasks.running):
            await in_flight.changed(0.05)
    for run in list(tasks.running):  # threads, and handlers that cannot be cancelled: the process ends under them
        hand_back(pipeline, run)
    return bool(cut_short)


def hand_back(pipeline: Pipeline, run: Execution) -> None:
    """Complete a run that has not ended here, to be settled as interrupted; one that has its outcome keeps that."""
    if run.outcome is None:
        # A thread past its deadline is charged, or it would stick worker after worker for ever.
        limits = run.facts.limits if run.facts is not None and run.overdue(monotonic()) else None
        run.outcome = TimedOut(limits.timeout) if limits is not None and limits.timeout is not None else SHUTDOWN
    pipeline.completion.finish(run)


async def end_reading(broker: Consumer, ended: anyio.Event) -> None:
    """End the blocking read. Repeated, since the read may begin just after the first time.

    Args:
        broker: whose.
        ended: set when nothing is claimed any more.
    """
    while not ended.is_set():
        try:
            await broker.interrupt()
        except Exception as error:  # noqa: BLE001 - then the read ends by its own timeout
            log.warning("unblock_failed", error=str(error))
        with anyio.move_on_after(0.05):
            await ended.wait()


async def take_leave(broker: Consumer, executor: Executor, in_flight: InFlight) -> None:
    """Leave nothing behind under this worker's name: no pending entry, no consumer, no heartbeat.

    Raises:
        HandBackFailed: something is still pending under its name.
        StreamworkerError: the server refused, also at the second attempt.
    """
    try:
        await _hand_back_pending(broker, executor, in_flight)
        gone = await broker.leave()
    except Unreachable:
        # An idle connection may lead to a server that a failover replaced; the next one leads to the new master.
        await anyio.sleep(SECOND_TRY)
        await _hand_back_pending(broker, executor, in_flight)
        gone = await broker.leave()
    if not gone or len(in_flight):
        raise HandBackFailed("some jobs are still pending under this worker's name")


async def _hand_back_pending(broker: Consumer, executor: Executor, in_flight: InFlight) -> None:
    """Settle what is still pending under our name: runs in flight by their outcome, other entries as interrupted."""
    while runs := await _pending_runs(broker, executor, in_flight):
        endings = [run.ending or ending(run, now=time.time(), jitter=0.5) for run in runs]
        refused = await _settled(broker, in_flight, runs, endings)
        if refused:
            # What cannot be parked or moved to the dead letters is released to where it came from, uncharged.
            for run in refused:
                run.outcome = SHUTDOWN
            endings = [ending(run, now=time.time(), jitter=0.5) for run in refused]
            if await _settled(broker, in_flight, refused, endings):
                return


async def _pending_runs(broker: Consumer, executor: Executor, in_flight: InFlight) -> list[Execution]:
    runs = []
    for claim in await broker.own_pending(()):
        run = in_flight.find(claim)
        if run is None:
            run = Execution(claim)
            executor.prepare(run)
        if run.outcome is None:
            run.outcome = SHUTDOWN
        runs.append(run)
    return runs


async def _settled(
    broker: Consumer, in_flight: InFlight, runs: list[Execution], endings: list[SettleRequest]
) -> list[Execution]:
    """Settle; returns the runs that the server refused to store."""
    refused = []
    for run, answer in zip(runs, await broker.settle(endings), strict=True):
        if answer is Settled.REFUSED:
            refused.append(run)
        else:
            in_flight.forget(run)
    return refused


class QueueWorker:
    """One worker: start, run, drain, stop. Its jobs pass the stages of `pipeline.Pipeline`.

    Args:
        app: handlers, middleware and lifespan.
        redis: a ``redis.asyncio.Redis``, a URL, or ``None`` for ``REDIS_URL``.
        database: an asyncpg pool, a URL, or ``None`` for ``DATABASE_URL``; reaches handlers as ``ctx.database``.
        services: the user's services (an email service, pools …), reach handlers as ``ctx.services``; ``None`` enters
            the app's ``lifespan``.
        settings: instead of the environment's.
        worker_id: a name for this worker; a random part is added, so that it is unique per start.
        inherited: what the supervisor of ``streamworker worker`` shares with it.
    """

    def __init__(
        self,
        app: WorkerHost,
        *,
        redis: Any,
        database: Any,
        services: Any,
        settings: Settings | None = None,
        worker_id: str | None = None,
        inherited: Inherited = Inherited(),  # noqa: B008 - immutable
    ) -> None:
        self._app = app
        self._settings = app.resolve(settings)
        self._stages = stages_of(app.encryption)
        self.worker_id: Final = new_worker_id(worker_id or self._settings.worker_id)
        self._redis, self._database, self._services = redis, database, services
        self._stopping, self._hurry, self._stopped = anyio.Event(), anyio.Event(), anyio.Event()
        self._burst = self._begun = self._main_begun = self._retired = False
        self._succeeds = inherited.succeeds
        self.ready: Final = anyio.Event()
        """Set when it claims and its lease thread has reached the server: everything is connected and imported."""
        self._queues = [spec.name for spec in self._settings.queues] or app.handlers.queues
        self._error: StuckThread | HandBackFailed | ConfigurationError | None = None
        self._signal = 0
        self.shutdown: Final = Shutdown(self._settings.grace)
        """When it was stopped, and by when it has ended."""
        metrics = MetricsEndpoint(app, self._settings, redis, self._queues) if self._settings.http is not None else None
        self._health = Health(self._settings, self.worker_id, self._stopping, metrics, inherited.listener)
        self._started = time.time()

    # -- the lifecycle

    async def start(self) -> None:
        """Initialise and run the main loop until `stop`; returns when everything is cleaned up.

        Raises:
            StreamworkerError: it could not start (logged first), or it could not end as promised. `StuckThread`: code
                of yours does not end, and is named; this process must end, because that code goes on.
            UsageError: it was started before.
        """
        if self._begun:
            raise UsageError("this QueueWorker was started before: make a new one, worker ids are unique per start")
        self._begun = True
        # A task of its own: when the caller is cancelled, what is held is handed back first and nothing is left behind.
        end = asyncio.create_task(self._end_of(asyncio.create_task(self._live())))
        try:
            await asyncio.shield(end)
        except asyncio.CancelledError:
            self._stopping.set()
            self._hurry.set()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([end])
            raise

    async def _end_of(self, life: asyncio.Task[None]) -> None:
        """Wait for the end; after a stop only as long as `Shutdown` allows."""
        told = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({life, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        self.shutdown.begin()
        cut = False
        while not life.done() and not self.shutdown.overdue(time.monotonic()):
            if self._hurry.is_set():
                self.shutdown.hurry()
            if not self._main_begun and not cut and self.shutdown.since(time.monotonic()) > LAST_CALL:
                cut = life.cancel()  # it is starting, and holds nothing yet
                self.shutdown.leave()
            await asyncio.wait({life}, timeout=0.05)
        if not life.done():
            await self._overran(life)
        if not (cut and life.cancelled()):
            await life

    async def _overran(self, life: asyncio.Task[None]) -> NoReturn:
        """A user's code does not end: name it in the log, and leave it behind. All jobs were handed back before."""
        where = stacks.of_task(life)
        hint = "this process must end: code that was told to stop goes on"
        log.error("worker_overran", worker_id=self.worker_id, where=where, hint=hint)
        life.cancel()
        await asyncio.wait({life}, timeout=LAST_CALL / 2)
        self._stopped.set()
        raise StuckThread(f"{where} would not end when it was told to: this process must end, start another")

    async def _live(self) -> None:
        loop = asyncio.get_running_loop()
        if hasattr(loop, "_default_executor"):  # asyncio's; uvloop's cannot be asked whether the program chose one
            JobThreads.install(loop)
        bind_contextvars(worker_id=self.worker_id)  # every line of this worker's tasks has it; they copy this context
        log.info("worker_starting", worker_id=self.worker_id)
        try:
            async with AsyncExitStack() as stack:
                stack.enter_context(signals.guard(self._in_forked_child))
                try:
                    stack.callback(self._health.close)
                    if not self._succeeds:
                        self._health.open()
                    await self.initialize(stack)
                except Exception as error:
                    log.error("worker_start_failed", worker_id=self.worker_id, error=text_of(error))
                    raise
                self._main_begun = True
                try:
                    await self._main()
                    await self._clean_up()
                finally:
                    self.shutdown.leave()
        finally:
            self._stopped.set()
        log.info("worker_stopped", worker_id=self.worker_id, done=self._in_flight.counts.done)
        if self._error is not None:
            raise self._error

    async def stop(self) -> None:
        """Claim no more, finish running jobs within ``GRACE`` seconds, hand back the rest, clean up."""
        self._stopping.set()
        if self._begun:
            await self._stopped.wait()

    async def retire(self) -> None:
        """Stop as `stop` does, because another worker of its supervisor has taken over; returns at once.

        The signal that stops the supervisor is a first one for this worker, too: it goes on draining.
        """
        await self._health.hand_over()
        if not self._stopping.is_set():
            log.info("worker_retiring", worker_id=self.worker_id)
            self._retired = True
            self._stopping.set()

    def answer_probes(self) -> None:
        """Serve ``STREAMWORKER_HTTP`` from now on: the worker before it, which did, is gone."""
        self._health.open()

    @property
    def ended_runs(self) -> int:
        """Runs that ended here since its start, well or not."""
        return self._in_flight.counts.done + self._in_flight.counts.failed if self.ready.is_set() else 0

    def resumed(self) -> None:
        """The event loop runs again after something got out of it; call it there."""
        self._executor.generators.resume()

    async def run(self, *, burst: bool = False) -> int:
        """`start`, with SIGTERM, SIGINT and SIGHUP wired to `stop`; a second SIGTERM or SIGINT cancels running jobs.

        Every worker that runs in this process hears one signal. In another thread than the main one it is heard while
        a worker runs in the main thread too.

        Args:
            burst: end when nothing is ready any more.

        Returns:
            0, or 128 + the number of the second signal.
        """
        self._burst = burst
        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            await group.start(signals.watch, self._signalled)
            try:
                await self.start()
            except Exception as error:  # noqa: BLE001 - raised below, outside of the group that would wrap it
                failure = error
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return 128 + self._signal if self._signal else 0

    async def initialize(self, stack: AsyncExitStack) -> None:
        """Connect, check the server, create the groups, make the services; all is closed when ``stack`` is left."""
        settings, app = self._settings, self._app
        stack.enter_context(app.handlers.serving())  # before it is looked which queues, limits and batches there are
        self._queues[:] = [spec.name for spec in settings.queues] or app.handlers.queues
        await stack.enter_async_context(app.entered(settings, self._redis))
        resources = await app.site(stack, settings, self._redis, self._database, self.worker_id)
        self._broker, self._relay = resources.broker, resources.relay
        await self._broker.open()
        await self._broker.join(self.worker_id)
        services = await self._enter_services(stack)
        outputs = OutputBuffer(self._stages.outputs(self._broker))
        stack.push_async_callback(outputs.close)
        logs = None
        if settings.job_log != "off":
            logs = LogBuffer(
                self._stages.outputs(self._broker), settings.job_log_lines, self._stages.sealer, resources.ledger
            )
            stack.push_async_callback(logs.close)
        self._shared = Shared(
            self.worker_id, services, resources.redis, resources.database, resources.ledger, outputs=outputs,
            sealer=self._stages.sealer, logs=logs,
        )  # fmt: skip
        self._promoter = DelayedPromoter(self._broker, self._stopping)
        observers = dispatch_to((*app.observers, *self._health.observers), self.worker_id)
        self._executor = self._stages.executor(
            app.handlers, self._shared, middleware=app.middleware, threads=settings.concurrency,
            max_deliveries=settings.max_deliveries, max_job_bytes=settings.max_job_bytes,
            unknown_kind_ttl=settings.unknown_kind_ttl, observers=observers, loads=resources.store is not None,
            lenient=lenient_kinds(app.handlers.registrations),
        )  # fmt: skip
        self._pipeline = Pipeline(
            app, settings, resources, self._executor, self._promoter, observers,
            buffers=(outputs,) if logs is None else (outputs, logs), stages=self._stages,
            stopping=self._stopping, burst=self._burst, stuck=self._stuck,
            refused=self._refused,
        )  # fmt: skip
        self._in_flight = self._pipeline.in_flight
        if self._pipeline.reaper is not None:
            stack.push_async_callback(self._pipeline.reaper.close)
        self._history = recorder_of(self._pipeline.tallies, resources, self._queues[0])
        if logs is not None and settings.job_log == "all":
            stack.enter_context(logs.listening(self._in_flight))
        held = LeasedSet(self._in_flight, self._pipeline.permits)
        longest = longest_silence(app.handlers.registrations, settings.grace)
        self._lease = LeaseKeeper(self._broker, lease=settings.lease, held=held, report=self._report, longest=longest)
        self._health.watch(self._pipeline.fetcher, self._lease, self._in_flight, self._broker, self._relay)

    async def _enter_services(self, stack: AsyncExitStack) -> Any:
        if self._services is None and self._app.lifespan is not None:
            return await stack.enter_async_context(self._app.lifespan())
        return self._services

    async def _main(self) -> None:
        self._lease.start()
        try:
            self._pipeline.tasks.open()
            async with anyio.create_task_group() as listener:
                listener.start_soon(self._broker.listen, self._promoter.parked, self._lease.look)
                async with anyio.create_task_group() as loops:
                    loops.start_soon(self._pipeline.run)
                    loops.start_soon(self._promoter.run)
                    loops.start_soon(self._unblock)
                    loops.start_soon(self._relay.run, self._stopping)
                    if self._history is not None:
                        loops.start_soon(self._history.run, self._in_flight, self._stopping)
                    if not self._burst:
                        self._start_schedules(loops)
                    log.info("worker_ready", worker_id=self.worker_id, queues=self._queues)
                    loops.start_soon(self._announce)
                    await self._pipeline.fetcher.run()
                    self.shutdown.cut_short = await drain(self._pipeline, self._settings.grace, self._hurry)
                    await self._pipeline.close(HAND_BACK)
                    if self._history is not None:
                        await self._history.close(self._in_flight)
                listener.cancel_scope.cancel()
        finally:
            for run in await self._pipeline.tasks.close(LAST_CALL):
                if not run.stuck:
                    self._stuck(run)
            self._lease.stop()

    def _start_schedules(self, loops: TaskGroup) -> None:
        if self._app.schedules:
            ticks = CronLoop(self._broker, self._app.schedules, self._settings, self._stopping, seal=self._stages.tick)
            loops.start_soon(ticks.run)
        kept = ScheduleLoop(
            self._broker.schedules, self._queues, self._settings, self._stopping, self.worker_id,
            seal=self._stages.tick,
        )  # fmt: skip
        loops.start_soon(kept.run)

    async def _announce(self) -> None:
        """Say that this worker is ready, as /readyz judges it: no earlier may another one retire for it."""
        while self._lease.renewed_at is None:
            with anyio.move_on_after(FIRST_BEAT):
                await self._stopping.wait()
                return
        self._health.open()
        self.ready.set()

    async def _clean_up(self) -> None:
        """Leave nothing behind: no pending entry, no consumer, no heartbeat."""
        with anyio.move_on_after(5):
            # The thread may be in a command; its heartbeat must not outlive us.
            await anyio.to_thread.run_sync(self._lease.join, abandon_on_cancel=True)
        try:
            await take_leave(self._broker, self._executor, self._in_flight)
        except Exception as error:  # noqa: BLE001 - whatever keeps us from handing back: the leases will run out
            log.error("hand_back_failed", worker_id=self.worker_id, jobs=len(self._in_flight), error=str(error))
            self._error = self._error or HandBackFailed(
                f"{len(self._in_flight)} jobs could not be handed back ({error}): they run elsewhere after their lease"
            )

    # -- what the stages report

    def _stuck(self, run: Execution) -> None:
        name, where = run.registration.name if run.registration is not None else run.kind, stacks.of_run(run)
        log.error("handler_stuck", worker_id=self.worker_id, handler=name, job_id=run.job_id, where=where)
        why = f"{name} would not end when it was told to: this process must end, start another (it stands at {where})"
        self._health.stuck = why
        if not isinstance(self._error, StuckThread):
            self._error = StuckThread(why)
        self._stopping.set()

    def _refused(self, error: ConfigurationError) -> None:
        """The server refuses this worker for good: only an operator can change that, and sees it by the restarts."""
        self._error = self._error or error
        log.error("worker_refused", worker_id=self.worker_id, error=str(error))
        self._stopping.set()

    def _report(self) -> dict[str, str | int | float]:
        report = heartbeat(self._settings, self._queues, self._started, self._in_flight, self._lease)
        aside = [
            f"{jobs} jobs of {queue} cannot be settled, see its log"
            for queue, jobs in self._pipeline.settler.refused.items()
        ]
        return {**report, "notice": "; ".join(filter(None, [*aside, self._pipeline.fetcher.notice]))}

    # -- stops and signals

    async def _unblock(self) -> None:
        """At shutdown, end the blocking read."""
        await self._stopping.wait()
        self._shared.stopping = True
        self._promoter.wake()
        self._in_flight.stir()
        await end_reading(self._broker, self._pipeline.fetcher.ended)

    def _signalled(self, number: int) -> None:
        if self._retired or not self._stopping.is_set():
            log.info("worker_stopping", worker_id=self.worker_id, signal=signal.Signals(number).name)
            self._retired = False
            self._stopping.set()
        else:
            log.warning("worker_hurrying", worker_id=self.worker_id, signal=signal.Signals(number).name)
            self._signal = number
            self._hurry.set()

    def _in_forked_child(self) -> None:
        """Called in a process that one of our handlers forked: its copy of this worker must not settle anything."""
        self._health.close_in_forked_child()
        if self._main_begun:
            self._pipeline.completion.close_in_forked_child()
            self._pipeline.tasks.abandon_waiting()  # the event loop's turn that forked must not start what waits

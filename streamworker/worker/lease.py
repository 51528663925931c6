"""LeaseKeeper: the thread that renews claims, writes the heartbeat, finds cancelled jobs, and watches the event loop.

It has an event loop and a connection of its own, so that a handler that blocks the worker's event loop keeps its lease
and is named in the log. A handler that runs past its deadline is renewed no more: hung is not slow. C code that keeps
the interpreter lock stops this thread, too: a small process beside the worker renews meanwhile, see `renewer`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from time import monotonic
from typing import Final, Protocol

import anyio
import msgspec

from streamworker.broker import Broker, Heartbeats, Signals
from streamworker.execution import Execution
from streamworker.handlers import Registration
from streamworker.job import Progress
from streamworker.settings import Settings
from streamworker.telemetry.logs import get_logger
from streamworker.worker import renewer, signals
from streamworker.worker.inflight import InFlight, LeasedSet
from streamworker.worker.job_task import JobTask

log = get_logger("streamworker.lease")

BLOCKED_AFTER: Final = 1.0
"""Seconds without an answer from the event loop after which the blocking handler is named."""
YOUNG: Final = 1.0
"""Seconds from which on a heartbeat names the job that has run longest."""
LOOK: Final = 1.0
"""Most seconds between looks whether running jobs were cancelled; a notification asks for one at once."""
TELL: Final = 1.0
"""Seconds between two writes of the progress of jobs."""
LONG: Final = 0.5
"""Seconds after which a run is looked up without a notification: shorter ones cost nothing this way."""
UNBOUNDED: Final = 3600.0
"""Seconds for which a worker may be silent that has a handler without a timeout."""
RESTART: Final = 60.0
"""Seconds before a renewing process that ended, or could not be started, is started again."""
ENDS: Final = 2.0
"""Seconds it may take to end."""
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
Report = dict[str, str | int | float]


class LongestRun(msgspec.Struct, frozen=True, array_like=True):
    """The job that has run longest on a worker, or the one that blocks its event loop.

    Attributes:
        queue: its queue.
        kind: its kind.
        job_id: its id.
        seconds: since its handler was called.
        blocks: it blocks the event loop.
    """

    queue: str
    kind: str
    job_id: str
    seconds: float
    blocks: bool


def longest_silence(handlers: Iterable[Registration], grace: float) -> float:
    """Seconds a job of these handlers may run and overrun; after such a silence its worker counts as hung for good."""
    timeouts = [UNBOUNDED if each.limits.timeout is None else each.limits.timeout for each in handlers]
    return max(timeouts, default=0.0) + grace


class RenewalProcess:
    """The process that renews while this one cannot; used only by the lease thread.

    Args:
        told: what it has to know, see `Broker.standby`; ``None``: there is nothing it could do.
    """

    def __init__(self, told: Callable[[], bytes | None]) -> None:
        self._told = told
        self._process: subprocess.Popen[bytes] | None = None
        self._start_at = 0.0
        self._sent = self._unsent = b""

    def sign(self) -> None:
        """The worker lives, and has just renewed by itself."""
        told = self._told()
        if told is None or not self._runs():
            return
        if not self._unsent or told != self._sent:
            self._unsent += (b"" if told == self._sent else told) + b"\n"
            self._sent = told
        self.flush()

    def flush(self) -> None:
        """Send what the pipe did not take before; never waits."""
        if self._process is None or self._process.stdin is None or not self._unsent:
            return
        try:
            self._unsent = self._unsent[os.write(self._process.stdin.fileno(), self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # it has ended: the next sign starts another
            self._unsent = b""

    def end(self) -> None:
        """Let it end, and wait for that."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            process.wait(ENDS)
        except subprocess.TimeoutExpired:
            process.kill()

    def _runs(self) -> bool:
        if self._process is not None and self._process.poll() is None:
            return True
        now = monotonic()
        if now < self._start_at or getattr(sys, "frozen", False) or not sys.executable:
            return False
        if self._process is not None:
            self.end()
        self._start_at, self._sent, self._unsent = now + RESTART, b"", b""
        command = [sys.executable, "-I", "-S", "-B", renewer.__file__, str(os.getpid())]
        try:
            # A session of its own: a terminal's Ctrl-C is not for it.
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, a file of ours
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            hint = "code that keeps the interpreter lock for longer than a lease loses its claim"
            log.warning("renewal_process_failed", error=str(error), hint=hint)
            return False
        if self._process.stdin is not None:
            os.set_blocking(self._process.stdin.fileno(), False)
        return True


class LeaseBroker(Broker, Heartbeats, Signals, Protocol):
    """The roles of a broker that the lease thread calls."""


class LeaseKeeper:
    """Renews every third of a lease; beats the heart at the same time.

    Args:
        broker: whose `renew` and `beat` are called, on the thread's event loop.
        lease: seconds.
        held: what this worker holds; told of claims that were lost, and of those whose jobs were cancelled.
        report: what the heartbeat tells.
        longest: seconds a job of this worker may run and overrun: after such a silence it counts as hung for good.
    """

    def __init__(
        self,
        broker: LeaseBroker,
        *,
        lease: float,
        held: LeasedSet,
        report: Callable[[], Report],
        longest: float,
    ) -> None:
        self._broker = broker
        self._interval = lease / 3
        self._process = RenewalProcess(lambda: broker.standby(longest))
        self._held = held
        self._runs = held.runs
        self._report = report
        self._stopping = False
        self._wake = asyncio.Event()
        self._told = False
        self._look_at = self._pause_until = self._tell_at = 0.0
        self._progress: dict[str, Progress] = {}
        self._thread: threading.Thread | None = None
        self._own_loop: asyncio.AbstractEventLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._answered = 0.0
        self._asked = 0.0
        self._warned_at = 0.0
        self.loop_lag = 0.0
        """Seconds the event loop last took to answer."""
        self.renewed_at: float | None = None
        """When the server last answered this thread (time.monotonic)."""
        self.trouble: str | None = None
        """Why it did not the last time."""
        self._failing: dict[str, float] = {}
        """What has failed since when, by its log event: said once an outage."""

    def start(self) -> None:
        """Start the thread; call it on the event loop."""
        self._loop, self._own_loop = asyncio.get_running_loop(), asyncio.new_event_loop()
        self._loop_thread = threading.get_ident()
        # In a copy of this context: its lines are this worker's, too.
        target, args = copy_context().run, (self._main, self._own_loop)
        self._thread = threading.Thread(target=target, args=args, name="streamworker-lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tell the thread to end; renewals stop with it."""
        self._stopping = True
        self._stir()

    def look(self) -> None:
        """A job was cancelled that may be ours: look now."""
        self._told = True
        self._stir()

    def join(self) -> None:
        """Wait for the thread to end."""
        if self._thread is not None:
            self._thread.join()

    def _stir(self) -> None:
        if self._own_loop is not None:
            with suppress(RuntimeError):  # it is closed: the thread has ended
                self._own_loop.call_soon_threadsafe(self._wake.set)

    def _main(self, loop: asyncio.AbstractEventLoop) -> None:
        signals.leave_to_main()
        try:
            loop.run_until_complete(self._keep())
        finally:
            loop.close()

    async def _keep(self) -> None:
        next_renewal = 0.0
        while True:
            now = monotonic()
            if now >= next_renewal:
                # After a failure soon again: the lease runs down meanwhile.
                next_renewal = now + (self._interval if await self._renew(now) else min(self._interval, 0.5))
            self._process.flush()
            await self._look_at_marks(monotonic())
            await self._tell_progress(monotonic())
            self._look_at_loop()
            with anyio.move_on_after(min(self._interval, 0.25, max(0.01, next_renewal - monotonic()))):
                await self._wake.wait()
            self._wake.clear()
            if self._stopping:
                self._process.end()
                await self._broker.leave_thread()
                return

    async def _renew(self, now: float) -> bool:
        claims = [run.claim for run in self._runs() if not run.settling and not run.overdue(now)]
        try:
            lost = await self._broker.renew(claims) if claims else []
            if lost:  # before the heartbeat, which may fail by itself
                self._call(lambda: self._held.lost(lost))
            if self._held.permits is not None:
                gone = set(lost)
                await self._held.permits.retain([claim for claim in claims if claim not in gone])
            self._process.sign()  # before anything else at the start: a first job may hold the interpreter lock
            await self._broker.beat(self._report())
        except Exception as error:  # noqa: BLE001 - whatever it is, the leases run down: say it and try again
            self.trouble = str(error) or type(error).__name__
            self._failed("renewal_failed", claims=len(claims), error=self.trouble)
            return False
        self.renewed_at, self.trouble = monotonic(), None
        if (since := self._failing.pop("renewal_failed", None)) is not None:
            log.info("renewal_back", seconds=round(monotonic() - since, 1))
        return True

    def _failed(self, event: str, **facts: int | str) -> None:
        """Log a failure, once until it works again: it is tried twice a second."""
        if event not in self._failing:
            self._failing[event] = monotonic()
            log.warning(event, **facts)

    async def _look_at_marks(self, now: float) -> None:
        """Whether what is held was cancelled: all of it after a notification, else what has run for long."""
        told = self._told
        if now < self._look_at and not (told and now >= self._pause_until):
            return
        self._told, self._look_at = False, now + LOOK
        asked = [
            run.claim
            for run in self._runs()
            if run.outcome is None
            and not run.settling
            and run.cause is None
            and (told or (run.started is not None and now - run.started > LONG))
        ]
        if not asked:
            return
        try:
            found = await self._broker.cancelled(asked)
        except Exception as error:  # noqa: BLE001 - whatever it is: the next look tells
            self._told, self._pause_until = self._told or told, now + LOOK
            self._failed("cancelled_unknown", claims=len(asked), error=str(error))
            return
        self._failing.pop("cancelled_unknown", None)
        if found:
            self._call(lambda: self._held.cancelled(found))

    async def _tell_progress(self, now: float) -> None:
        """Store the progress that handlers reported since the last time, and delete that of jobs that have ended."""
        if now < self._tell_at:
            return
        self._tell_at = now + TELL
        reported: dict[str, Progress] = {}
        for run in self._runs():
            if run.context is not None and run.outcome is None and (word := run.context.reported) is not None:
                reported[run.job_id] = word
        new = {job_id: word for job_id, word in reported.items() if self._progress.get(job_id) is not word}
        ended = self._progress.keys() - reported.keys()
        if not new and not ended:
            return
        try:
            await self._broker.progress(new, ended)
        except Exception as error:  # noqa: BLE001 - it is written with the next one
            self._failed("progress_untold", jobs=len(new), error=str(error))
            return
        self._failing.pop("progress_untold", None)
        self._progress = reported

    def _look_at_loop(self) -> None:
        if self._asked <= self._answered:
            self.loop_lag = max(0.0, self._answered - self._asked)
            self._asked = monotonic()
            self._call(self._answer)
            return
        blocked = monotonic() - self._asked
        self.loop_lag = blocked
        if blocked > BLOCKED_AFTER and blocked > 2 * (self._warned_at - self._asked):
            self._warned_at = monotonic()
            self._name_blocker(blocked)

    def _answer(self) -> None:
        self._answered = monotonic()

    def longest(self) -> LongestRun | None:
        """What an operator looks for first when a worker is busy; ``None`` while every job is young."""
        blocker = self._blocker() if self.loop_lag > BLOCKED_AFTER else None
        runs = [run for run in self._runs() if run.started is not None and run.outcome is None]
        run = blocker or min(runs, key=lambda run: run.started or 0.0, default=None)
        if run is None or run.started is None or (seconds := monotonic() - run.started) < YOUNG:
            return None
        return LongestRun(run.claim.queue, run.kind, run.job_id, round(seconds, 1), blocker is not None)

    def _blocker(self) -> Execution | None:
        task = asyncio.current_task(self._loop)
        return next((run for run in self._runs() if _is_in(run, task)), None)

    def _name_blocker(self, blocked: float) -> None:
        run = self._blocker()
        frame = sys._current_frames().get(self._loop_thread)
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "unknown"
        handler = run.registration.name if run is not None and run.registration is not None else "unknown"
        log.warning(
            "event_loop_blocked",
            seconds=round(blocked, 1),
            handler=handler,
            job_id=run.job_id if run is not None else None,
            where=where,
            hint="make the handler a plain function (it then runs in a thread), or await in it",
        )

    def _call(self, function: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)


def _is_in(run: Execution, task: asyncio.Task[object] | None) -> bool:
    """Whether a run is what this task is at: its task is known once its first step is over."""
    if run.outcome is not None or run.started is None or not isinstance(task, JobTask):
        return False
    return run.task is task or run.task is None


def rss_bytes() -> int:
    """Resident memory of this process in bytes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def heartbeat(
    settings: Settings, queues: Sequence[str], started: float, in_flight: InFlight, lease: LeaseKeeper
) -> Report:
    """The fields of one heartbeat."""
    counts, spinning, longest = in_flight.counts, in_flight.spinning(), lease.longest()
    return {
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "started": round(started, 3),
        "mode": settings.mode,
        "queues": ",".join(queues),
        "running": min(in_flight.busy, settings.concurrency),
        "done": counts.done,
        "failed": counts.failed,
        "retried": counts.retried,
        "dead": counts.dead,
        "recovered": counts.recovered,
        "lost": counts.lost,
        "rss": rss_bytes(),
        "loop_lag": round(lease.loop_lag, 4),
        "longest": "" if longest is None else msgspec.json.encode(longest).decode(),
        "spinning": "" if spinning is None else msgspec.json.encode(spinning).decode(),
    }

"""The gate between decoding and running, for kinds with limits: asks the broker who may run now, and gives holds back.

Group commit, as in the settle loop: while one question is on its way the next gathers. Kinds without limits never come
here, and without any such kind there is no gate.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
from collections.abc import Callable, Collection
from time import time
from typing import Any, Final, Protocol

import anyio
import msgspec

from streamworker import codec
from streamworker.broker import Limiter, ServerClock
from streamworker.errors import Unreachable
from streamworker.execution import Execution
from streamworker.handlers import Handlers
from streamworker.job import Claim, Deferred, Postponed
from streamworker.limits import AcquireRequest, AcquireResult, Limit, Permit, Quota
from streamworker.loops import Pause
from streamworker.telemetry.logs import get_logger
from streamworker.worker.batching import Batcher, BatchExecution

log = get_logger("streamworker.worker")


class AdmissionBroker(Limiter, ServerClock, Protocol):
    """The roles of a broker that admission calls."""


class DueCheck:
    """Lets runs with a ``run_at`` through when it has come by the server's clock; this machine's may be wrong.

    Group commit, as at the gate: while one question is on its way the next gathers.

    Args:
        broker: asked.
        put: starts a run that may run; it is prepared again then.
        finished: told of runs that have an outcome: it is not their time yet.
    """

    def __init__(
        self, broker: AdmissionBroker, put: Callable[[Execution], None], finished: Callable[[Execution], None]
    ) -> None:
        self._broker, self._put, self._finished = broker, put, finished
        self._waiting: list[Execution] = []
        self._wake = asyncio.Event()
        self._closing = anyio.Event()
        self._give_up_at = float("inf")

    def may_run(self, run: Execution) -> bool:
        """Whether the run need not be asked about; if it must, it waits here until it gets an answer."""
        if run.due or run.reading is None or run.reading.run_at is None or isinstance(run, BatchExecution):
            return True
        self._waiting.append(run)
        self._wake.set()
        return False

    def abandon_waiting(self) -> list[Execution]:
        """Runs that wait for an answer; they do not wait any more afterwards."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def close(self, within: float) -> None:
        """End the loop when nothing waits, at the latest in ``within`` seconds."""
        self._give_up_at = anyio.current_time() + within
        self._closing.set()
        self._wake.set()

    async def run(self) -> None:
        """Ask until closed; an error is followed by a pause, and the question asked again."""
        pause = Pause(longest=5.0)
        while self._waiting or not self._closing.is_set():
            if not self._waiting:
                await self._wake.wait()
                self._wake.clear()
                continue
            try:
                await self._turn(self._waiting[0].claim.queue)
                pause.reset()
            except Exception as error:  # noqa: BLE001 - a main loop never crashes; what waits is asked about again
                if not isinstance(error, Unreachable):
                    log.error("due_check_failed", jobs=len(self._waiting), error=str(error))
                await pause.wait(self._closing, least=0.2)
            if anyio.current_time() > self._give_up_at:
                return

    async def _turn(self, queue: str) -> None:
        """One question, about all runs of one queue that wait when it is asked."""
        asked = {run for run in self._waiting if run.claim.queue == queue}
        now = await self._broker.clock(queue)
        mine = [run for run in self._waiting if run in asked]  # others were handed back meanwhile
        self._waiting = [run for run in self._waiting if run not in asked]
        for run in mine:
            left = ((codec.when(run.reading) if run.reading is not None else None) or 0.0) - now
            if left > 0 and run.outcome is None:
                run.outcome = Postponed(time() + left)  # parking counts from now on, by whatever this clock shows
            if run.outcome is not None:  # or its claim was lost
                self._finished(run)
                continue
            run.due, run.facts = True, None
            self._put(run)


class Admission:
    """Asked before a run starts that is `Execution.special`; costs nothing where there are none.

    Args:
        broker: knows about limits, and what time it is.
        handlers: whether any kind has one, or is called for several jobs at once.
        limit: jobs that the worker runs at once.
        isolate: asked before a suspect runs; False puts it aside for later.
        put: starts a run.
        finished: told of runs that have an outcome without having run.
    """

    def __init__(
        self,
        broker: AdmissionBroker,
        handlers: Handlers[object],
        *,
        limit: int,
        isolate: Callable[[Execution], bool],
        put: Callable[[Execution], None],
        finished: Callable[[Execution], None],
    ) -> None:
        self._isolate = isolate
        limited = any(registration.quota is not None for registration in handlers.registrations)
        gathering = any(registration.together is not None for registration in handlers.registrations)
        self._finished = finished
        self._due = DueCheck(broker, put, finished)
        self._gate = LimitGate(broker, put, finished) if limited else None
        self._batches = Batcher(limit, put, finished) if gathering else None
        self.kept: Callable[[Collection[Claim]], None] | None = self._gate.retain if self._gate is not None else None
        """What the lease thread renews along with claims."""

    def may_run(self, run: Execution) -> bool:
        """Whether a prepared special run may run now; if not, it waits here or elsewhere, and comes again."""
        if not self._due.may_run(run):
            return False
        if run.suspect and not self._isolate(run):
            return False
        if self._gate is not None and not self._gate.may_run(run):
            return False
        return self._batches is None or self._batches.may_run(run)

    def left(self, run: Execution) -> bool:
        """A special run has its outcome. True if it stood for others, which are finished by that, each for itself."""
        if isinstance(run, BatchExecution):
            for item in run.disperse():
                self._finished(item)
            return True
        if self._gate is not None:
            self._gate.leave(run)
        return False

    def abandon_waiting(self) -> list[Execution]:
        """Runs that wait here; they do not wait any more afterwards."""
        waiting = self._due.abandon_waiting()
        waiting += self._gate.abandon_waiting() if self._gate is not None else []
        return waiting + (self._batches.abandon_waiting() if self._batches is not None else [])

    async def run(self) -> None:
        """Run until closed."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._due.run)
            if self._gate is not None:
                group.start_soon(self._gate.run)

    def close(self, within: float) -> None:
        """End it when all is given back, at the latest in ``within`` seconds."""
        self._due.close(within)
        if self._gate is not None:
            self._gate.close(within)


MOST: Final = 200
"""Most jobs of one question."""
SHORTEST_PAUSE: Final = 0.2
LONGEST_AWAY: Final = 5.0
LONGEST_PAUSE: Final = 30.0
"""Seconds before a queue is asked about again that could not be: whose server is away, or whose keys are not usable."""
ASK_LATER: Final = 5.0
"""Least seconds after which a job asks again that could not be asked about."""
LONGEST_VALUE: Final = 100
"""Characters of a value in the name of a key; longer ones stand there as a digest."""


class LimitGate:
    """Lets runs of kinds with limits through when it is their turn.

    Args:
        broker: asked.
        put: starts a run that may run.
        finished: told of runs that have an outcome: it is not their turn yet.
    """

    def __init__(
        self, broker: Limiter, put: Callable[[Execution], None], finished: Callable[[Execution], None]
    ) -> None:
        self._broker = broker
        self._put = put
        self._finished = finished
        self._asking: dict[Execution, AcquireRequest] = {}
        self._leaving: list[Permit] = []
        self._holds: dict[tuple[str, bytes], Permit] = {}
        self._pauses: dict[str, tuple[float, float]] = {}
        """Queues that could not be asked about: until when nobody asks again, and how long that pause is."""
        self._broken: set[str] = set()
        self._wake = asyncio.Event()
        self._closing = anyio.Event()
        self._give_up_at = float("inf")

    def may_run(self, run: Execution) -> bool:
        """Whether this prepared run has got its turn; if not, it waits here until it gets an answer."""
        if run.passed:
            return True
        asking = asking_of(run)
        if asking is None:
            return True
        self._asking[run] = asking
        self._wake.set()
        return False

    def leave(self, run: Execution) -> None:
        """The run has ended: its place is free. A thread that still runs keeps it until it lapses."""
        hold = self._holds.pop((run.claim.place, run.claim.entry), None)
        if hold is not None and not run.in_thread:
            self._leaving.append(hold)
            self._wake.set()

    def retain(self, claims: Collection[Claim]) -> None:
        """Renew what is held by runs of these claims; from the lease thread, after their leases."""
        find = self._holds.get
        holds = [hold for claim in claims if (hold := find((claim.place, claim.entry))) is not None]
        if holds:
            self._broker.renew_permits(holds)

    def abandon_waiting(self) -> list[Execution]:
        """Runs that wait for an answer; they do not wait any more afterwards."""
        waiting = list(self._asking)
        self._asking = {}
        return waiting

    def close(self, within: float) -> None:
        """End the loop when every hold is given back, at the latest in ``within`` seconds."""
        self._give_up_at = anyio.current_time() + within
        self._closing.set()
        self._wake.set()

    async def run(self) -> None:
        """Ask until closed. A queue that cannot be asked about is asked about again after a pause; the others go on."""
        while True:
            self._put_off()
            queue = self._next()
            if queue is None:
                if self._closing.is_set() and not self._asking and not self._leaving:
                    return
                with anyio.move_on_after(self._until_next()):
                    await self._wake.wait()
                self._wake.clear()
            else:
                try:
                    await self._turn(queue)
                    self._pauses.pop(queue, None)
                    self._broken.discard(queue)
                except Exception as error:  # noqa: BLE001 - a main loop never crashes; what waits is asked about again
                    self._failed(queue, error)
            if anyio.current_time() > self._give_up_at:
                return

    def _next(self) -> str | None:
        """The queue whose turn it is: holds are given back first, then in order of arrival."""
        now = anyio.current_time()
        for limit in itertools.chain(
            (hold.limit for hold in self._leaving), (asking.limit for asking in self._asking.values())
        ):
            pause = self._pauses.get(limit.queue)
            if pause is None or pause[0] <= now:
                return limit.queue
        return None

    def _until_next(self) -> float | None:
        """Seconds until a queue may be asked about again."""
        if not self._asking and not self._leaving:
            return None
        soonest = min((at for at, _ in self._pauses.values()), default=0.0)
        return max(0.01, min(soonest, self._give_up_at) - anyio.current_time())

    def _failed(self, queue: str, error: Exception) -> None:
        """Nobody of the queue may run now. Unless its server is away, they wait in Redis, and not in our slots."""
        _, before = self._pauses.get(queue, (0.0, 0.0))
        away = isinstance(error, Unreachable)
        pause = min(LONGEST_AWAY if away else LONGEST_PAUSE, max(SHORTEST_PAUSE, 2 * before))
        self._pauses[queue] = (anyio.current_time() + pause, pause)
        if away:
            return
        log.error("limits_failed", queue=queue, error=str(error), pause=round(pause, 1))
        self._broken.add(queue)
        if self._closing.is_set():  # they lapse by themselves
            self._leaving = [hold for hold in self._leaving if hold.limit.queue != queue]

    def _put_off(self) -> None:
        """Jobs of queues whose keys are not usable wait in Redis, and not in our slots."""
        if not self._broken:
            return
        now = anyio.current_time()
        waiting = [(run, each) for run, each in self._asking.items() if each.limit.queue in self._broken]
        for run, each in waiting:
            at, _ = self._pauses.get(each.limit.queue, (0.0, 0.0))
            if at > now:
                del self._asking[run]
                run.outcome = run.outcome or Deferred(time() + max(at - now, ASK_LATER), each.turn, "")
                self._finished(run)

    async def _turn(self, queue: str) -> None:
        """One question, of one queue."""
        leaving = [hold for hold in self._leaving if hold.limit.queue == queue][:MOST]
        asking = [(run, each) for run, each in self._asking.items() if each.limit.queue == queue][:MOST]
        answers = await self._broker.acquire(queue, [each for _, each in asking], leaving)
        given = set(leaving)
        self._leaving = [hold for hold in self._leaving if hold not in given]
        for (run, _), answer in zip(asking, answers, strict=True):
            self._answer(run, answer)

    def _answer(self, run: Execution, answer: AcquireResult) -> None:
        mine = self._asking.pop(run, None) is not None  # else it was handed back meanwhile
        runs = mine and run.outcome is None  # else its claim was lost
        if answer.hold is not None and answer.hold.limit.concurrency:
            if runs:
                self._holds[run.claim.place, run.claim.entry] = answer.hold
            else:
                self._leaving.append(answer.hold)
        if runs and answer.hold is not None:
            run.passed = True
            self._put(run)
        elif mine:
            run.outcome = run.outcome or Deferred(time() + answer.wait, answer.turn, answer.member)
            self._finished(run)


def asking_of(run: Execution) -> AcquireRequest | None:
    """What a prepared run has to ask; ``None`` if its kind has no limit."""
    registration, reading = run.registration, run.reading
    if registration is None or reading is None or registration.quota is None:
        return None
    quota = registration.quota
    name = limit_name(registration.kind, quota, run.payload)
    limit = Limit(run.claim.queue, name, quota.concurrency, quota.gap, quota.burst)
    return AcquireRequest(
        run.claim, limit, run.job_id, secrets.token_hex(4), codec.state_of(reading, run.claim.secret).turn
    )


def limit_name(kind: str, quota: Quota, payload: Any) -> str:
    """The end of the names of a limit's keys: the kind, and the value that it is limited by."""
    name = kind.replace("%", "%25").replace(":", "%3A")  # so that no kind can be another one with a value
    if not quota.limit_by:
        return name
    value = getattr(payload, quota.limit_by)
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if len(text) > LONGEST_VALUE or not text.isprintable():
        text = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{name}:{text}"

"""Admission: decides when a prepared job may start: its run_at and expires_at, the limits of its kind, its batch.

Jobs without any of these go straight to their task. The others pass the stages they need, once each, in this order:
`DueCheck`, `OrderGate`, `LimitGate`, `HeldGate`, `Batcher`. All but the last are group commits, as the settler is:
while one request is under way the next gathers.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import monotonic, time
from typing import Any, Final, Protocol

import anyio
import msgspec

from streamworker import codec
from streamworker.broker import HeldKeys, Limiter, OrderKeys, ServerClock
from streamworker.errors import Unreachable
from streamworker.execution import CANCELLED, EXPIRED, OUT_OF_TURN, Execution
from streamworker.handlers import Handlers, Registration
from streamworker.job import Deferred, Outcome, Postponed, UnknownKind
from streamworker.limits import AcquireRequest, AcquireResult, Limit, Quota
from streamworker.loops import Pause
from streamworker.payload import PayloadStore, StoredPayload
from streamworker.redact import describe
from streamworker.telemetry.logs import get_logger
from streamworker.worker.batching import BatchExecution
from streamworker.worker.executor import Executor
from streamworker.worker.inflight import Permits
from streamworker.worker.tasks import Completion, JobTasks

log = get_logger("streamworker.worker")

MOST: Final = 200
"""Most jobs of one request."""
SHORTEST_PAUSE: Final = 0.2
LONGEST_AWAY: Final = 5.0
LONGEST_PAUSE: Final = 30.0
"""Seconds before a failed request for a queue is repeated: with its server away, and with keys that are not usable."""
ASK_LATER: Final = 5.0
"""Least seconds for which a job is deferred whose limit cannot be asked for."""
MOST_LOADS: Final = 20
"""Most payloads that are read from a store at once."""
LONGEST_VALUE: Final = 100
"""Characters of a value in the name of a key; longer values stand there as a digest."""


class AdmissionBroker(Limiter, OrderKeys, ServerClock, HeldKeys, Protocol):
    """The roles of a broker that admission calls."""


class Admission:
    """Passes a prepared job to its task at once, or through the stages that decide when it may start.

    Args:
        broker: knows limits and the servers' clocks.
        handlers: whether a kind has a limit or a batch. A stage that no kind needs is left out.
        executor: decodes payloads that are due.
        tasks: the last of these stages' successor.
        completion: takes jobs that get an outcome here: they do not start now.
        permits: what jobs hold of limits; ``None`` if no kind has one.
        store: has payloads that are too large for a document, if there is one.
    """

    def __init__(
        self,
        broker: AdmissionBroker,
        handlers: Handlers[Any],
        executor: Executor,
        tasks: JobTasks,
        completion: Completion,
        *,
        permits: Permits | None,
        concurrency: int,
        store: PayloadStore | None = None,
    ) -> None:
        batches = any(registration.together is not None for registration in handlers.registrations)
        self._tasks = tasks
        self._batcher = Batcher(concurrency, tasks, completion) if batches else None
        self._held_gate = HeldGate(broker, self._batcher or tasks, completion)
        self._gate = LimitGate(broker, permits, self._held_gate, completion) if permits is not None else None
        self._order_gate = OrderGate(broker, self._gate or self._held_gate, completion)
        self._load_gate = None if store is None else LoadGate(store, executor, self._order_gate, completion)
        self._due_check = DueCheck(broker, executor, self._load_gate or self._order_gate, completion)
        gates = (self._due_check, self._load_gate, self._order_gate, self._gate, self._held_gate)
        self._gates: Final = [gate for gate in gates if gate is not None]

    def put_all(self, runs: Sequence[Execution]) -> None:
        """Take prepared runs in."""
        self._tasks.put_all([run for run in runs if not run.special])
        for run in [run for run in runs if run.special]:
            self.put(run)

    def put(self, run: Execution) -> None:
        """Take a prepared run in."""
        if run.special and (run.outcome is None or type(run.outcome) is UnknownKind):
            self._due_check.put(run)
        else:
            self._tasks.put(run)

    def abandon_waiting(self) -> list[Execution]:
        """Remove and return the runs that wait here."""
        waiting = [run for gate in self._gates for run in gate.abandon_waiting()]
        return waiting + (self._batcher.abandon_waiting() if self._batcher is not None else [])

    async def run(self) -> None:
        """Run until closed."""
        async with anyio.create_task_group() as group:
            for gate in self._gates:
                group.start_soon(gate.run)

    def close(self, within: float) -> None:
        """End when every permit is given back, at the latest in ``within`` seconds."""
        for gate in self._gates:
            gate.close(within)


class Successor(Protocol):
    """What takes a run in when the stage before it has admitted it."""

    def put(self, run: Execution) -> None:
        """Take a run in."""


class Gate(ABC):
    """Admits runs by what the broker answers about all of one queue that wait: a group commit.

    Args:
        successor: the next stage.
        completion: takes jobs that do not start now.
    """

    def __init__(self, successor: Successor, completion: Completion) -> None:
        self._successor = successor
        self._completion = completion
        self._waiting: list[Execution] = []
        self._pauses: dict[str, Pause] = {}
        self._paused_until: dict[str, float] = {}
        """Queues and partitions whose last request failed, to when they are asked again."""
        self._wake = asyncio.Event()
        self._closing = anyio.Event()
        self._give_up_at = float("inf")

    def _wait(self, run: Execution) -> None:
        self._waiting.append(run)
        self._wake.set()

    def abandon_waiting(self) -> list[Execution]:
        """Remove and return the runs that wait for an answer."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def close(self, within: float) -> None:
        """End the loop when no run waits, at the latest in ``within`` seconds."""
        self._give_up_at = anyio.current_time() + within
        self._paused_until.clear()
        self._closing.set()
        self._wake.set()

    async def run(self) -> None:
        """Ask until closed. After an error the runs of that queue or partition pause; the others go on."""
        while self._waiting or not self._closing.is_set():
            now = anyio.current_time()
            run = next((each for each in self._waiting if self._paused_until.get(each.claim.home, 0.0) <= now), None)
            if run is None:
                soonest = min((self._paused_until[each.claim.home] for each in self._waiting), default=math.inf)
                with anyio.move_on_after(max(0.01, min(soonest, self._give_up_at) - now)):
                    await self._wake.wait()
                self._wake.clear()
                continue
            home = run.claim.home
            asked = [each for each in self._waiting if each.claim.home == home]
            try:
                await self._turn(home, asked)
                self._pauses.pop(home, None)
            except Exception as error:  # noqa: BLE001 - a main loop never crashes; the request is repeated
                if not isinstance(error, Unreachable):
                    log.error("admission_failed", queue=home, jobs=len(asked), error=str(error))
                pause = self._pauses.setdefault(home, Pause(longest=5.0)).next()
                self._paused_until[home] = anyio.current_time() + (0.2 if self._closing.is_set() else pause)
            if anyio.current_time() > self._give_up_at:
                return

    def _taken(self, asked: list[Execution]) -> set[Execution]:
        """Those of the runs that still wait, which are removed: others were handed back meanwhile."""
        waiting, wanted = set(self._waiting), set(asked)
        self._waiting = [run for run in self._waiting if run not in wanted]
        return waiting & wanted

    def _admit(self, asked: list[Execution], answers: list[bool], refusal: Outcome) -> None:
        """Admit each run whose answer is yes; the others end with the refusal."""
        mine = self._taken(asked)
        for run, yes in zip(asked, answers, strict=True):
            if run in mine:
                if run.outcome is None and not yes:
                    run.outcome = refusal
                self._pass_on(run)

    def _pass_on(self, run: Execution) -> None:
        """Give a run to the next stage, unless it has an outcome: its claim may have been lost meanwhile."""
        if run.outcome is None:
            self._successor.put(run)
        else:
            self._completion.finish(run)

    @abstractmethod
    async def _turn(self, queue: str, asked: list[Execution]) -> None:
        """One request, for runs of one queue."""


class DueCheck(Gate):
    """Admits jobs with a ``run_at`` that has come and an ``expires_at`` that has not, by the server's clock.

    This machine's clock may be wrong. A job that passes and then waits for a permit or a batch is looked at once more,
    see `Execution.late`.

    Args:
        broker: knows the server's clock.
        executor: decodes the payloads of jobs that are due.
        successor: the next stage.
        completion: takes jobs that are not due yet, or have expired.
    """

    def __init__(self, broker: ServerClock, executor: Executor, successor: Successor, completion: Completion) -> None:
        super().__init__(successor, completion)
        self._broker = broker
        self._executor = executor

    def put(self, run: Execution) -> None:
        """Take a run in; one with a ``run_at`` or an ``expires_at`` waits for the server's clock."""
        reading = run.reading
        if reading is None or (reading.run_at is None and reading.expires_at is None):
            self._successor.put(run)
        else:
            self._wait(run)

    async def _turn(self, queue: str, asked: list[Execution]) -> None:
        asked_at = monotonic()
        now = await self._broker.clock(queue)
        mine = self._taken(asked)
        for run in asked:
            if run not in mine:
                continue
            self._judge(run, now, asked_at)
            if run.outcome is None:
                self._executor.decode(run)
            self._pass_on(run)

    @staticmethod
    def _judge(run: Execution, now: float, asked_at: float) -> None:
        """Give a run that must not start now its outcome.

        Args:
            run: prepared.
            now: the server's time, epoch seconds.
            asked_at: when it was asked for (time.monotonic), so that no job counts as fresh for longer than it is.
        """
        if run.reading is None or run.facts is None:
            return
        expires = codec.expiry(run.reading)
        if expires is not None:
            run.facts = msgspec.structs.replace(run.facts, expires=asked_at + expires - now)
            if run.late() and (run.outcome is None or type(run.outcome) is UnknownKind):
                run.outcome = EXPIRED
        left = (codec.when(run.reading) or 0.0) - now
        if left > 0 and run.outcome is None:
            run.outcome = Postponed(time() + left)  # relative to this machine's clock, which the settler reads


class LoadGate(Gate):
    """Admits jobs whose payloads are in a store, when they are loaded. While the store is away they wait, held.

    Args:
        store: has the payloads.
        executor: decodes them.
        successor: the next stage.
        completion: takes jobs whose payload is not there any more.
    """

    def __init__(self, store: PayloadStore, executor: Executor, successor: OrderGate, completion: Completion) -> None:
        super().__init__(successor, completion)
        self._store = store
        self._executor = executor
        self._away = ""

    def put(self, run: Execution) -> None:
        """Take a run in; one whose payload is in a store waits for it."""
        if type(run.payload) is StoredPayload:
            self._wait(run)
        else:
            self._successor.put(run)

    async def _turn(self, queue: str, asked: list[Execution]) -> None:
        over = [run for run in asked if run.outcome is not None]  # its claim was lost, or it was cancelled
        for run in over:
            if run in self._taken([run]):
                self._pass_on(run)
        some = [run for run in asked if run.outcome is None][:MOST_LOADS]
        found = await asyncio.gather(*(self._store.get(run.payload.id) for run in some), return_exceptions=True)
        loaded = {run: data for run, data in zip(some, found, strict=True) if not isinstance(data, BaseException)}
        mine = self._taken(list(loaded))
        for run, data in loaded.items():
            if run in mine:
                if run.outcome is None:
                    self._executor.load(run, data)
                self._pass_on(run)
        error = next((each for each in found if isinstance(each, BaseException)), None)
        if error is None:
            if self._away:
                log.info("payload_store_back")
            self._away = ""
            return
        if not self._away:
            log.error("payload_store_away", queue=queue, error=describe(error),
                      hint="jobs whose payloads are in the store wait until it answers")  # fmt: skip
        self._away = "away"
        # Those behind them may be of another store, or node: they have their turn before these are asked for again.
        failed = [run for run in some if run not in loaded and run in self._waiting]
        self._waiting = [run for run in self._waiting if run not in failed] + failed
        raise Unreachable("the store of payloads does not answer") from error


class OrderGate(Gate):
    """Admits jobs that hold their order key. A job that a producer of another language added past its line goes there.

    Args:
        broker: knows which jobs hold their keys.
        successor: the next stage.
        completion: takes jobs whose turn it is not.
    """

    def __init__(self, broker: OrderKeys, successor: LimitGate | HeldGate, completion: Completion) -> None:
        super().__init__(successor, completion)
        self._broker = broker

    def put(self, run: Execution) -> None:
        """Take a run in; one with an order key waits for the answer which job holds it."""
        if run.facts is None or not run.facts.order:
            self._successor.put(run)
        else:
            self._wait(run)

    async def _turn(self, queue: str, asked: list[Execution]) -> None:
        jobs = [(run.facts.order, run.job_id) for run in asked if run.facts is not None]
        self._admit(asked, await self._broker.turns(queue, jobs), OUT_OF_TURN)


class HeldGate(Gate):
    """Admits jobs whose deduplication keys are held until they have started or ended: they cannot be replaced any more.

    Args:
        broker: holds the keys.
        successor: the next stage.
        completion: takes jobs that were cancelled or replaced.
    """

    def __init__(self, broker: HeldKeys, successor: Batcher | JobTasks, completion: Completion) -> None:
        super().__init__(successor, completion)
        self._broker = broker

    def put(self, run: Execution) -> None:
        """Take a run in; one with such a key waits for the answer whether it may start."""
        if run.facts is None or not run.facts.key:
            self._successor.put(run)
        else:
            self._wait(run)

    async def _turn(self, queue: str, asked: list[Execution]) -> None:
        jobs = [
            (run.facts.key, run.job_id, run.reading is not None and run.reading.unique == "started")
            for run in asked
            if run.facts is not None
        ]
        self._admit(asked, await self._broker.begin(queue, jobs), CANCELLED)


class LimitGate:
    """Admits jobs of kinds with limits when the broker grants them a permit.

    Args:
        broker: grants permits.
        permits: what jobs hold.
        successor: the next stage.
        completion: takes jobs that get no permit now.
    """

    def __init__(self, broker: Limiter, permits: Permits, successor: HeldGate, completion: Completion) -> None:
        self._broker = broker
        self._permits = permits
        self._successor = successor
        self._completion = completion
        self._asking: dict[Execution, AcquireRequest] = {}
        self._pauses: dict[str, tuple[float, float]] = {}
        """Queues whose last request failed: until when there is no other one, and the length of that pause."""
        self._broken: set[str] = set()
        self._wake = permits.wake
        self._closing = anyio.Event()
        self._give_up_at = float("inf")

    def put(self, run: Execution) -> None:
        """Take a run in; one of a kind with a limit waits for a permit."""
        request = request_of(run)
        if request is None:
            self._successor.put(run)
            return
        self._asking[run] = request
        self._wake.set()

    def abandon_waiting(self) -> list[Execution]:
        """Remove and return the runs that wait for a permit."""
        waiting = list(self._asking)
        self._asking = {}
        return waiting

    def close(self, within: float) -> None:
        """End the loop when every permit is given back, at the latest in ``within`` seconds."""
        self._give_up_at = anyio.current_time() + within
        self._closing.set()
        self._wake.set()

    async def run(self) -> None:
        """Ask until closed. After an error the queue pauses; the others go on."""
        while True:
            self._defer_broken()
            queue = self._next()
            if queue is None:
                if self._closing.is_set() and not self._asking and not self._permits.leaving:
                    return
                with anyio.move_on_after(self._until_next()):
                    await self._wake.wait()
                self._wake.clear()
            else:
                try:
                    await self._turn(queue)
                    self._pauses.pop(queue, None)
                    self._broken.discard(queue)
                except Exception as error:  # noqa: BLE001 - a main loop never crashes; the request is repeated
                    self._failed(queue, error)
            if anyio.current_time() > self._give_up_at:
                return

    def _next(self) -> str | None:
        """The queue to ask for next: permits are given back first, then runs in order of arrival."""
        now = anyio.current_time()
        for limit in itertools.chain(
            (permit.limit for permit in self._permits.leaving), (request.limit for request in self._asking.values())
        ):
            pause = self._pauses.get(limit.queue)
            if pause is None or pause[0] <= now:
                return limit.queue
        return None

    def _until_next(self) -> float | None:
        """Seconds until the first pause of a queue is over."""
        if not self._asking and not self._permits.leaving:
            return None
        soonest = min((at for at, _ in self._pauses.values()), default=0.0)
        return max(0.01, min(soonest, self._give_up_at) - anyio.current_time())

    def _failed(self, queue: str, error: Exception) -> None:
        """No job of the queue may start now. Unless its server is away they wait in Redis, and free their places."""
        _, before = self._pauses.get(queue, (0.0, 0.0))
        away = isinstance(error, Unreachable)
        pause = min(LONGEST_AWAY if away else LONGEST_PAUSE, max(SHORTEST_PAUSE, 2 * before))
        self._pauses[queue] = (anyio.current_time() + pause, pause)
        if away:
            return
        log.error("limits_failed", queue=queue, error=str(error), pause=round(pause, 1))
        self._broken.add(queue)
        if self._closing.is_set():  # they expire
            self._permits.given_back({permit for permit in self._permits.leaving if permit.limit.queue == queue})

    def _defer_broken(self) -> None:
        """Defer the jobs of queues whose keys are not usable: they wait in Redis, and free their places."""
        if not self._broken:
            return
        now = anyio.current_time()
        waiting = [(run, each) for run, each in self._asking.items() if each.limit.queue in self._broken]
        for run, each in waiting:
            at, _ = self._pauses.get(each.limit.queue, (0.0, 0.0))
            if at > now:
                del self._asking[run]
                run.outcome = run.outcome or Deferred(time() + max(at - now, ASK_LATER), each.turn, "")
                self._completion.finish(run)

    async def _turn(self, queue: str) -> None:
        """One request, for one queue."""
        leaving = [permit for permit in self._permits.leaving if permit.limit.queue == queue][:MOST]
        asking = [(run, each) for run, each in self._asking.items() if each.limit.queue == queue][:MOST]
        answers = await self._broker.acquire(queue, [each for _, each in asking], leaving)
        self._permits.given_back(set(leaving))
        for (run, _), answer in zip(asking, answers, strict=True):
            self._answered(run, answer)

    def _answered(self, run: Execution, answer: AcquireResult) -> None:
        mine = self._asking.pop(run, None) is not None  # else it was handed back meanwhile
        runs = mine and run.outcome is None  # else its claim was lost
        if answer.hold is not None and answer.hold.limit.concurrency:
            if runs:
                self._permits.grant(run, answer.hold)
            else:
                self._permits.leaving.append(answer.hold)
        if runs and answer.hold is not None:
            if run.late():
                run.outcome = EXPIRED
                self._completion.finish(run)
            else:
                self._successor.put(run)
        elif mine:
            run.outcome = run.outcome or Deferred(time() + answer.wait, answer.turn, answer.member)
            self._completion.finish(run)


def request_of(run: Execution) -> AcquireRequest | None:
    """The request for a permit of a prepared run; ``None`` if its kind has no limit."""
    registration, reading = run.registration, run.reading
    if registration is None or reading is None or registration.quota is None:
        return None
    quota = registration.quota
    name = limit_name(registration.kind, quota, run.payload)
    limit = Limit(run.claim.home, name, quota.concurrency, quota.gap, quota.burst)
    return AcquireRequest(
        run.claim, limit, run.job_id, secrets.token_hex(4), codec.state_of(reading, run.claim.secret).turn
    )


def limit_name(kind: str, quota: Quota, payload: Any) -> str:
    """The last part of the names of a limit's keys: the kind, and the value of ``limit_by``."""
    name = kind.replace("%", "%25").replace(":", "%3A")  # so that no kind can be another one with a value
    if not quota.limit_by:
        return name
    value = getattr(payload, quota.limit_by)
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if len(text) > LONGEST_VALUE or not text.isprintable():
        text = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{name}:{text}"


class Batcher:
    """Collects jobs of one kind until the batch is full, or its first job has waited for its linger.

    Args:
        most: jobs that the worker runs at once: no batch waits for more.
        tasks: the next stage.
        completion: takes jobs that got an outcome while they waited.
    """

    def __init__(self, most: int, tasks: JobTasks, completion: Completion) -> None:
        self._most = most
        self._tasks = tasks
        self._completion = completion
        self._open: dict[Registration, list[Execution]] = {}
        self._timers: dict[Registration, asyncio.TimerHandle] = {}

    def put(self, run: Execution) -> None:
        """Take a run in; one of a kind with ``batch=`` waits for others."""
        registration = run.registration
        if registration is None or registration.together is None:
            self._tasks.put(run)
            return
        if run.suspect:
            self._tasks.put(BatchExecution([run]))  # alone
            return
        waiting = self._open.setdefault(registration, [])
        waiting.append(run)
        if len(waiting) >= min(registration.together.batch, self._most):
            self._close(registration)
        elif len(waiting) == 1:
            later = asyncio.get_running_loop().call_later
            self._timers[registration] = later(registration.together.linger, self._close, registration)

    def abandon_waiting(self) -> list[Execution]:
        """Remove and return the runs that wait for others."""
        waiting = [run for runs in self._open.values() for run in runs]
        for timer in self._timers.values():
            timer.cancel()
        self._open, self._timers = {}, {}
        return waiting

    def _close(self, registration: Registration) -> None:
        timer = self._timers.pop(registration, None)
        if timer is not None:
            timer.cancel()
        waiting = self._open.pop(registration, [])
        for run in waiting:
            if run.outcome is None and run.late():
                run.outcome = EXPIRED
            if run.outcome is not None:  # lost, cancelled or expired while it waited
                self._completion.finish(run)
        if left := [run for run in waiting if run.outcome is None]:
            self._tasks.put(BatchExecution(left))

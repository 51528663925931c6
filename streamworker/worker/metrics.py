"""Metrics of a worker for Prometheus: an observer called once a settled batch, so that a job costs two additions.

docs/observability.md has the table for people. No label holds a job's or a worker's id: labels are queues this worker
serves, kinds it has handlers for, and words from a fixed list, so that their number is bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version
from time import monotonic
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

import msgspec

from streamworker.broker import Connected, Operator
from streamworker.errors import ConfigurationError
from streamworker.job import SOON, Depth, Expire, RetryAt, Settled
from streamworker.observe import JobRun, Observer, Settlement
from streamworker.redact import redact
from streamworker.relay import LedgerGauge
from streamworker.settings import Settings
from streamworker.telemetry.exposition import CONTENT_TYPE, Family, Histogram, Numbers, render
from streamworker.telemetry.http import Answer, Route, Task
from streamworker.telemetry.logs import get_logger
from streamworker.views.groups import DeadGroups
from streamworker.worker.host import GaugeSource, WorkerHost
from streamworker.worker.inflight import InFlight
from streamworker.worker.lease import LeaseKeeper, rss_bytes
from streamworker.worker.scale import QueueSample, ScalingSignal

log = get_logger("streamworker.http")

K = TypeVar("K")
V = TypeVar("V")

UNKNOWN: Final = "unknown"
"""The label of kinds without a handler here: what the document says may be anything."""

_SECONDS: Final = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_WAITS: Final = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
_SIZES: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)

JOBS: Final = Family(
    "streamworker_jobs_total", "counter", "Runs that ended and were settled here.", ("queue", "kind", "outcome")
)
RETRIES: Final = Family("streamworker_retries_total", "counter", "Failures to be tried again.", ("queue", "kind"))
EXPIRED: Final = Family(
    "streamworker_expired_total", "counter", "Jobs that expired before they could start.", ("queue", "kind")
)
DEAD: Final = Family(
    "streamworker_dead_letters_total", "counter", "Jobs that became dead letters here.", ("queue", "kind", "outcome")
)
DURATION: Final = Family(
    "streamworker_job_duration_seconds", "histogram", "How long handlers ran.", ("queue", "kind"), _SECONDS
)
WAIT: Final = Family(
    "streamworker_queue_wait_seconds",
    "histogram",
    "From the moment a job was ready until its handler was called.",
    ("queue", "kind"),
    _WAITS,
)
BATCH: Final = Family("streamworker_settle_batch_size", "histogram", "Runs settled in one call.", (), _SIZES)
SETTLE: Final = Family("streamworker_settle_duration_seconds", "histogram", "How long settling took.", (), _SECONDS)

RUNNING: Final = Family("streamworker_running_jobs", "gauge", "Unfinished jobs that this worker holds.", ("queue",))
SLOTS: Final = Family("streamworker_slots", "gauge", "Jobs that this worker runs at most at once.")
LOST: Final = Family("streamworker_lost_leases_total", "counter", "Runs that ended when their claim was lost.")
RECLAIMED: Final = Family(
    "streamworker_reclaimed_total", "counter", "Jobs taken over from workers that died, or vanished with them."
)
SKIPPED: Final = Family("streamworker_skipped_total", "counter", "Claims of jobs that the ledger knew as ended.")
RELEASED: Final = Family("streamworker_released_total", "counter", "Jobs given back uncharged.")
LAG: Final = Family("streamworker_event_loop_lag_seconds", "gauge", "How late the event loop answers.")
RECONNECTS: Final = Family("streamworker_reconnects_total", "counter", "Times Redis came back after it was away.")
READY: Final = Family("streamworker_queue_ready_jobs", "gauge", "Jobs that are ready to be claimed.", ("queue",))
HELD: Final = Family("streamworker_queue_running_jobs", "gauge", "Jobs that all workers together hold.", ("queue",))
WAITING: Final = Family(
    "streamworker_queue_waiting_jobs", "gauge", "Jobs that wait behind others with their order key.", ("queue",)
)
LOAD: Final = Family(
    "streamworker_queue_load_jobs", "gauge", "Running jobs, and ready ones unless the queue is paused.", ("queue",)
)
WANTED: Final = Family(
    "streamworker_queue_wanted_slots", "gauge", "Slots that clear the queue within the target wait.", ("queue",)
)
DELAYED: Final = Family("streamworker_queue_delayed_jobs", "gauge", "Delayed jobs, retries included.", ("queue",))
ERRORS: Final = Family(
    "streamworker_queue_dead_groups", "gauge", "Errors that dead letters have, muted ones aside.", ("queue",)
)
NEW_ERRORS: Final = Family(
    "streamworker_queue_dead_groups_new", "gauge", "Errors whose first letter is under an hour old.", ("queue",)
)
LETTERS: Final = Family("streamworker_queue_dead_letters", "gauge", "Dead letters of the queue.", ("queue",))
OLDEST: Final = Family(
    "streamworker_queue_oldest_ready_seconds", "gauge", "Age of the oldest ready job; 0 when none waits.", ("queue",)
)
PAUSED: Final = Family("streamworker_queue_paused", "gauge", "1 while nothing is claimed from it.", ("queue",))
FLOWS: Final = Family("streamworker_flows", "gauge", "Flows that the ledger remembers.", ("status",))
BLOCKED: Final = Family("streamworker_blocked_jobs", "gauge", "Jobs of flows that wait for those before them.")
PARKED: Final = Family("streamworker_waiting_jobs", "gauge", "Jobs that wait for a signal, or sleep.", ("until",))
STUCK: Final = Family("streamworker_flows_stuck", "gauge", "Flows that do not end by themselves.", ("reason",))
UP: Final = Family("streamworker_redis_up", "gauge", "1 if Redis answered this worker's last question for depths.")
WRITABLE: Final = Family("streamworker_redis_writable", "gauge", "0 if Redis answers and refuses writes, else 1.")
MEMORY: Final = Family("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.")
STARTED: Final = Family("process_start_time_seconds", "gauge", "Start time of the process since the epoch in seconds.")
BUILD: Final = Family("streamworker_build_info", "gauge", "Always 1.", ("version", "mode"))

OF_JOBS: Final = (JOBS, RETRIES, EXPIRED, DEAD, DURATION, WAIT, BATCH, SETTLE)
OF_QUEUES: Final = (READY, HELD, WAITING, LOAD, DELAYED, LETTERS, OLDEST, PAUSED, ERRORS, NEW_ERRORS)
OF_LEDGER: Final = {"flows": FLOWS, "blocked": BLOCKED, "waiting": PARKED, "stuck": STUCK}
FAMILIES: Final = (
    *OF_JOBS, RUNNING, SLOTS, LOST, RECLAIMED, SKIPPED, RELEASED, LAG, RECONNECTS, *OF_QUEUES, *OF_LEDGER.values(), UP,
    WRITABLE, MEMORY, STARTED, BUILD,
)  # fmt: skip
"""Everything that workers export."""
OF_RELAY: Final = (
    READY, HELD, WAITING, LOAD, DELAYED, LETTERS, OLDEST, PAUSED, WANTED, *OF_LEDGER.values(), UP, WRITABLE, MEMORY,
    STARTED, BUILD,
)  # fmt: skip
"""Everything that a relay exports."""


class Metrics(Observer):
    """Counts; may be read from another thread while it does."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, ...], int] = {}
        self._retries: dict[tuple[str, ...], int] = {}
        self._expired: dict[tuple[str, ...], int] = {}
        self._dead: dict[tuple[str, ...], int] = {}
        self._durations: dict[tuple[str, ...], Histogram] = {}
        self._waits: dict[tuple[str, ...], Histogram] = {}
        self._batches, self._settles = Histogram(BATCH.bounds), Histogram(SETTLE.bounds)

    def on_settled(self, settlement: Settlement) -> None:
        """Count a batch."""
        jobs, durations, waits = self._jobs, self._durations, self._waits
        self._batches.add(len(settlement.items))
        self._settles.add(settlement.seconds)
        for run, result in settlement.items:
            if result is Settled.REFUSED:
                continue  # it is offered again
            place = (run.queue, run.kind if run.known else UNKNOWN)
            word = (*place, run.word)
            jobs[word] = jobs.get(word, 0) + 1
            if result is Settled.SETTLED and isinstance(run.verdict, RetryAt | Expire):
                counted = self._retries if isinstance(run.verdict, RetryAt) else self._expired
                counted[place] = counted.get(place, 0) + 1
            if (seconds := run.seconds) is None:
                continue
            if (tally := durations.get(place)) is None:
                tally = durations[place] = Histogram(_SECONDS)
            tally.add(seconds)
            if (waited := run.waited) is None:
                continue
            if (tally := waits.get(place)) is None:
                tally = waits[place] = Histogram(_WAITS)
            tally.add(waited)

    def on_dead(self, run: JobRun) -> None:
        """Count a dead letter."""
        word = (run.queue, run.kind if run.known else UNKNOWN, run.word)
        self._dead[word] = self._dead.get(word, 0) + 1

    def numbers(self) -> list[tuple[Family, Numbers]]:
        """What was counted so far."""
        once: dict[tuple[str, ...], Histogram] = {(): self._batches}
        return [
            (JOBS, steady(self._jobs)),
            (RETRIES, steady(self._retries)),
            (EXPIRED, steady(self._expired)),
            (DEAD, steady(self._dead)),
            (DURATION, steady(self._durations)),
            (WAIT, steady(self._waits)),
            (BATCH, once),
            (SETTLE, {(): self._settles}),
        ]


def steady(numbers: Mapping[K, V]) -> dict[K, V]:
    """A copy; the worker's thread may be adding to it."""
    while True:
        try:
            return dict(numbers)
        except RuntimeError:  # the dict changed size under the copy
            continue


def of_queues(depths: list[Depth]) -> list[tuple[Family, Numbers]]:
    """The depths of queues."""
    measures: dict[Family, Callable[[Depth], float]] = {
        READY: lambda depth: depth.ready,
        HELD: lambda depth: depth.running,
        WAITING: lambda depth: depth.waiting,
        LOAD: lambda depth: depth.load,
        DELAYED: lambda depth: depth.delayed,
        LETTERS: lambda depth: depth.dead,
        OLDEST: lambda depth: depth.oldest_age or 0.0,
        PAUSED: lambda depth: float(depth.paused or depth.inactive),
    }
    return [(family, {(each.queue,): measure(each) for each in depths}) for family, measure in measures.items()]


FRESH: Final = 5.0
"""Seconds for which depths are answered again without a request."""
WALK: Final = 15.0
"""Seconds between walks over the key space, which find queues that were not there before."""
DEAD_BUDGET: Final = 0.3
"""Seconds of a scrape in which the dead letters of a queue are read; the next scrape goes on."""
PATIENCE: Final = 2.0
"""Seconds a scrape waits for depths; then it goes without them."""


class LedgerGauges:
    """What the ledger counts, as it is asked for over HTTP: every `FRESH` seconds at most, by a relay on its loop."""

    def __init__(self) -> None:
        self._relay: GaugeSource | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking: asyncio.Future[Sequence[LedgerGauge]] | None = None
        self._found: Sequence[LedgerGauge] = ()
        self._asked_at = float("-inf")
        self._trouble = ""

    def watch(self, relay: GaugeSource) -> None:
        """Ask this relay from now on; call it on its event loop."""
        self._relay, self._loop = relay, asyncio.get_running_loop()

    async def read(self) -> list[tuple[Family, Numbers]]:
        """The gauges; none while the database, or the loop of the relay, does not answer."""
        if self._relay is None or self._loop is None or self._loop.is_closed():
            return []
        if monotonic() - self._asked_at >= FRESH:
            self._found = ()
            if self._asking is None:  # one at a time, however many scrapes give up
                asking = asyncio.run_coroutine_threadsafe(self._relay.gauges(), self._loop)
                self._asking = asyncio.wrap_future(asking)
            done, _ = await asyncio.wait([self._asking], timeout=PATIENCE)
            if done and self._asking is not None:
                self._take(self._asking)
        told: dict[Family, dict[tuple[str, ...], float]] = {}
        for each in self._found:
            family = OF_LEDGER[each.gauge]
            told.setdefault(family, {})[(each.label,) if family.labels else ()] = float(each.value)
        return list(told.items())

    def _take(self, answered: asyncio.Future[Sequence[LedgerGauge]]) -> None:
        self._asking, self._asked_at = None, monotonic()
        trouble = "cancelled" if answered.cancelled() else redact(str(answered.exception() or ""))
        if trouble and not self._trouble:
            log.warning("gauges_unknown", error=trouble)
        self._trouble = trouble
        if not trouble:
            self._found = answered.result()


class QueueDepths:
    """Depths of queues as they are asked for over HTTP; Redis is asked every `FRESH` seconds at most.

    Args:
        app: where depths are asked for.
        settings: the worker's.
        redis: what the worker was given.
        queues: the worker's.
        all_queues: all others on the server, too.
    """

    def __init__(
        self, app: WorkerHost, settings: Settings, redis: Any, queues: list[str], *, all_queues: bool = False
    ) -> None:
        self._app, self._settings, self._redis, self._queues = app, settings, redis, queues
        self._all_queues = all_queues
        self._found: list[str] = []
        self._walked_at = float("-inf")
        self._depths: list[Depth] = []
        self._looked_at = float("-inf")
        self._up, self._writable = False, True
        self._ended = False
        self._asked, self._answered = asyncio.Event(), asyncio.Event()

    def end(self) -> None:
        """Ask for no more depths; call it before the thread is stopped."""
        self._ended = True

    async def read(self) -> list[Depth]:
        """The depths; none while Redis does not answer."""
        if monotonic() - self._looked_at >= FRESH:
            self._answered.clear()
            self._asked.set()
            waiting = asyncio.ensure_future(self._answered.wait())
            await asyncio.wait([waiting], timeout=PATIENCE)
            waiting.cancel()
        # Depths that are not fresh are not told: an alert shall see that they are missing, not that all is well.
        return self._depths if self._up and monotonic() - self._looked_at < 2 * FRESH else []

    async def look(self) -> None:
        """Ask for depths with each request that needs them; runs on the thread's loop until `end`."""
        stack, operator = AsyncExitStack(), None
        while not self._ended:
            await self._asked.wait()
            self._asked.clear()
            try:
                if operator is None:
                    opening = self._app.operator(self._settings, self._redis)
                    operator = await stack.enter_async_context(opening)
                await self._ask(operator)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next request tries again
                self._up, operator = False, None
                log.warning("depths_unknown", error=redact(str(error)))
                await stack.aclose()
            self._looked_at = monotonic()
            self._answered.set()

    async def _ask(self, operator: Operator) -> None:
        if self._all_queues and monotonic() - self._walked_at >= WALK:
            self._found, self._walked_at = await operator.queues(), monotonic()
        names = sorted({*self._queues, *self._found})
        self._depths = await operator.depth(names)
        refusal = await operator.refusal(names)
        if refusal is not None and self._writable:
            log.warning("redis_refuses_writes", reason=redact(refusal))
        self._writable = refusal is None
        self._up = True

    def _of_process(self, started: float) -> list[tuple[Family, Numbers]]:
        return [
            (UP, {(): float(self._up)}),
            (WRITABLE, {(): float(self._writable)}),
            (MEMORY, {(): rss_bytes()}),
            (STARTED, {(): started}),
            (BUILD, {(version("streamworker"), self._settings.mode): 1}),
        ]


class QueueScale(msgspec.Struct, frozen=True):
    """What `/scale` says of a queue.

    Attributes:
        load: `Depth.load`.
        slots: that clear the queue within the target wait (`ScalingSignal.slots`).
        arrivals: jobs that come per second.
        run_time: seconds that a job runs; ``None`` where the server does not count jobs that left (before Redis 7).
    """

    load: int
    slots: int
    arrivals: float
    run_time: float | None


class ScaleEndpoint(QueueDepths):
    """Answers what autoscalers ask a relay: how many jobs want workers, by queue, and how many slots clear them.

    Args:
        app: where depths are asked for.
        settings: of the relay.
        redis: what the relay was given.
        queues: those that are answered for even if they have no key yet.
    """

    def __init__(self, app: WorkerHost, settings: Settings, redis: Any, queues: list[str]) -> None:
        super().__init__(app, settings, redis, queues, all_queues=True)
        self._started = time.time()
        self._signals: dict[str, ScalingSignal] = {}
        self._counted: set[str] = set()
        self.ledger: Final = LedgerGauges()
        self.routes: Final[Mapping[str, Route]] = {"/scale": self.answer, "/metrics": self.metrics}
        self.tasks: Final[Sequence[Task]] = (self.look, self.sample)

    async def sample(self) -> None:
        """Look at the queues again and again, asked or not: rates need a past. On the thread's loop, until `end`."""
        while not self._ended:
            await self.read()
            await asyncio.sleep(FRESH)

    async def answer(self, query: str) -> Answer:
        """``{"queues": {NAME: …}}``, see `QueueScale`; an error while Redis does not answer.

        Args:
            query: may have ``wait``, seconds that jobs may wait, in place of STREAMWORKER_TARGET_WAIT.
        """
        wait, asked = self._settings.target_wait, dict(parse_qsl(query)).get("wait")
        try:
            if asked is not None:
                wait = Settings.load({}, tty=False, target_wait=asked).target_wait
        except ConfigurationError as error:
            return Answer(400, msgspec.json.encode({"error": str(error).replace("--target-wait", "wait", 1)}))
        depths = await self.read()
        if not self._up:
            return Answer(500, b'{"error":"Redis does not answer"}')
        return Answer(200, msgspec.json.encode({"queues": {each.queue: self._scale(each, wait) for each in depths}}))

    async def metrics(self, _: str) -> Answer:
        """One scrape: the queues, and the slots that each wants."""
        depths, wait = await self.read(), self._settings.target_wait
        families: list[tuple[Family, Numbers]] = [
            *of_queues(depths),
            *await self.ledger.read(),
            (WANTED, {(each.queue,): self._signals[each.queue].slots(wait) for each in depths}),
            *self._of_process(self._started),
        ]
        return Answer(200, render(families), CONTENT_TYPE)

    def _scale(self, depth: Depth, wait: float) -> QueueScale:
        signal = self._signals[depth.queue]
        run_time = round(signal.run_time, 6) if depth.queue in self._counted else None
        return QueueScale(depth.load, signal.slots(wait), round(signal.rate, 3), run_time)

    async def _ask(self, operator: Operator) -> None:
        await super()._ask(operator)
        names, now = [each.queue for each in self._depths], monotonic()
        departed = await operator.departed(names)
        self._signals = {name: self._signals.get(name) or ScalingSignal(SOON) for name in names}
        self._counted = {name for name, count in zip(names, departed, strict=True) if count is not None}
        for depth, left in zip(self._depths, departed, strict=True):
            paused = depth.paused or depth.inactive
            seen = QueueSample(now, depth.ready, depth.running, depth.soon, left, paused, depth.oldest_age or 0.0)
            self._signals[depth.queue].add(seen)


class MetricsEndpoint(QueueDepths):
    """Answers scrapes of /metrics.

    Args:
        app: where depths are asked for.
        settings: the worker's.
        redis: what the worker was given.
        queues: the worker's.
    """

    def __init__(self, app: WorkerHost, settings: Settings, redis: Any, queues: list[str]) -> None:
        super().__init__(app, settings, redis, queues)
        self._started = time.time()
        self._in_flight: InFlight | None = None
        self._lease: LeaseKeeper | None = None
        self._broker: Connected | None = None
        self._groups: DeadGroups | None = None
        self._ledger: Final = LedgerGauges()
        self.observer: Final = Metrics()

    def watch(self, in_flight: InFlight, lease: LeaseKeeper, broker: Connected, relay: GaugeSource) -> None:
        """The groups are joined: scrapes show the state of these from now on."""
        self._in_flight, self._lease, self._broker = in_flight, lease, broker
        self._ledger.watch(relay)

    async def answer(self, _: str) -> Answer:
        """One scrape."""
        depths = await self.read()
        families = [*self.observer.numbers(), *self._of_worker(), *of_queues(depths), *self._of_groups(depths)]
        families += await self._ledger.read()
        return Answer(200, render(families), CONTENT_TYPE)

    async def _ask(self, operator: Operator) -> None:
        await super()._ask(operator)
        if self._groups is None or self._groups.reader is not operator:
            self._groups = DeadGroups(operator)
        for depth in self._depths:
            await self._groups.update(depth.queue, depth.dead, DEAD_BUDGET)

    def _of_groups(self, depths: list[Depth]) -> list[tuple[Family, Numbers]]:
        """How many errors dead letters have that need attention."""
        groups, now = self._groups.of() if self._groups is not None else [], time.time()
        alert = Counter(group.queue for group in groups if not group.muted)
        new = Counter(group.queue for group in groups if group.is_new(now))
        return [
            (ERRORS, {(depth.queue,): alert[depth.queue] for depth in depths}),
            (NEW_ERRORS, {(depth.queue,): new[depth.queue] for depth in depths}),
        ]

    def _of_worker(self) -> list[tuple[Family, Numbers]]:
        told: list[tuple[Family, Numbers]] = [
            (SLOTS, {(): self._settings.concurrency}),
            *self._of_process(self._started),
        ]
        if self._in_flight is None or self._lease is None or self._broker is None:
            return told
        running = Counter(run.claim.queue for run in self._in_flight.snapshot() if run.outcome is None)
        counts = self._in_flight.counts
        return [
            *told,
            (RUNNING, {(queue,): running[queue] for queue in self._queues}),
            (LOST, {(): counts.lost}),
            (RECLAIMED, {(): counts.recovered}),
            (SKIPPED, {(): counts.skipped}),
            (RELEASED, {(): counts.released}),
            (LAG, {(): self._lease.loop_lag}),
            (RECONNECTS, {(): self._broker.reconnects}),
        ]

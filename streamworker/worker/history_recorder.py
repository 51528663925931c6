"""RunTallies and HistoryRecorder: runs of a worker, counted as they are settled, and kept every ten seconds.

A no-op job pays for the moment of its end and a share of a count over its batch. Where a batch has many jobs of one
kind, some of them stand for the times of all: counts are exact, percentiles of busy kinds are those of a sample.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import monotonic, time
from typing import Final

import anyio

from streamworker.broker import SettleRequest
from streamworker.execution import Execution
from streamworker.job import Dead, Done, RetryAt, Settled
from streamworker.observe import ready_at
from streamworker.policy import DONE
from streamworker.telemetry.logs import get_logger
from streamworker.telemetry.run_history import BOUNDS, MINUTE, HistoryRow, HistoryWriter, Place, RunTally
from streamworker.worker.host import WorkerResources
from streamworker.worker.inflight import InFlight

log = get_logger("streamworker.worker")

UNKNOWN: Final = "unknown"
"""The kind of jobs without a handler here: what the document says may be anything."""
SAMPLES: Final = 4
"""Jobs of one kind in one batch whose times stand for those of all; up to twice as many, each for as many jobs."""
EVERY: Final = 10.0
"""Seconds between two flushes, about."""
LAST_FLUSH: Final = 2.0
"""Seconds that the last one may take."""
LOG_AGAIN: Final = 60.0
SETTLED: Final = Settled.SETTLED


class RunTallies:
    """Counts settled batches by queue and kind.

    Args:
        durable: there is a ledger, by which jobs may be done that were not started.
    """

    def __init__(self, *, durable: bool) -> None:
        self._durable = durable
        self._by_place: dict[Place, RunTally] = {}
        self.offset = time() - monotonic()
        """The clock by which jobs are ready, that of Redis, less the monotonic one. At first this machine's."""

    def take(self) -> dict[Place, RunTally]:
        """The tallies since the last call."""
        taken, self._by_place = self._by_place, {}
        return taken

    def settled(self, batch: Sequence[Execution], items: Sequence[SettleRequest], results: Sequence[Settled]) -> None:
        """Count a batch.

        Args:
            batch: the runs.
            items: their endings.
            results: the broker's answers.
        """
        size = len(batch)
        registration, queue = batch[0].registration, batch[0].claim.queue
        if (
            registration is not None
            and [run.registration for run in batch].count(registration) == size
            and [run.claim.queue for run in batch].count(queue) == size
            and results.count(SETTLED) == size
            and [item.verdict for item in items].count(DONE) == size
        ):  # nearly all, counted in C
            tally = self._tally((queue, registration.kind))
            tally.done += size
            tally.started += size - ([run.started for run in batch].count(None) if self._durable else 0)
            self._time(tally, batch)
        else:
            self._count_each(batch, items, results)

    def _count_each(
        self, batch: Sequence[Execution], items: Sequence[SettleRequest], results: Sequence[Settled]
    ) -> None:
        timed: dict[Place, list[Execution]] = {}
        for run, item, result in zip(batch, items, results, strict=True):
            if result is Settled.REFUSED:
                continue  # it is offered again
            place = place_of(run)
            tally, verdict = self._tally(place), item.verdict
            if run.started is not None:
                tally.started += 1
            if result is not SETTLED:
                continue  # another worker has it
            if run.started is not None:
                timed.setdefault(place, []).append(run)
            if isinstance(verdict, Done):
                tally.done += 1
            elif isinstance(verdict, RetryAt | Dead):
                tally.failed += 1
                tally.retried += isinstance(verdict, RetryAt)
        for place, runs in timed.items():
            self._time(self._tally(place), runs)

    def _time(self, tally: RunTally, runs: Sequence[Execution]) -> None:
        weight = len(runs) // SAMPLES or 1
        if weight > 1:
            runs = runs[int(random.random() * weight) :: weight]  # noqa: S311 - a fair sample, no secret
        ran, waited, offset = tally.run, tally.wait, self.offset
        for run in runs:
            if (started := run.started) is None or run.ended is None:
                continue
            bucket = bisect(BOUNDS, run.ended - started)
            ran[bucket] = ran.get(bucket, 0) + weight
            if (since := ready_at(run)) is not None:
                bucket = bisect(BOUNDS, started + offset - since)
                waited[bucket] = waited.get(bucket, 0) + weight

    def _tally(self, place: Place) -> RunTally:
        tally = self._by_place.get(place)
        if tally is None:
            tally = self._by_place[place] = RunTally()
        return tally


def place_of(run: Execution) -> Place:
    """(queue, kind) of a run."""
    return run.claim.queue, run.registration.kind if run.registration is not None else UNKNOWN


class HistoryRecorder:
    """Keeps the tallies of one worker, by the minutes of the server's clock.

    What cannot be kept is lost, and said in the log: a second try could count twice.

    Args:
        store: where they are kept.
        clock: the clock of Redis, in epoch seconds.
        tallies: are counted.
    """

    def __init__(self, store: HistoryWriter, clock: Callable[[], Awaitable[float]], tallies: RunTallies) -> None:
        self._store, self._clock = store, clock
        self.tallies: Final = tallies
        self._offset = time() - monotonic()  # the clock of the store less the monotonic one; at first a guess
        self._guessed = True
        self._since = monotonic()
        self._taken: list[tuple[float, dict[Place, RunTally]]] = []
        self._held: Counter[Place] = Counter()
        self._flush_at = monotonic() + EVERY * random.random()  # noqa: S311 - spreads load
        self._silent_until = 0.0

    async def run(self, in_flight: InFlight, stopping: anyio.Event) -> None:
        """Keep tallies until stopped."""
        await self._set_clock()
        while not stopping.is_set():
            now = monotonic()
            minute = MINUTE - (now + self._offset) % MINUTE
            with anyio.move_on_after(max(0.0, min(minute, self._flush_at - now))):
                await stopping.wait()
            self._turn(in_flight)
            if monotonic() >= self._flush_at and not stopping.is_set():
                self._flush_at = monotonic() + EVERY * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load
                if await self._flush():
                    await self._set_clock()

    async def close(self, in_flight: InFlight) -> None:
        """Keep the last tallies."""
        self._turn(in_flight)
        with anyio.move_on_after(LAST_FLUSH):
            await self._flush()

    def _turn(self, in_flight: InFlight) -> None:
        """End the present tallies: what is counted from now on may belong to the next minute."""
        since, self._since = self._since, monotonic()
        taken = self.tallies.take()
        held = Counter(place_of(run) for run in in_flight.snapshot() if run.started is not None)
        for place in held.keys() | self._held.keys():  # they have started, and not ended yet
            if more := held[place] - self._held[place]:
                tally = taken.setdefault(place, RunTally())
                tally.started = max(0, tally.started + more)
        self._held = held
        if any(taken.values()):
            self._taken.append((since, taken))

    async def _flush(self) -> bool:
        parts, self._taken = self._taken, []
        if not parts:
            return False
        try:
            if self._guessed:
                sent = monotonic()
                self._offset = await self._store.clock(next(iter(parts[0][1]))[0]) - (sent + monotonic()) / 2
                self._guessed = False
            rows = [
                HistoryRow((since + self._offset) // MINUTE * MINUTE, *place, tally)
                for since, part in parts
                for place, tally in part.items()
                if tally
            ]
            sent = monotonic()
            self._offset = await self._store.add(rows) - (sent + monotonic()) / 2
        except Exception as error:  # noqa: BLE001 - whatever it is, jobs go on
            if monotonic() >= self._silent_until:
                self._silent_until = monotonic() + LOG_AGAIN
                log.warning("history_not_recorded", error=str(error))
        return True

    async def _set_clock(self) -> None:
        sent = monotonic()
        try:
            self.tallies.offset = await self._clock() - (sent + monotonic()) / 2
        except Exception as error:  # noqa: BLE001 - the next turn asks again
            log.debug("clock_unknown", error=str(error))


def recorder_of(tallies: RunTallies | None, resources: WorkerResources, queue: str) -> HistoryRecorder | None:
    """Keeps the tallies of a worker in the ledger if there is one, else in Redis; ``None`` if none are counted.

    Args:
        tallies: the worker's.
        resources: its servers.
        queue: one of its queues: the clock of that queue's server is the one by which jobs are ready.
    """
    if tallies is None:
        return None
    in_redis = resources.broker.history
    store = resources.ledger.history if resources.ledger is not None else in_redis
    return HistoryRecorder(store, partial(in_redis.clock, queue), tallies)

"""RunTallies and HistoryRecorder: runs of a worker, counted as they are settled, and kept every ten seconds.

A no-op job pays for the moment of its end and a share of a count over its batch. Counts are exact; of kinds that run
hundreds of times a second a sample is timed.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import monotonic, time
from typing import Final, TypeVar

import anyio

from streamworker.broker import SettleRequest
from streamworker.execution import Execution
from streamworker.handlers import Registration
from streamworker.job import Dead, Done, RetryAt, Settled
from streamworker.observe import ready_at
from streamworker.telemetry.logs import get_logger
from streamworker.telemetry.run_history import BOUNDS, MINUTE, HistoryRow, HistoryWriter, Place, RunTally
from streamworker.worker.host import WorkerResources
from streamworker.worker.inflight import InFlight

log = get_logger("streamworker.worker")

UNKNOWN: Final = "unknown"
"""The kind of jobs without a handler here: what the document says may be anything."""
EXACT: Final = 512
"""Jobs of a kind in one tally, some ten seconds, that are all timed. Of further ones each stands for itself and others:
the more there were, the fewer are timed."""
EVERY: Final = 10.0
"""Seconds between two flushes, about."""
LAST_FLUSH: Final = 2.0
"""Seconds that the last one may take."""
LOG_AGAIN: Final = 60.0
SETTLED: Final = Settled.SETTLED
_Key = TypeVar("_Key")


class _Place:
    """Runs of a queue and handler: how many are done, without a start too, and how many pass before one is timed."""

    __slots__ = ("done", "skip", "tally", "unstarted")

    def __init__(self) -> None:
        self.done = self.unstarted = self.skip = 0
        self.tally = RunTally()
        """Everything else."""

    def whole(self) -> RunTally:
        """All of it in one tally; no further run is counted."""
        self.tally.done = self.done
        self.tally.started += self.done - self.unstarted
        return self.tally


class RunTallies:
    """Counts settled batches by queue and kind.

    Args:
        durable: there is a ledger, by which jobs may be done that were not started.
    """

    def __init__(self, *, durable: bool) -> None:
        self._durable = durable
        self._places: dict[tuple[str, Registration | None], _Place] = {}
        self.offset = time() - monotonic()
        """The clock by which jobs are ready, that of Redis, less the monotonic one. At first this machine's."""

    def take(self) -> dict[Place, RunTally]:
        """The tallies since the last call."""
        taken, self._places = self._places, {}
        return {(queue, _kind(registration)): place.whole() for (queue, registration), place in taken.items()}

    def settled(
        self, batch: Sequence[Execution], items: Sequence[SettleRequest], results: Sequence[Settled], plain: bool, /
    ) -> None:
        """Count a batch.

        Args:
            batch: the runs.
            items: their endings.
            results: the broker's answers.
            plain: every run is done, and the broker settled it.
        """
        done = batch if plain else self._count_others(batch, items, results)
        if not done:
            return
        queues = [run.claim.queue for run in done]
        if queues.count(queues[0]) == len(done):  # nearly always, and counted in C
            self._count_queue(queues[0], done)
        else:
            for queue, runs in _grouped(queues, done).items():
                self._count_queue(queue, runs)

    def _count_queue(self, queue: str, runs: Sequence[Execution]) -> None:
        registrations = [run.registration for run in runs]
        first = registrations[0]
        if first is registrations[-1] and registrations.count(first) == len(runs):  # as above
            self._count_alike(queue, first, runs)
        else:
            for registration, part in _grouped(registrations, runs).items():
                self._count_alike(queue, registration, part)

    def _count_alike(self, queue: str, registration: Registration | None, runs: Sequence[Execution]) -> None:
        place, size = self._place(queue, registration), len(runs)
        place.done += size
        if self._durable:
            place.unstarted += [run.started for run in runs].count(None)
        at = place.skip
        while at < size:
            self._sample(place, runs[at])
            at += 1 + place.skip
        place.skip = at - size

    def _place(self, queue: str, registration: Registration | None) -> _Place:
        try:
            return self._places[queue, registration]
        except KeyError:
            place = self._places[queue, registration] = _Place()
            return place

    def _sample(self, place: _Place, run: Execution) -> None:
        """Time a run for itself and those that were, or will be, passed over."""
        weight = 1 + place.done // EXACT
        self._time(place.tally, run, weight)
        place.skip = int(random.random() * (2 * weight - 1))  # noqa: S311 - a fair sample, no secret

    def _count_others(
        self, batch: Sequence[Execution], items: Sequence[SettleRequest], results: Sequence[Settled]
    ) -> list[Execution]:
        """Count the runs that are not done, or that were not settled; the rest is returned."""
        done = []
        for run, item, result in zip(batch, items, results, strict=True):
            if result is SETTLED and isinstance(item.verdict, Done):
                done.append(run)
                continue
            if result is Settled.REFUSED or (run.started is None and result is not SETTLED):
                continue  # it is offered again, or another worker has it
            tally = self._place(run.claim.queue, run.registration).tally
            if run.started is not None:
                tally.started += 1
            if result is SETTLED:
                if isinstance(item.verdict, RetryAt | Dead):
                    tally.failed += 1
                    tally.retried += isinstance(item.verdict, RetryAt)
                self._time(tally, run, 1)
        return done

    def _time(self, tally: RunTally, run: Execution, weight: int) -> None:
        """Count how long a run took and waited, for ``weight`` runs."""
        if (started := run.started) is None or run.ended is None:
            return
        bucket = bisect(BOUNDS, run.ended - started)
        tally.run[bucket] = tally.run.get(bucket, 0) + weight
        if (since := ready_at(run)) is not None:
            bucket = bisect(BOUNDS, started + self.offset - since)
            tally.wait[bucket] = tally.wait.get(bucket, 0) + weight


def _grouped(keys: Sequence[_Key], runs: Sequence[Execution]) -> dict[_Key, list[Execution]]:
    groups: dict[_Key, list[Execution]] = {}
    for key, run in zip(keys, runs, strict=True):
        try:
            groups[key].append(run)
        except KeyError:
            groups[key] = [run]
    return groups


def _kind(registration: Registration | None) -> str:
    return registration.kind if registration is not None else UNKNOWN


def place_of(run: Execution) -> Place:
    """(queue, kind) of a run."""
    return run.claim.queue, _kind(run.registration)


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

"""PayloadReaper: deletes the stored payloads of jobs that have ended for good. What it misses, the relay sweeps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextvars import Context as Variables
from typing import Final

import anyio

from streamworker.broker import EndedPayload, EndedPayloads, SettleRequest
from streamworker.execution import Execution
from streamworker.handlers import Registration
from streamworker.job import Done, Drop, Expire, Ok, Recorded, Settled
from streamworker.loops import LookLoop, Pause
from streamworker.payload import PayloadStore, reference_to, stored_in
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

TRIES: Final = 5
BATCH: Final = 500
LOOK: Final = 60.0
"""Seconds between two looks for payloads of deleted jobs: those of which it is not told."""
LAST: Final = 2.0
"""Most seconds that a worker which ends waits for the store."""
NOWHERE: Final = ("", b"")


class PayloadReaper:
    """Deletes stored payloads of jobs that have ended: that a worker settled, or that were deleted in Redis.

    It does nothing until a job has one.

    Args:
        store: has them.
        ended: those of jobs that were deleted in Redis.
        needed: the ids of stored payloads of those jobs among some that the ledger may queue again, if there is one;
            it takes job ids and the last hops at which they ended.
        every: seconds between two looks at ``ended``, which also tells of new ones.
    """

    def __init__(
        self,
        store: PayloadStore,
        ended: EndedPayloads,
        needed: Callable[[Mapping[str, int]], Awaitable[Collection[str]]] | None,
        *,
        every: float = LOOK,
    ) -> None:
        self._store, self._ended, self._needed, self._every = store, ended, needed, every
        self._gone: list[EndedPayload] = []
        self._task: asyncio.Task[None] | None = None
        self._closed = anyio.Event()

    def settled(
        self, runs: Sequence[Execution], items: Sequence[SettleRequest], results: Sequence[Settled], plain: bool, /
    ) -> None:
        """Take a settled batch. A dead letter keeps its payload, and so does a job that goes on."""
        del plain  # a job that is done may have a payload there
        for run, item, result in zip(runs, items, results, strict=True):
            if isinstance(run.outcome, Ok) and not run.special:
                continue  # nearly all: `Executor` marks those with a reference
            if result is Settled.SETTLED and run.reading is not None and _is_over(run, item):
                found = stored_in(run.reading.payload)
                if found is not None:
                    self._gone.append(
                        EndedPayload(run.claim.queue, item.job_id, run.reading.hop or 0, found.id, NOWHERE)
                    )
        if self._gone and (self._task is None or self._task.done()) and not self._closed.is_set():
            self._task = asyncio.get_running_loop().create_task(self._delete_settled(), context=Variables())

    async def _delete_settled(self) -> None:
        pause, failed = Pause(longest=5.0), 0
        while self._gone:
            batch, self._gone = self._gone[:BATCH], self._gone[BATCH:]
            try:
                await self._delete(batch)
            except Exception as error:  # noqa: BLE001 - the relay's sweep finds what is left
                failed += 1
                if failed == TRIES or self._closed.is_set():
                    log.warning("payloads_not_deleted", payloads=len(batch) + len(self._gone), error=str(error))
                    self._gone = []
                    return
                self._gone = batch + self._gone
                await pause.wait(self._closed)
            else:
                failed = 0

    async def _delete(self, ended: Sequence[EndedPayload]) -> None:
        """Delete those that no job of the ledger needs."""
        jobs: dict[str, int] = {}
        for each in ended:
            if each.job_id:
                jobs[each.job_id] = max(each.hop, jobs.get(each.job_id, 0))
        needed = await self._needed(jobs) if self._needed is not None and jobs else ()
        gone = {each.payload for each in ended if each.payload and each.payload not in needed}
        if gone:
            await self._store.delete(sorted(gone))

    async def run(self, stopping: anyio.Event) -> None:
        """Delete those of jobs that are deleted in Redis, until stopped."""
        loop = LookLoop(stopping)

        async def wake_at_the_end() -> None:
            await stopping.wait()
            loop.wake()
            await anyio.sleep(LAST)
            group.cancel_scope.cancel()  # a store that does not answer must not hold up the end

        async with anyio.create_task_group() as group:
            group.start_soon(self._ended.listen, loop.wake)
            group.start_soon(wake_at_the_end)
            await loop.run(self.look, lambda error: log.warning("payloads_not_deleted", error=str(error)))
            group.cancel_scope.cancel()

    async def look(self) -> float:
        """Delete some; returns the seconds until the next look. What is deleted twice is deleted once."""
        if not (some := await self._ended.some()):
            return self._every
        await self._delete(some)
        await self._ended.forget(some)
        return 0.0

    async def close(self) -> None:
        """Delete what is left, within two seconds."""
        self._closed.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=LAST)


def lenient_kinds(registrations: Iterable[Registration]) -> frozenset[str]:
    """Kinds whose payloads take anything for one without their fields: also a reference to a stored payload."""
    return frozenset(each.kind for each in registrations if _takes_anything(each))


def _takes_anything(registration: Registration) -> bool:
    try:
        registration.decode(reference_to("", b""))
    except Exception:  # noqa: BLE001 - whatever a type's own checks raise
        return False
    return True


def _is_over(run: Execution, item: SettleRequest) -> bool:
    if isinstance(item.verdict, Drop | Expire):
        return True
    if not isinstance(item.verdict, Done):
        return False
    outcome = run.outcome
    return isinstance(outcome, Ok) or (isinstance(outcome, Recorded) and outcome.ended)

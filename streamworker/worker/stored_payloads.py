"""PayloadReaper: deletes the stored payloads of jobs that have ended for good. What it misses, the relay sweeps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextvars import Context as Variables
from typing import Final

import anyio

from streamworker.broker import SettleRequest
from streamworker.execution import Execution
from streamworker.handlers import Registration
from streamworker.job import Done, Drop, Expire, Ok, Recorded, Settled
from streamworker.loops import Pause
from streamworker.payload import PayloadStore, reference_to, stored_in
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

TRIES: Final = 5
BATCH: Final = 500


class PayloadReaper:
    """Deletes stored payloads of settled jobs, in batches. It does nothing until a job has one.

    Args:
        store: has them.
    """

    def __init__(self, store: PayloadStore) -> None:
        self._store = store
        self._gone: list[str] = []
        self._task: asyncio.Task[None] | None = None
        self._closed = anyio.Event()

    def settled(self, runs: Sequence[Execution], items: Sequence[SettleRequest], results: Sequence[Settled]) -> None:
        """Take a settled batch. A dead letter keeps its payload, and so does a job that goes on."""
        for run, item, result in zip(runs, items, results, strict=True):
            if isinstance(run.outcome, Ok) and not run.special:
                continue  # nearly all: `Executor` marks those with a reference
            if result is Settled.SETTLED and run.reading is not None and _is_over(run, item):
                found = stored_in(run.reading.payload)
                if found is not None:
                    self._gone.append(found.id)
        if self._gone and (self._task is None or self._task.done()) and not self._closed.is_set():
            self._task = asyncio.get_running_loop().create_task(self._delete(), context=Variables())

    async def _delete(self) -> None:
        pause, failed = Pause(longest=5.0), 0
        while self._gone:
            batch, self._gone = self._gone[:BATCH], self._gone[BATCH:]
            try:
                await self._store.delete(batch)
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

    async def close(self) -> None:
        """Delete what is left, within two seconds."""
        self._closed.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=2)


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

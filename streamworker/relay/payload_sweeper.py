"""PayloadSweeper: deletes stored payloads that no job refers to any more, whichever way the job ended."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Final, Protocol

import anyio

from streamworker import codec
from streamworker.errors import InvalidJob, Unreachable
from streamworker.payload import SweptStore, stored_in
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.relay")

IDLE: Final = 86_400.0
"""Seconds for which data has to be neither written nor read before it is looked whether a job has it."""
INTERVAL: Final = 3600.0
"""Seconds between two looks. Data is deleted that two of them miss: a job may move while all of Redis is read."""


class JobDocuments(Protocol):
    """All documents of jobs that may still run."""

    def bodies(self) -> AsyncIterator[bytes]:
        """Each of them, in Redis and in the ledger; some may come twice.

        Raises:
            Unreachable: a server does not answer: not all are known.
        """


class PayloadSweeper:
    """Looks now and then for stored payloads that no job has.

    Args:
        store: has them.
        documents: refer to them.
    """

    def __init__(self, store: SweptStore, documents: JobDocuments) -> None:
        self._store = store
        self._documents = documents
        self._missed: frozenset[str] = frozenset()

    async def run(self, stopping: anyio.Event) -> None:
        """Sweep until stopped."""
        while not stopping.is_set():
            with anyio.move_on_after(INTERVAL * random.uniform(0.75, 1.25)):  # noqa: S311 - spreads load
                await stopping.wait()
                return
            try:
                await self.sweep()
            except Unreachable as error:
                log.info("payloads_not_swept", error=str(error))
            except Exception as error:  # noqa: BLE001 - it is never urgent
                log.error("payloads_not_swept", error=str(error))

    async def sweep(self) -> int:
        """Look once; returns how many were deleted, which an earlier look had missed, too."""
        idle = frozenset(await self._store.idle(IDLE))
        if not idle:
            self._missed = frozenset()
            return 0
        used: set[str] = set()
        async for body in self._documents.bodies():
            found = reference_in(body)
            if found in idle:
                used.add(found)
        if used:
            await self._store.keep(sorted(used))
        missed = idle - used
        gone = sorted(missed & self._missed)
        if gone:
            await self._store.delete(gone)
            log.info("payloads_swept", payloads=len(gone))
        self._missed = missed - frozenset(gone)
        return len(gone)


def reference_in(body: bytes) -> str:
    """The id of the stored payload of a document; empty if it has none."""
    if b"streamworker_stored" not in body:
        return ""
    try:
        found = stored_in(codec.read(body).payload)
    except InvalidJob:
        return ""
    return "" if found is None else found.id

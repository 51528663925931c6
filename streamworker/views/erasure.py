"""Erasure of a person's jobs: found by fields of the payload or by headers, deleted in both stores, and reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from time import monotonic
from typing import Any, Final

import anyio
import msgspec

from streamworker import codec
from streamworker.broker import Operator
from streamworker.encryption import sealed_in
from streamworker.errors import InvalidJob, UsageError
from streamworker.job import StoredDocument
from streamworker.payload import PayloadStore, stored_in
from streamworker.postgres import FINAL, Archive, JobRecord, Wanted
from streamworker.views.opened import KeyOpener, PlainOpener

ENDED: Final = (*FINAL, "dead")
PAUSE: Final = 0.2
"""Seconds between two looks while a job that was cancelled still runs."""
_BATCH: Final = 500


class Erased(msgspec.Struct, frozen=True):
    """What an erasure found and deleted.

    Attributes:
        jobs: ids of the jobs, with their queues.
        redis: how many documents were deleted of each state, and how many results and outputs.
        ledger: how many rows were deleted of each table of the ledger.
        running: jobs that still run: they were told to end; erase again when they have.
        sealed: documents that no key here opens, or whose payloads are in a store that is not known here: what is in
            them is not known.
        unreadable: documents that are no JSON.
        dry_run: nothing was deleted.
    """

    jobs: list[tuple[str, str]]
    redis: dict[str, int]
    ledger: dict[str, int]
    running: list[tuple[str, str]]
    sealed: int
    unreadable: int
    dry_run: bool


class Person(msgspec.Struct, frozen=True):
    """Whose jobs: all conditions have to hold.

    Attributes:
        where: field of the payload to values, one of which fits; ``customer.email`` is a field of an object, or of
            objects in a list.
        headers: header to such values.
    """

    where: dict[str, tuple[Any, ...]]
    headers: dict[str, tuple[Any, ...]]

    def is_in(self, payload: Any, headers: Any) -> bool:
        """Whether the conditions hold."""
        return all(_holds(payload, name.split("."), values) for name, values in self.where.items()) and all(
            isinstance(headers, Mapping) and _holds(headers.get(name), (), values)
            for name, values in self.headers.items()
        )


def person(where: Mapping[str, Any] | None, headers: Mapping[str, Any] | None) -> Person:
    """The conditions, with values as JSON says them.

    Raises:
        UsageError: there is none.
    """
    if not where and not headers:
        raise UsageError("say whose jobs: where={'customer_id': 17}, or headers={...}")
    try:
        plain = [msgspec.to_builtins(dict(each or {})) for each in (where, headers)]
    except TypeError as error:
        raise UsageError(f"a value of where= or headers= cannot be said in JSON: {error}") from None
    return Person(*({name: (value,) for name, value in each.items()} for each in plain))


def _holds(value: Any, path: Sequence[str], wanted: Sequence[Any]) -> bool:
    if isinstance(value, list):
        return any(_holds(each, path, wanted) for each in value)
    if not path:
        return any(_same(value, each) for each in wanted)
    return isinstance(value, dict) and path[0] in value and _holds(value[path[0]], path[1:], wanted)


def _same(value: Any, wanted: Any) -> bool:
    """Whether JSON would not tell them apart: true is no 1, and 17 is 17.0."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    return bool(value == wanted)


class Erasure:
    """One erasure.

    Args:
        whose: the conditions.
        operator: of Redis.
        archive: the ledger, if there is one.
        opener: opens what is sealed.
        queue: only this one.
        store: has payloads that are too large for a document, if there is one.
    """

    def __init__(
        self,
        whose: Person,
        operator: Operator,
        archive: Archive | None,
        opener: PlainOpener | KeyOpener,
        *,
        queue: str | None = None,
        store: PayloadStore | None = None,
    ) -> None:
        self._store = store
        self._stored: dict[tuple[str, str], set[str]] = {}
        self._whose = whose
        self._operator = operator
        self._archive = archive
        self._opener = opener
        self._queue = queue
        self._jobs: dict[tuple[str, str], None] = {}
        self._running: dict[tuple[str, str], None] = {}
        self._redis: Counter[str] = Counter()
        self._ledger: Counter[str] = Counter()
        self._sealed = self._unreadable = 0

    async def run(self, wait: float, *, dry_run: bool) -> Erased:
        """Erase; a job that runs is cancelled first, and waited for.

        Args:
            wait: seconds for jobs that run.
            dry_run: delete nothing.
        """
        until, passes = monotonic() + wait, 0
        while await self._pass(dry_run=dry_run) and not dry_run:
            passes += 1
            if monotonic() >= until and (self._running or passes > 1):
                break
            if self._running:
                await anyio.sleep(PAUSE)
        return Erased(
            list(self._jobs), dict(self._redis), dict(self._ledger), list(self._running), self._sealed,
            self._unreadable, dry_run,
        )  # fmt: skip

    async def _pass(self, *, dry_run: bool) -> bool:
        """Look at everything once; returns whether something was found."""
        self._running, self._sealed, self._unreadable = {}, 0, 0
        found: dict[str, dict[str, None]] = {}
        rows = [(job.queue, job.id, job.status) async for job in self._records()]
        for queue, job_id, status in rows:
            found.setdefault(queue, {})[job_id] = None
            if (
                not dry_run
                and self._archive is not None
                and status not in ("completed", "cancelled", "expired", "dead")
            ):
                await self._archive.cancel(queue, job_id)
                await self._operator.cancel(queue, job_id)
        for queue in [self._queue] if self._queue is not None else await self._operator.queues():
            async for stored in self._operator.documents(queue):
                if await self._fits(stored):
                    await self._take(stored, found, dry_run=dry_run)
        for queue, ids in found.items():
            self._jobs |= dict.fromkeys((queue, job_id) for job_id in ids)
            if not dry_run:
                await self._forget(queue, [job_id for job_id in ids if (queue, job_id) not in self._running])
        if dry_run:
            self._ledger["jobs"] = len(rows)
        return bool(found)

    async def _take(self, stored: StoredDocument, found: dict[str, dict[str, None]], *, dry_run: bool) -> None:
        job_id = stored.job_id or ""
        found.setdefault(stored.queue, {})[job_id] = None
        if dry_run or await self._operator.remove(stored):
            self._redis[stored.place] += 1
        else:
            if job_id:
                await self._operator.cancel(stored.queue, job_id)
            self._running[stored.queue, job_id] = None

    async def _forget(self, queue: str, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), _BATCH):
            some = ids[start : start + _BATCH]
            self._redis.update(await self._operator.forget_traces(queue, some))
            if self._archive is not None:
                self._ledger.update(await self._archive.erase(queue, some))
            names = {name for job_id in some for name in self._stored.pop((queue, job_id), ())}
            if names and self._store is not None:
                await self._store.delete(sorted(names))
                self._ledger["payloads"] += len(names)

    async def _records(self) -> AsyncIterator[JobRecord]:
        if self._archive is None:
            return
        archive = self._opener.archive(self._archive)
        async for job in archive.jobs(Wanted(queue=self._queue), payload=True):
            raw, headers = job.payload, job.headers
            if job.document is not None and raw is None:
                raw, headers, _ = self._read(job.document)
            if await self._is_theirs(raw, headers, (job.queue, job.id), job.kind):
                yield job

    async def _fits(self, stored: StoredDocument) -> bool:
        raw, headers, kind = self._read(self._opener.document(stored.body) or b"")
        return await self._is_theirs(raw, headers, (stored.queue, stored.job_id or ""), kind)

    def _read(self, body: bytes) -> tuple[msgspec.Raw | None, Any, str]:
        try:
            reading = codec.read(body)
        except InvalidJob:
            self._unreadable += 1
            return None, None, ""
        return reading.payload, reading.headers, reading.kind or ""

    async def _is_theirs(self, raw: msgspec.Raw | None, headers: Any, job: tuple[str, str], kind: str) -> bool:
        """Whether the conditions hold; of a payload in a store, for the data there."""
        found = stored_in(raw)
        if found is not None:
            if self._store is None:
                self._sealed += 1
            data = None if self._store is None else await self._store.get(found.id)
            raw = None if data is None else self._opener.payload(msgspec.Raw(data), job[1], kind)
        if not self._whose.is_in(self._decoded(raw), headers):
            return False
        if found is not None:
            self._stored.setdefault(job, set()).add(found.id)
        return True

    def _decoded(self, payload: msgspec.Raw | None) -> Any:
        if payload is None:
            return None
        if sealed_in(payload) is not None:
            self._sealed += 1
            return None
        try:
            return msgspec.json.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._unreadable += 1
            return None

"""Opener: what people and programs read of jobs, opened where this process has the keys (`streamworker.encryption`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal, Protocol, cast

import msgspec

from streamworker import codec, results
from streamworker.broker import Operator, Page, PendingEntry, StoredJob
from streamworker.encryption import Keys, Purpose, sealed_in
from streamworker.errors import InvalidJob, NoKey
from streamworker.postgres import Archive, Attempt, JobRecord, KeptLog, StepRow, Wanted
from streamworker.results import OutputEntry, OutputReader, ResultWaiter

KindsOf = Callable[[str], Sequence[str]]
"""All kinds that the handler of a kind answers to."""


class Opener(Protocol):
    """Opens what is read of jobs."""

    def archive(self, archive: Archive) -> Archive:
        """The ledger, its jobs opened."""

    def operator(self, operator: Operator) -> Operator:
        """The operator, its documents opened."""

    def waiter(self, waiter: ResultWaiter, job_id: str) -> ResultWaiter:
        """The end of a job, opened."""

    def reader(self, reader: OutputReader, job_id: str, purpose: Purpose = "output") -> OutputReader:
        """The output of a job, or its log, opened."""


class PlainOpener:
    """The `Opener` of apps without encryption: everything as it is."""

    def archive(self, archive: Archive) -> Archive:
        return archive

    def operator(self, operator: Operator) -> Operator:
        return operator

    def waiter(self, waiter: ResultWaiter, job_id: str) -> ResultWaiter:  # noqa: ARG002
        return waiter

    def reader(self, reader: OutputReader, job_id: str, purpose: Purpose = "output") -> OutputReader:  # noqa: ARG002
        return reader

    def document(self, body: bytes | None) -> bytes | None:
        return body

    def payload(self, payload: msgspec.Raw, job_id: str, kind: str) -> msgspec.Raw:  # noqa: ARG002
        return payload


class KeyOpener:
    """The `Opener` of apps with keys. What they do not open stays sealed.

    Args:
        keys: open it.
        kinds_of: further kinds that a payload may be sealed under.
    """

    def __init__(self, keys: Keys, kinds_of: KindsOf) -> None:
        self.keys = keys
        self._kinds_of = kinds_of

    def archive(self, archive: Archive) -> Archive:
        return cast("Archive", OpenedArchive(archive, self))

    def operator(self, operator: Operator) -> Operator:
        return cast("Operator", OpenedOperator(operator, self))

    def waiter(self, waiter: ResultWaiter, job_id: str) -> ResultWaiter:
        return OpenedWaiter(waiter, self.keys, job_id)

    def reader(self, reader: OutputReader, job_id: str, purpose: Purpose = "output") -> OutputReader:
        return OpenedReader(reader, self.keys, job_id, purpose)

    def payload(self, payload: msgspec.Raw, job_id: str, kind: str) -> msgspec.Raw:
        """A payload's JSON text; the payload as it is if it does not open."""
        try:
            return self.keys.opened_payload(payload, job_id, (kind, *self._kinds_of(kind), ""))
        except NoKey:
            return payload

    def document(self, body: bytes | None) -> bytes | None:
        """A document, its payload opened."""
        try:
            reading = codec.read(body or b"")
            if body is None or sealed_in(reading.payload) is None:
                return body
            return codec.rewrite(
                body, {"payload": self.payload(reading.payload, codec.id_in(reading) or "", reading.kind or "")}
            )
        except InvalidJob:
            return body

    def result(self, job_id: str, value: Any) -> Any:
        """A result; the value as it is if it does not open."""
        try:
            text = msgspec.json.encode(value)
            opened = self.keys.opened_result(job_id, text)
            return value if opened is text else msgspec.json.decode(opened)
        except (NoKey, TypeError, ValueError):
            return value

    def text(self, job_id: str, value: str) -> str:
        """The JSON text of a step's value; the value as it is if it does not open."""
        try:
            return self.keys.opened_json("step", job_id, value)
        except NoKey:
            return value

    def stored(self, job: StoredJob) -> StoredJob:
        """A delayed job or a dead letter, opened."""
        error, details = job.details.get("error"), job.details
        if error:  # as it is stored it tells the group
            opened = self.keys.opened_text(job.job_id or "", error)
            details = details | {"error": opened, "stored_error": error}
        return msgspec.structs.replace(job, body=self.document(job.body), details=details)

    def record(self, job: JobRecord) -> JobRecord:
        """A job of the ledger, opened."""
        return msgspec.structs.replace(
            job,
            error=job.error and self.keys.opened_text(job.id, job.error),
            result=job.result if job.result is None else self.result(job.id, job.result),
            payload=None if job.payload is None else self.payload(job.payload, job.id, job.kind),
            document=self.document(job.document),
        )


def opener_of(encryption: Keys | None, kinds_of: KindsOf) -> PlainOpener | KeyOpener:
    """The opener for an app's keys."""
    return PlainOpener() if encryption is None else KeyOpener(encryption, kinds_of)


class OpenedArchive:
    """An `Archive` whose jobs are opened."""

    def __init__(self, archive: Archive, opener: KeyOpener) -> None:
        self._archive, self._opener = archive, opener

    def __getattr__(self, name: str) -> Any:
        """What changes nothing of what is read."""
        return getattr(self._archive, name)

    async def jobs(self, wanted: Wanted, *, payload: bool = False) -> AsyncIterator[JobRecord]:
        async for job in self._archive.jobs(wanted, payload=payload):
            yield self._opener.record(job)

    async def find(self, job_id: str, queue: str | None = None) -> JobRecord | None:
        found = await self._archive.find(job_id, queue)
        return None if found is None else self._opener.record(found)

    async def steps(self, queue: str, job_id: str) -> list[StepRow]:
        """The steps of a job, opened."""
        return [
            msgspec.structs.replace(each, value=each.value and self._opener.text(job_id, each.value))
            for each in await self._archive.steps(queue, job_id)
        ]

    async def logs(self, queue: str, job_id: str) -> list[KeptLog]:
        """What the runs of a job logged, opened."""
        keys = self._opener.keys
        return [
            msgspec.structs.replace(each, lines=keys.opened_json("log", job_id, each.lines))
            for each in await self._archive.logs(queue, job_id)
        ]

    async def signal(self, job_id: str, name: str, data: str | None, queue: str | None) -> bool:
        """Send a signal, its data sealed."""
        sealed = None if data is None else self._opener.keys.sealed_json("step", job_id, data)
        return await self._archive.signal(job_id, name, sealed, queue)

    async def attempts(self, queue: str, job_id: str) -> list[Attempt]:
        keys = self._opener.keys
        return [
            msgspec.structs.replace(each, error=each.error and keys.opened_text(job_id, each.error))
            for each in await self._archive.attempts(queue, job_id)
        ]


class OpenedOperator:
    """An `Operator` whose documents are opened. No action takes an opened one: it reads the document anew."""

    def __init__(self, operator: Operator, opener: KeyOpener) -> None:
        self._operator, self._opener = operator, opener

    def __getattr__(self, name: str) -> Any:
        """What changes nothing of what is read."""
        return getattr(self._operator, name)

    async def body(self, entry: PendingEntry) -> bytes | None:
        return self._opener.document(await self._operator.body(entry))

    async def delayed(self, queue: str, after: str = "") -> Page[StoredJob]:
        return self._page(await self._operator.delayed(queue, after))

    async def delayed_job(self, queue: str, handle: str) -> StoredJob | None:
        found = await self._operator.delayed_job(queue, handle)
        return None if found is None else self._opener.stored(found)

    async def dead(self, queue: str, after: str = "", *, only: str | None = None) -> Page[StoredJob]:
        return self._page(await self._operator.dead(queue, after, only=only))

    async def run_now(self, job: StoredJob) -> bool:
        return await self._operator.run_now(msgspec.structs.replace(job, body=None))

    async def forget(self, job: StoredJob) -> bool:
        return await self._operator.forget(msgspec.structs.replace(job, body=None))

    async def replay(self, job: StoredJob) -> bool:
        return await self._operator.replay(msgspec.structs.replace(job, body=None))

    async def erase(self, job: StoredJob) -> bool:
        return await self._operator.erase(msgspec.structs.replace(job, body=None))

    def _page(self, page: Page[StoredJob]) -> Page[StoredJob]:
        return msgspec.structs.replace(page, rows=[self._opener.stored(job) for job in page.rows])


class OpenedWaiter:
    """A `ResultWaiter` whose notes are opened."""

    def __init__(self, waiter: ResultWaiter, keys: Keys, job_id: str) -> None:
        self._waiter, self._keys, self._job_id = waiter, keys, job_id

    async def kept(self) -> bytes | None:
        return self._opened(await self._waiter.kept())

    async def heard(self, timeout: float) -> bytes | None:
        return self._opened(await self._waiter.heard(timeout))

    def _opened(self, told: bytes | None) -> bytes | None:
        note = None if not told or told.isdigit() else results.read(told)
        if note is None:
            return told
        result = bytes(note.result)
        return results.written(
            results.JobEnd(
                note.status,
                msgspec.Raw(self._keys.opened_result(self._job_id, result)) if result else msgspec.Raw(),
                note.error and self._keys.opened_text(self._job_id, note.error),
            )
        )


class OpenedReader(OpenedWaiter):
    """An `OutputReader` whose chunks and notes are opened."""

    def __init__(self, reader: OutputReader, keys: Keys, job_id: str, purpose: Purpose) -> None:
        super().__init__(reader, keys, job_id)
        self._reader = reader
        self._purpose: Purpose = purpose

    async def read(self, after: int) -> list[OutputEntry]:
        return [
            msgspec.structs.replace(entry, chunks=self._keys.opened_bytes(self._purpose, self._job_id, entry.chunks))
            for entry in await self._reader.read(after)
        ]

    async def heard_of(self, timeout: float) -> Literal["output", "end", "look"]:
        return await self._reader.heard_of(timeout)

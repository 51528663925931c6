"""What the runs of a job logged, from the ledger and from Redis, each run apart, to the end of the job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Final

import anyio
import msgspec

from streamworker import results
from streamworker.encryption import sealed_in
from streamworker.errors import NoKey
from streamworker.postgres import Archive, KeptLog
from streamworker.redact import clean_block
from streamworker.results import LogLine, OutputItem, OutputReader

LOOK: Final = 5.0
"""Seconds between looks into the ledger while a job is followed: runs of half a second leave nothing in Redis."""


class JobLogLine(msgspec.Struct, frozen=True):
    """A line of a job's log.

    Attributes:
        at: when it was logged (UTC).
        level: debug, info, warning, error or critical.
        text: of the line; several lines if an exception was logged.
        attempt: the attempt, from 1.
        hop: with ``deliveries`` the run of that attempt, as in `streamworker jobs show`.
        deliveries: likewise.
        missed: lines of this run before this one that are not kept.
    """

    at: datetime
    level: str
    text: str
    attempt: int
    hop: int
    deliveries: int
    missed: int = 0

    @property
    def run(self) -> tuple[int, int]:
        """Which run logged it."""
        return self.hop, self.deliveries

    @property
    def heading(self) -> str:
        """What readers see before the first line of a run."""
        return f"attempt {self.attempt}, hop {self.hop}, delivery {self.deliveries}"


class LogFollower:
    """Reads the log of one job.

    Args:
        reader: of its log in Redis.
        archive: the ledger, if there is one.
        job: (queue, if known; id).
    """

    def __init__(self, reader: OutputReader, archive: Archive | None, job: tuple[str | None, str]) -> None:
        self._reader = reader
        self._archive = archive
        self._job = job
        self._shown: set[tuple[int, int]] = set()
        self._current: tuple[int, int] | None = None
        """The run whose lines come from Redis."""
        self._position = 0

    async def lines(self, *, live: bool) -> AsyncGenerator[JobLogLine, None]:
        """All lines, run by run, each from its oldest; ``live``: until the job has ended."""
        for line in await self._present():
            yield line
        if not live:
            return
        async with aclosing(self._items()) as items:
            async for item in items:
                new = None if item is None else _line(item)
                if new is None or new.run != self._current:
                    for earlier in await self._ended():
                        yield earlier
                if new is not None and (new.run == self._current or new.run not in self._shown):
                    self._current = new.run
                    self._shown.add(new.run)
                    yield new
        for line in await self._ended():
            yield line

    async def _present(self) -> list[JobLogLine]:
        """What is there now."""
        found = await self._ended()
        ended = set(self._shown)
        async for item in results.follow(self._reader, self._archive, self._job, 0, live=False):
            self._position, line = item.position, _line(item)
            if line is not None and line.run not in ended:  # else the ledger had all of it
                self._current = line.run
                self._shown.add(line.run)
                found.append(line)
        return sorted(found, key=lambda line: line.run)

    async def _ended(self) -> list[JobLogLine]:
        """What the ledger knows of runs that were not shown."""
        queue, job_id = self._job
        if self._archive is None:
            return []
        if queue is None:
            record = await self._archive.find(job_id)
            queue = None if record is None else record.queue
        found: list[JobLogLine] = []
        for kept in [] if queue is None else await self._archive.logs(queue, job_id):
            if (kept.hop, kept.deliveries) not in self._shown:
                self._shown.add((kept.hop, kept.deliveries))
                found += kept_lines(kept)
        return found

    async def _items(self) -> AsyncGenerator[OutputItem | None, None]:
        """What comes into Redis; ``None`` when it is time to look into the ledger."""
        items: AsyncIterator[OutputItem] = results.follow(self._reader, self._archive, self._job, self._position)
        awaited = asyncio.ensure_future(anext(items, None))
        try:
            while True:
                done, _ = await asyncio.wait({awaited}, timeout=LOOK)
                if not done:
                    yield None
                    continue
                item = awaited.result()
                if item is None:
                    return
                yield item
                awaited = asyncio.ensure_future(anext(items, None))
        finally:
            with anyio.CancelScope(shield=True):
                awaited.cancel()
                await asyncio.wait({awaited})


def _line(item: OutputItem) -> JobLogLine | None:
    try:
        line = msgspec.convert(item.chunk, LogLine)
    except msgspec.ValidationError:
        return None
    return JobLogLine(_moment(line.at), line.level, line.text, item.attempt, line.hop, line.deliveries, item.missed)


def kept_lines(kept: KeptLog) -> list[JobLogLine]:
    """The lines that the ledger keeps of a run.

    Raises:
        NoKey: they are sealed.
    """
    if sealed_in(kept.lines.encode()) is not None:
        raise NoKey("the log of this job is sealed: give this app the keys, App(encryption=Keys(...))")
    try:
        lines = msgspec.json.decode(kept.lines, type=list[tuple[float, str, str]])
    except (msgspec.MsgspecError, RecursionError):
        return []
    return [JobLogLine(_moment(at), level, text, kept.attempt, kept.hop, kept.deliveries) for at, level, text in lines]


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def log_text(line: JobLogLine) -> str:
    """A line for people."""
    missed = f"({line.missed:,} lines before this one are not kept)\n" if line.missed else ""
    moment = line.at.isoformat(sep=" ", timespec="milliseconds").partition("+")[0]
    return clean_block(f"{missed}{moment} {line.level:<8} {line.text}\n")

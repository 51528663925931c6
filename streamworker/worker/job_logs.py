"""LogBuffer: what handlers log, kept with their jobs: in Redis while they run, with the attempt in the ledger after."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import time
from typing import Final, Protocol

import msgspec

from streamworker import codec
from streamworker.codec import DocumentFields, deliveries_of
from streamworker.encryption import Sealer
from streamworker.errors import StreamworkerError
from streamworker.execution import Execution
from streamworker.job import Claim
from streamworker.postgres import KeptLog, Ledger, RunRecord, Stored
from streamworker.results import LogLine, Outputs
from streamworker.telemetry.logs import get_logger
from streamworker.telemetry.processors import text_of_record
from streamworker.worker.emission import OutputBuffer, RunOutput
from streamworker.worker.job_task import JOB

log = get_logger("streamworker.worker")

GATHER: Final = 0.5
"""Seconds in which lines gather. With a ledger a job that ends before leaves nothing in Redis."""
_OURS: Final = "streamworker"
_line: Final = msgspec.msgpack.Decoder(LogLine).decode
_encode: Final = msgspec.msgpack.Encoder().encode


class RunLog(RunOutput):
    """What one run has logged. Nothing waits for the server: of more lines than are kept the oldest go.

    Args:
        claim: of the run.
        reading: its document.
        lines: how many are kept.
    """

    __slots__ = ("deliveries", "hop", "kept", "lines", "sent")

    def __init__(self, claim: Claim, reading: DocumentFields, lines: int) -> None:
        super().__init__(claim, codec.job_id(reading, claim), (reading.attempt_count or 0) + 1)
        self.hop, self.deliveries = reading.hop or 0, deliveries_of(claim, reading)
        self.lines = lines
        self.kept: deque[bytes] = deque(maxlen=lines)
        self.sent = False
        """Whether some of it is in Redis."""

    def add(self, piece: bytes) -> None:
        """Add a line."""
        self.kept.append(piece)
        if len(self._pieces) >= self.lines:
            self.size -= len(self._pieces.pop(0))
            self._offset += 1
        super().add(piece)

    def stored(self) -> None:
        """`RunOutput.stored`."""
        self.sent = True
        super().stored()


class RunsByJob(Protocol):
    """The runs of a worker: `InFlight` has them."""

    def of_job(self, entry: bytes) -> Execution | None:
        """The run in whose context `JOB` is this object."""


class LogBuffer(OutputBuffer):
    """Logs of all runs of a worker, on their way to the server. It does nothing until a handler logs.

    Args:
        outputs: stores them.
        lines: how many are kept of each run.
        sealer: seals what the ledger gets.
        ledger: keeps them with the attempt, if there is one.
    """

    def __init__(self, outputs: Outputs, lines: int, sealer: Sealer, ledger: Ledger | None) -> None:
        super().__init__(outputs)
        self._gather = GATHER
        self._lines = lines
        self._sealer = sealer
        self._ledger = ledger

    def taker(self, claim: Claim, reading: DocumentFields) -> Callable[[str, str], None]:
        """`LogKeeper.taker`."""

        def take(level: str, text: str) -> None:
            line = LogLine(time(), level, text, run.hop, run.deliveries)
            self._hand_over(run, _encode(line))

        run = RunLog(claim, reading, self._lines)
        return take

    def _hand_over(self, run: RunLog, piece: bytes) -> None:
        if asyncio._get_running_loop() is self._loop:
            self._accept(run, piece)
        else:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._accept, run, piece)

    def _accept(self, run: RunLog, piece: bytes) -> None:
        if run.over:
            return
        # What a thread logs first, and what the standard library's logging brings, belong to one run.
        known = self.runs.setdefault((run.claim.place, run.claim.entry), run)
        if not known.over:
            self._take(known, piece)

    async def flush_of(self, claims: Collection[Claim]) -> None:
        """`OutputBuffer.flush_of`; of runs that the ledger keeps only where a reader may follow them."""
        await super().flush_of([claim for claim in claims if self._ledger is None or self.holds(claim)])

    def holds(self, claim: Claim) -> bool:
        """Whether the log of a run is in Redis."""
        run = self.runs.get((claim.place, claim.entry))
        return isinstance(run, RunLog) and (run.sent or self._ledger is None)

    async def keep(self, records: Sequence[RunRecord], runs: Sequence[Execution], answers: Sequence[Stored]) -> None:
        """Keep the logs of runs with their attempts, which are recorded. A log holds no job up: never raises."""
        if self._ledger is None or not self.runs:
            return
        rows = []
        for record, run, answer in zip(records, runs, answers, strict=True):
            known = self.runs.get((run.claim.place, run.claim.entry))
            if isinstance(known, RunLog) and answer is not Stored.BUSY:
                lines = [(line.at, line.level, line.text) for line in map(_line, known.kept)]
                text = self._sealer.sealed_json("log", record.job_id, msgspec.json.encode(lines).decode())
                rows.append(KeptLog(record.job_id, record.queue, record.hop, record.deliveries, text))
        if not rows:
            return
        try:
            await self._ledger.keep_logs(rows)
        except StreamworkerError as error:
            log.warning("job_logs_not_kept", jobs=len(rows), error=str(error))

    @contextmanager
    def listening(self, runs: RunsByJob) -> Iterator[None]:
        """Inside of the block, what jobs log by the standard library is kept, too."""
        handler = _JobHandler(self, runs)
        root = logging.getLogger()
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)

    def take_record(self, run: Execution, record: logging.LogRecord) -> None:
        """Take a record that was logged in the context of a run."""
        if run.reading is not None:
            self.taker(run.claim, run.reading)(record.levelname.lower(), text_of_record(record))


class _JobHandler(logging.Handler):
    """Gives the records of jobs to the buffer.

    Args:
        buffer: of the worker.
        runs: of the worker.
    """

    def __init__(self, buffer: LogBuffer, runs: RunsByJob) -> None:
        super().__init__()
        self._buffer = buffer
        self._runs = runs

    def emit(self, record: logging.LogRecord) -> None:
        entry = JOB.get()
        if entry is None or record.name.partition(".")[0] == _OURS:  # of ctx.log, which is kept anyway
            return
        run = self._runs.of_job(entry)
        if run is not None:
            with suppress(Exception):  # it must not reach the code that logs
                self._buffer.take_record(run, record)

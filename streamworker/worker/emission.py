"""OutputBuffer: what the runs of a worker emit, on its way to the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextvars import Context as Variables
from typing import Final

import anyio

from streamworker.errors import ClaimLost, ConfigurationError, UsageError
from streamworker.job import Claim, Settled
from streamworker.loops import Pause
from streamworker.results import OutputBatch, Outputs
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.worker")

GATHER: Final = 0.02
"""Seconds in which chunks gather before they are sent: 50 round trips a second and worker, however many chunks."""
TOGETHER: Final = 100
"""Runs whose chunks are sent together: those of the last ones are not taken before the first ones are stored."""
BATCH_CHUNKS: Final = 1000
BATCH_BYTES: Final = 262_144
"""What a job may have unsent; then ``emit`` waits until the server has taken some of it."""
_STEP: Final = 0.5
"""Seconds between looks of a thread that waits, whether its job was cancelled."""
_ROUNDS: Final = 10
"""Most batches of a run that is about to be settled: it has three at most, unless its threads go on."""
LOST: Final = (
    "the claim of this job was lost and it runs elsewhere by now: what this run emits is refused, let the handler end"
)


class RunOutput:
    """What one run has emitted and not stored yet.

    Args:
        claim: of the run.
        job_id: the job's id.
        attempt: from 1.
    """

    __slots__ = ("_attempt", "_offset", "_pieces", "_sent", "claim", "job_id", "over", "size")
    lines: int = 0
    """How many lines are kept of a log; 0: it is an output."""

    def __init__(self, claim: Claim, job_id: str, attempt: int) -> None:
        self.claim, self.job_id, self._attempt = claim, job_id, attempt
        self._pieces: list[bytes] = []
        self._sent: OutputBatch | None = None
        self._offset = 0
        self.size = 0
        self.over = ""
        """Why nothing more is taken; empty while something is."""

    @property
    def waiting(self) -> bool:
        """Whether something is not stored yet."""
        return bool(self._pieces or self._sent)

    @property
    def full(self) -> bool:
        """Whether ``emit`` has to wait."""
        return self.size >= BATCH_BYTES or len(self._pieces) >= BATCH_CHUNKS

    def add(self, piece: bytes) -> None:
        """Add a chunk."""
        self._pieces.append(piece)
        self.size += len(piece)

    def batch(self) -> OutputBatch:
        """What is to be sent next: the same as before until it is known that it was stored."""
        if self._sent is None:
            size, count = 0, 0
            for piece in self._pieces[:BATCH_CHUNKS]:
                size, count = size + len(piece), count + 1
                if size >= BATCH_BYTES:
                    break
            chunks = b"\xdc" + count.to_bytes(2, "big") + b"".join(self._pieces[:count])
            self._sent = OutputBatch(
                self.claim, self.job_id, self._attempt, self._offset, count, chunks, lines=self.lines
            )
            del self._pieces[:count]
            self.size -= size
        return self._sent

    def stored(self) -> None:
        """The batch is stored, or will never be."""
        if self._sent is not None:
            self._offset += self._sent.count
            self._sent = None

    def close(self, why: str) -> None:
        """Take nothing more, and forget what is not stored."""
        self.over = self.over or why
        self._pieces.clear()
        self._sent, self.size = None, 0


class OutputBuffer:
    """Outputs of all runs of a worker, on their way to the server. It does nothing until a handler emits.

    Args:
        outputs: stores them.
    """

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs
        self._gather = GATHER
        self.runs: Final[dict[tuple[str, bytes], RunOutput]] = {}
        """Runs that have emitted and are not settled, by place and entry of their claims."""
        self._unsent: dict[RunOutput, None] = {}
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._progress = anyio.Event()
        self._closed = anyio.Event()

    def begin(self, claim: Claim, job_id: str, attempt: int) -> RunOutput:
        """The output of a run that emits for the first time."""
        # Its threads may emit for the first time at once.
        return self.runs.setdefault((claim.place, claim.entry), RunOutput(claim, job_id, attempt))

    async def add(self, run: RunOutput, piece: bytes) -> None:
        """Add a chunk, and wait while too much is unsent.

        Raises:
            ClaimLost: nothing is taken of this run any more.
        """
        self._take(run, piece)
        await self._wait_until_sent(run)

    def add_from_thread(self, run: RunOutput, piece: bytes, cancelled: Callable[[], object]) -> None:
        """`add` for another thread than the event loop's; ``cancelled()`` ends the wait."""
        if asyncio._get_running_loop() is self._loop:
            raise UsageError("ctx.emit_blocking() would block the event loop: `await ctx.emit(...)` there")
        if run.over:
            raise ClaimLost(run.over)
        self._loop.call_soon_threadsafe(self._take_if_open, run, piece)
        if not run.full:
            return
        waiting = asyncio.run_coroutine_threadsafe(self._wait_until_sent(run), self._loop)
        while not cancelled():
            try:
                waiting.result(_STEP)
            except FutureTimeout:
                continue
            return
        waiting.cancel()

    def _take_if_open(self, run: RunOutput, piece: bytes) -> None:
        if not run.over:
            self._take(run, piece)

    def _take(self, run: RunOutput, piece: bytes) -> None:
        if run.over:
            raise ClaimLost(run.over)
        run.add(piece)
        self._unsent[run] = None
        if self._task is None or self._task.done():
            # Not in the context of the job that emits: the task goes on after it.
            self._task = self._loop.create_task(self._send(), context=Variables())

    async def _wait_until_sent(self, run: RunOutput) -> None:
        while run.full:
            await self._progress.wait()
        if run.over:
            raise ClaimLost(run.over)

    async def _send(self) -> None:
        """Send until all is sent."""
        pause = Pause(longest=5.0)
        while self._unsent and not self._closed.is_set():
            await anyio.sleep(self._gather)
            try:
                await self.flush()
            except Exception as error:  # noqa: BLE001 - a main loop never crashes; the batches are sent again
                log.warning("output_waits", jobs=len(self._unsent), error=str(error))
                await pause.wait(self._closed)
            else:
                pause.reset()

    async def flush(self) -> None:
        """Send one batch of each run that has something unsent.

        Raises:
            Unreachable: no server answers; what was sent will be sent again.
        """
        runs = list(self._unsent)
        if len(runs) > TOGETHER:
            runs.sort(key=lambda run: run.claim.place)  # a call is about one key
        for start in range(0, len(runs), TOGETHER):
            await self._flush(runs[start : start + TOGETHER])

    async def _flush(self, some: Sequence[RunOutput]) -> None:
        """Send one batch of each of some runs: of what they have emitted until now, not until the flush began."""
        async with self._lock:
            runs = []
            for run in some:
                if run.waiting:
                    runs.append(run)
                else:  # another call has sent it meanwhile, or its run was closed
                    self._unsent.pop(run, None)
            if not runs:
                return
            try:
                answers = await self._outputs.emit([run.batch() for run in runs])
            except ConfigurationError as error:  # a permission is missing: jobs must not wait for that
                log.error("output_refused", jobs=len(runs), error=str(error))
                answers = [Settled.REFUSED] * len(runs)
            for run, answer in zip(runs, answers, strict=True):
                if answer is Settled.LOST:
                    run.close(LOST)
                    self.runs.pop((run.claim.place, run.claim.entry), None)
                elif answer is not None:
                    run.stored()
                if not run.waiting:
                    self._unsent.pop(run, None)
            self._progress.set()
            self._progress = anyio.Event()

    async def flush_of(self, claims: Collection[Claim]) -> None:
        """Send all that the runs of these claims have emitted, so that readers see it before the end.

        Raises:
            Unreachable: no server answers.
        """
        runs = [run for claim in claims if (run := self.runs.get((claim.place, claim.entry))) is not None]
        for _ in range(_ROUNDS):
            if not any(run.waiting for run in runs):
                return
            await self._flush(runs)

    def holds(self, claim: Claim) -> bool:
        """Whether the run of a claim has emitted."""
        return (claim.place, claim.entry) in self.runs

    def forget(self, claims: Iterable[Claim]) -> None:
        """These claims are settled or lost."""
        for claim in claims:
            run = self.runs.pop((claim.place, claim.entry), None)
            if run is not None:
                run.close("ctx.emit() was called after this run had ended: nothing more is taken of it")
                self._unsent.pop(run, None)

    async def close(self) -> None:
        """End: nothing is taken any more."""
        self._closed.set()
        for run in (*self.runs.values(), *self._unsent):
            run.close("the worker shuts down: nothing more is taken of this run")
        self._progress.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=1)

"""What jobs leave for readers: output while they run, and the note about their end; and waiting for both.

The note is published to waiters and stored for a while. The output of a job is a stream of its own in Redis. Its chunks
have positions, which rise by one with each; the chunks of a run follow each other, because what a run emits after its
claim was lost is refused by the script that appends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar, overload

import msgspec

from streamworker.codec import DocumentFields
from streamworker.encryption import FIELD, Sealer, is_sealed
from streamworker.errors import (
    InvalidJob,
    JobCancelled,
    JobDead,
    JobExpired,
    NoKey,
    ResultNotKept,
    ResultTimeout,
    UsageError,
)
from streamworker.job import Claim, Settled
from streamworker.payload import infinity_in
from streamworker.postgres import Archive, ParentSource
from streamworker.redact import describe

T = TypeVar("T")

MAX_RESULT: Final = 262_144
"""Bytes of the largest result that is kept."""


class JobEnd(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a job ended.

    Attributes:
        status: as the ledger calls it.
        result: what its handler returned, as JSON; empty where it is not kept here.
        error: why it is dead, what its last run failed with if it expired then, or why there is no result.
    """

    status: Literal["completed", "dead", "cancelled", "expired"]
    result: msgspec.Raw = msgspec.Raw()
    error: str | None = None


_decoder: Final = msgspec.json.Decoder(JobEnd)
COMPLETED: Final = b'{"status":"completed"}'
CANCELLED: Final = b'{"status":"cancelled"}'


def written(note: JobEnd) -> bytes:
    """A note as bytes; half a surrogate pair in its error is spelled out."""
    if note.error is not None and not note.error.isascii():
        note = msgspec.structs.replace(note, error=note.error.encode(errors="backslashreplace").decode())
    return msgspec.json.encode(note)


def read(told: bytes) -> JobEnd | None:
    """A note, or for a number the note of a result that was kept for so many ms; ``None`` for bytes that are none."""
    if told.isdigit():
        return JobEnd("completed", error=f"its result was kept for {int(told[:18]) / 1000:g} s and has expired")
    try:
        return _decoder.decode(told)
    except msgspec.MsgspecError:
        return None


def result_json(value: Any) -> bytes:
    """What a handler returned, as it is kept.

    Raises:
        ValueError: it cannot be kept; the message says why.
    """
    try:
        result = msgspec.json.encode(value, enc_hook=_refuse)
    except BaseException as error:  # noqa: BLE001 - a user's objects run code here, and it must not end the worker
        what = describe(error)[:1000]
        raise ValueError(f"what the handler returned cannot be written as JSON: {what}") from None
    if b"null" in result and (place := infinity_in(value)) is not None:
        where = f"at {place.removeprefix('.')} " if place else ""
        raise ValueError(f"what the handler returned is {where}NaN or an infinity, which JSON lacks")
    if len(result) > MAX_RESULT:
        raise ValueError(f"what the handler returned has {len(result)} bytes and {MAX_RESULT} are kept")
    return result


class NotKept:
    """In place of what a handler returned: why it is not kept."""

    def __init__(self, why: Exception) -> None:
        self.why = why


def _refuse(value: Any) -> Any:
    if isinstance(value, NotKept):
        raise value.why
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


def completed(value: Any) -> bytes:
    """The note of a job whose handler returned ``value``."""
    try:
        return written(JobEnd("completed", msgspec.Raw(result_json(value))))
    except ValueError as error:
        return written(JobEnd("completed", error=str(error)))


LOOK: Final = 10.0
"""Seconds between looks while nothing is heard: what was told while the connection was down is found then."""


class ResultWaiter(Protocol):
    """Subscription to the end of one job."""

    async def kept(self) -> bytes | None:
        """The result note that is stored, if there is one; ends of the job are published for the next 30 seconds."""

    async def heard(self, timeout: float) -> bytes | None:
        """The next published note; empty if one may have been missed, ``None`` after ``timeout`` seconds."""


async def wait_for(
    hearing: ResultWaiter, archive: Archive | None, job: tuple[str | None, str], end: float | None
) -> Any:
    """Look, then listen, and look again when there may be something new; ``job`` is its queue, if known, and its id."""
    _, job_id = job
    while True:
        note = await noted(hearing, archive, *job)
        look_at = monotonic() + LOOK
        while note is None:
            left = min(look_at, end if end is not None else look_at) - monotonic()
            told = await hearing.heard(max(0.0, left))
            if told is None and end is not None and monotonic() >= end:
                raise ResultTimeout(
                    f"the job {job_id} has not ended yet, or longer ago than its result is kept (result_ttl): wait for "
                    "longer, or look at it",
                    job_id,
                )
            if not told:
                break
            note = read(told)
            if note is not None and note.status == "completed" and not bytes(note.result):
                # Told by a worker that keeps nothing in Redis: the ledger has it, if there is one.
                note = await noted(hearing, archive, *job) or note
        if note is not None:
            return _value(note, job_id)


async def noted(hearing: ResultWaiter, archive: Archive | None, queue: str | None, job_id: str) -> JobEnd | None:
    """What is kept of a job's end, in Redis or in the ledger."""
    kept = await hearing.kept()
    note = read(kept) if kept is not None else None
    if note is not None and (archive is None or note.status != "completed" or bytes(note.result)):
        return note
    record = None if archive is None else await archive.find(job_id, queue)
    if record is None or record.status not in ("completed", "dead", "cancelled", "expired"):
        return note
    lost = record.result is None and record.error is not None
    kept_none = record.status != "completed" or lost
    result = msgspec.Raw() if kept_none else msgspec.Raw(msgspec.json.encode(record.result))
    return JobEnd(record.status, result, record.error)


def _value(note: JobEnd, job_id: str) -> Any:
    if note.status == "dead":
        why = note.error or "nobody said why"
        raise JobDead(f"the job {job_id} is a dead letter ({why}): look at it, and retry or drop it", job_id, why)
    if note.status == "cancelled":
        raise JobCancelled(f"the job {job_id} was cancelled", job_id)
    if note.status == "expired":
        why = f" ({note.error})" if note.error else ""
        raise JobExpired(f"the job {job_id} expired before it could start{why}: enqueue its data anew", job_id)
    if not bytes(note.result):
        why = note.error or "set result_ttl on its handler, or use the ledger"
        raise ResultNotKept(f"the job {job_id} is completed, but has no result: {why}", job_id)
    result = msgspec.json.decode(note.result)
    if type(result) is dict and FIELD in result:
        raise NoKey(f"the result of the job {job_id} is sealed: give this app the keys, App(encryption=Keys(...))")
    return result


# -- of the nodes before a node of a flow
class Parents:
    """The results of the nodes before this one in its flow: ``ctx.parents``. Read when asked for, once per call.

    Args:
        source: of the running job.
        sealer: opens results that are sealed.
    """

    def __init__(self, source: ParentSource, sealer: Sealer) -> None:
        self._source = source
        self._sealer = sealer

    @overload
    async def results(self, type_: type[T], /) -> dict[str, T]: ...
    @overload
    async def results(self, type_: Any = ..., /) -> dict[str, Any]: ...
    async def results(self, type_: Any = Any, /) -> dict[str, Any]:
        """What the nodes before this one returned, by their names; those that failed or never ran are not there.

        Args:
            type_: of each value, which is made of its JSON; without one: dicts, lists, texts, numbers.

        Raises:
            InvalidJob: a result is not of that type.
            Unreachable: PostgreSQL does not answer.
        """
        return {name: self._typed(name, job_id, text, type_) for name, job_id, text in await self._source.read()}

    @overload
    async def result(self, name: str, type_: type[T], /) -> T: ...
    @overload
    async def result(self, name: str, type_: Any = ..., /) -> Any: ...
    async def result(self, name: str, type_: Any = Any, /) -> Any:
        """What one node before this one returned.

        Args:
            name: of the node, as `Flow.add` gave it.
            type_: of the value.

        Raises:
            ResultNotKept: no node of that name comes right before this one, or it was not completed.
            InvalidJob: the result is not of that type.
            Unreachable: PostgreSQL does not answer.
        """
        found = {each: (job_id, text) for each, job_id, text in await self._source.read()}
        if name not in found:
            names = ", ".join(sorted(found)[:5]) or "none"
            raise ResultNotKept(f"no node {name!r} was completed right before this one (there are: {names})", name)
        return self._typed(name, *found[name], type_)

    def results_blocking(self, type_: Any = Any, /) -> dict[str, Any]:
        """`results` for sync handlers."""
        return self._source.wait(self.results(type_))

    def result_blocking(self, name: str, type_: Any = Any, /) -> Any:
        """`result` for sync handlers."""
        return self._source.wait(self.result(name, type_))

    def _typed(self, name: str, job_id: str, text: str | None, type_: Any) -> Any:
        try:
            return msgspec.json.decode(self._sealer.opened_json("result", job_id, text or "null"), type=type_)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise InvalidJob(f"the result of the node {name!r} is not what is asked for: {error}") from None


# -- output
MAX_CHUNK: Final = 65_536
"""Bytes of the largest chunk: larger things belong into results or a store of files."""
MAX_CHUNKS: Final = 10_000
"""Most chunks of an output in Redis: three minutes of a model that emits 50 tokens a second. The oldest go first."""
MAX_BYTES: Final = 1_048_576
"""Most bytes of an output in Redis: a thousand jobs that emit hold a GB at most. The oldest chunks go first."""
LIFE: Final = 3600.0
"""Seconds for which an output can be read after its last chunk: readers come back after a deploy or a lost network."""
BOUNDS: Final = (round(LIFE * 1000), MAX_CHUNKS, MAX_BYTES)
"""As the scripts take them."""
MAX_LOG_BYTES: Final = 524_288
"""Most bytes of a job's log in Redis."""
_JSON: Final = 1
"""Code of the MessagePack extension that holds JSON."""

Chunk: TypeAlias = Any
"""A str, bytes, or what JSON can say."""


READ: Final = 100
"""Most entries of one read of an output."""


class OutputItem(msgspec.Struct, frozen=True):
    """One chunk of a job's output.

    Attributes:
        position: where it is; give it as ``after`` to go on behind it.
        run: which run of the job emitted it: the position of the first chunk of that run.
        attempt: the attempt of that run, from 1.
        chunk: what was emitted: a str, bytes, or what JSON can say.
        restart: another run emitted what came before: the job started over, and so should the reader.
        missed: chunks of this run before this one that were not kept for the reader.
    """

    position: int
    run: int
    attempt: int
    chunk: Chunk
    restart: bool = False
    missed: int = 0


class OutputBatch(msgspec.Struct, frozen=True):
    """Chunks of one run that are appended together.

    Attributes:
        claim: the claim, and the fence.
        job_id: the job's id.
        attempt: from 1.
        offset: chunks that this run stored before: a batch that was stored already is not stored again.
        count: number of chunks.
        chunks: the chunks, as an array of MessagePack.
        lines: of a log, which is kept beside the output, how many lines it keeps; 0: these are chunks of the output.
    """

    claim: Claim
    job_id: str
    attempt: int
    offset: int
    count: int
    chunks: bytes
    lines: int = 0


class OutputEntry(msgspec.Struct, frozen=True):
    """An `OutputBatch` as it is stored.

    Attributes:
        position: of its last chunk.
        run: position of the first chunk of its run.
        attempt: from 1.
        stored: chunks of its run up to its last one.
        chunks: as an array of MessagePack.
    """

    position: int
    run: int
    attempt: int
    stored: int
    chunks: bytes


class OutputReader(ResultWaiter, Protocol):
    """Subscription to the output of one job, and to its end."""

    async def read(self, after: int) -> list[OutputEntry]:
        """Some of what is stored behind a position; empty if nothing is."""

    async def heard_of(self, timeout: float) -> Literal["output", "end", "look"]:
        """Wait for something new: chunks, the end, or ``look`` if that may have been missed, or after ``timeout`` s."""


class Emitter(Protocol):
    """Takes what the runs of a worker emit."""

    def begin(self, claim: Claim, job_id: str, attempt: int) -> Any:
        """The output of a run that emits for the first time; the other methods take it."""

    async def add(self, run: Any, piece: bytes) -> None:
        """Add a chunk, as `packed` makes it, and wait while too much of the run is unsent.

        Raises:
            ClaimLost: the claim was lost, or the run has ended.
        """

    def add_from_thread(self, run: Any, piece: bytes, cancelled: Callable[[], object]) -> None:
        """`add` for another thread than the event loop's; ``cancelled()`` ends the wait.

        Raises:
            UsageError: this is the event loop's thread.
            ClaimLost: as for `add`.
        """


class Outputs(Protocol):
    """Outputs and logs of jobs."""

    async def emit(self, batches: Sequence[OutputBatch]) -> list[Settled | None]:
        """Append to outputs, each only if the claim still holds; safe to repeat.

        Returns:
            For each, in order: stored (``SETTLED``), ``LOST``, ``REFUSED`` for good, or ``None``: to be sent again.
        """

    def output(
        self, queues: Sequence[str], job_id: str, *, log: bool = False
    ) -> AbstractAsyncContextManager[OutputReader]:
        """Subscribe to the output of a job in one of the queues, or to its log.

        Raises:
            Unreachable: no server answers.
        """


class LogLine(msgspec.Struct, frozen=True, array_like=True):
    """A line of a job's log, as it is stored: a chunk of an output of its own.

    Attributes:
        at: epoch seconds.
        level: debug, info, warning, error or critical.
        text: cleaned, without passwords; of an exception several lines.
        hop: of the run, as the ledger counts it.
        deliveries: of the run, likewise.
    """

    at: float
    level: str
    text: str
    hop: int = 0
    deliveries: int = 1


class LogKeeper(Protocol):
    """Keeps what handlers log with their jobs."""

    def taker(self, claim: Claim, reading: DocumentFields) -> Callable[[str, str], None]:
        """Takes (level, text) of what the run of a claim logs, in any thread."""


def log_bounds(lines: int) -> tuple[int, int, int]:
    """Bounds of a log in Redis that keeps the last so many lines: whole batches are dropped, of as many at most."""
    return round(LIFE * 1000), 2 * lines, MAX_LOG_BYTES


def packed(chunk: Chunk) -> bytes:
    """A chunk as MessagePack.

    Raises:
        UsageError: it is no str, no bytes, and JSON cannot say it; or it is too large.
    """
    try:
        if not isinstance(chunk, str | bytes):
            chunk = msgspec.msgpack.Ext(_JSON, result_json(chunk))
        piece = msgspec.msgpack.encode(chunk)
    except ValueError as error:  # half a surrogate pair, too
        why = str(error).removeprefix("what the handler returned ")
        raise UsageError(f"ctx.emit() takes str, bytes or what JSON can say: this chunk {why}") from None
    if len(piece) > MAX_CHUNK:
        raise UsageError(f"ctx.emit() takes chunks of up to {MAX_CHUNK} bytes, this one has {len(piece)}: split it")
    return piece


def _unpack(code: int, data: memoryview) -> Any:
    return msgspec.json.decode(data) if code == _JSON else msgspec.msgpack.Ext(code, bytes(data))


_chunks: Final = msgspec.msgpack.Decoder(list[Any], ext_hook=_unpack)


def check_position(after: int) -> int:
    """A position to begin behind.

    Raises:
        UsageError: it is none.
    """
    if type(after) is not int or not 0 <= after < 2**53:
        raise UsageError(f"{after!r} is no position of an output: give that of an item, or 0 for all there is")
    return after


async def follow(
    reader: OutputReader, archive: Archive | None, job: tuple[str | None, str], after: int, *, live: bool = True
) -> AsyncIterator[OutputItem]:
    """Items of an output behind a position, to the end of the job; ``job`` is its queue, if known, and its id.

    Args:
        reader: reads it.
        archive: the ledger, if there is one: it knows how jobs ended long ago.
        job: (queue, id).
        after: the position.
        live: wait for more; else end with what is there.
    """
    cursor = _Cursor(after)
    while True:
        # Looked up before the chunks are read: what was emitted before the end is stored before it.
        ended = not live or await noted(reader, archive, *job) is not None
        look_at = monotonic() + LOOK
        while True:
            while entries := await reader.read(cursor.position):
                for entry in entries:
                    for item in cursor.items(entry):
                        yield item
                if len(entries) < READ and not ended:
                    break  # of what is stored from now on the reader hears
            if ended:
                return
            match await reader.heard_of(max(0.0, look_at - monotonic())):
                case "look":
                    break
                case "end":
                    ended = True


class _Cursor:
    """Where a reader is."""

    def __init__(self, after: int) -> None:
        self.position = after
        self._run: int | None = None
        self._read = 0

    def items(self, entry: OutputEntry) -> list[OutputItem]:
        """The items of an entry that are new; the position moves behind them."""
        if is_sealed(entry.chunks):
            raise NoKey("the output of this job is sealed: give this app the keys, App(encryption=Keys(...))")
        try:
            chunks = _chunks.decode(entry.chunks)
        except msgspec.MsgspecError:
            chunks = []
        first, number = entry.position - len(chunks) + 1, entry.stored - len(chunks)
        found = []
        for position, chunk in enumerate(chunks, first):
            number += 1
            if position <= self.position:
                continue
            if self._run is None:  # the first item: what the reader read before is known by its position alone
                same = entry.run <= self.position
                restart = not same and self.position > 0
                missed = max(0, position - self.position - 1) if same else number - 1
            else:
                restart = entry.run != self._run
                missed = number - 1 - (0 if restart else self._read)
            self._run, self._read = entry.run, number
            found.append(OutputItem(position, entry.run, entry.attempt, chunk, restart, missed))
        self.position = max(self.position, entry.position)
        return found


def entry_of(entry: bytes, told: Mapping[bytes, bytes]) -> OutputEntry | None:
    """An entry of the stream; ``None`` if it is none of ours."""
    try:
        run, attempt, stored = (int(told[name]) for name in (b"run", b"attempt", b"stored"))
        return OutputEntry(int(entry.partition(b"-")[0]), run, attempt, stored, told[b"chunks"])
    except (KeyError, ValueError):
        return None

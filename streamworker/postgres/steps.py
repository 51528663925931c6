"""Steps of a handler: what each returned is remembered in the ledger, and a later run of the job does not run it again.

The first step of a run takes the job's row for the run, as `ctx.transaction()` does, and then reads what earlier runs
recorded: from that moment on no earlier run records anything, because every record checks hop and deliveries in the
statement that writes it. A step is known by its name and by its place in the order of the handler's steps.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Sequence
from contextvars import ContextVar
from time import time
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar

import anyio
import msgspec

from streamworker.errors import (
    Parked,
    RunEnded,
    SignalTimeout,
    StepsChanged,
    Unreachable,
    UsageError,
)
from streamworker.loops import at_once, in_loop
from streamworker.postgres import Effect, RunRecord, SqlConnection, StepHost, refusal
from streamworker.postgres.adapters import PoolTransaction, connection_of, transaction_of
from streamworker.postgres.encoding import stored_id, text
from streamworker.postgres.pool import AnyPool, Database
from streamworker.postgres.sqlstate import is_outage, is_unable, reason, sqlstate
from streamworker.postgres.transaction import (
    BUSY,
    BlockingRunTransaction,
    RunTransaction,
    small,
    take,
    uninterrupted,
)
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.ledger")

T = TypeVar("T")
Kind: TypeAlias = Literal["step", "sleep", "wait", "cursor"]

MOST_BYTES: Final = 262_144
"""Most bytes of JSON that a step may return, or a cursor may have."""
MOST_NAME: Final = 200
"""Most characters of a step's name."""
SAME: Final = 0.001
"""Seconds by which two texts of one moment may differ."""
CURSOR: Final = -1
"""The position of the cursor, which is no step."""
AGAIN: Final = (0.1, 2.0)
"""Seconds between tries to record a step while PostgreSQL does not answer: the first pause, and the longest."""

# Every value is text, cast by the server: it may be the user's connection, with the user's type codecs.
REMEMBERED: Final = """
select step.position::text, step.kind, step.name, step.value::text, step.made::text,
  (step.until <= clock_timestamp())::text, extract(epoch from step.until)::text, logged.runs::text
from (select count(*) as runs from streamworker.job_logs where job_id = $1::text and queue_name = $2::text) as logged
left join streamworker.job_steps as step on step.job_id = $1::text and step.queue_name = $2::text"""
RECORD: Final = """
with job as materialized (
  select id, queue_name from streamworker.jobs
  where id = $1::text and queue_name = $2::text
    and hop = $3::text::bigint and deliveries = $4::text::integer and status = 'running'
  for no key update
)
insert into streamworker.job_steps as known (job_id, queue_name, position, kind, name, value, made, hop, deliveries,
    worker_id, until, started_at)
  select id, queue_name, $5::text::integer, $6::text, $7::text, $8::text::json, $9::text::double precision,
    $3::text::bigint, $4::text::integer, $10::text,
    clock_timestamp() + make_interval(secs => $11::text::double precision),
    to_timestamp($12::text::double precision)
  from job
  on conflict (job_id, queue_name, position) do update set
      kind = excluded.kind, name = excluded.name, value = excluded.value, made = excluded.made, hop = excluded.hop,
      deliveries = excluded.deliveries, worker_id = excluded.worker_id, until = excluded.until,
      started_at = excluded.started_at, recorded_at = excluded.recorded_at
    where known.kind = 'cursor' or (known.hop, known.deliveries) = (excluded.hop, excluded.deliveries)
  returning position::text, extract(epoch from until)::text"""
"""The fence is in the statement: the row of the job is locked, and must be that of this very run."""
WHY: Final = "select status from streamworker.jobs where id = $1::text and queue_name = $2::text"
FORGET: Final = f"""
delete from streamworker.job_steps where job_id = $1::text and queue_name = $2::text
  and abs(made - $3::text::double precision) > {SAME} and made <> 0"""  # noqa: S608 - a number of ours
SIGNALLED: Final = """
select data::text, timed_out::text from streamworker.job_signals
where job_id = $1::text and queue_name = $2::text and name = $3::text"""
TIME_OUT: Final = """
insert into streamworker.job_signals (job_id, queue_name, name, timed_out, seen)
select job_id, queue_name, name, true, true from streamworker.job_steps
where job_id = $1::text and queue_name = $2::text and position = $3::text::integer and until <= clock_timestamp()
on conflict do nothing"""
"""A signal and its timeout are one row: the first of the two counts, for every run of the job."""
LOCK_JOB: Final = "select 1 from streamworker.jobs where id = $1 and queue_name = $2 for update"
IS_RECORDED: Final = """
select 1 from streamworker.job_steps
where job_id = $1 and queue_name = $2 and position = $3 and hop = $4 and deliveries = $5"""

_INSIDE: Final[ContextVar[tuple[Any, str]]] = ContextVar("streamworker_step", default=(None, ""))
"""The run, and its step, that the current task or thread is inside of."""


class Remembered(NamedTuple):
    """A step that an earlier run recorded; ``over``: its time has come; ``until``: when it does, in epoch seconds."""

    kind: str
    name: str
    value: str | None
    over: bool = False
    until: float | None = None


class JobSteps:
    """The steps of one run of a job.

    Args:
        database: the ledger's own connections.
        pool: the pool of handlers' transactions.
        run: the run.
        worker_id: the worker that runs it.
        host: the run's context.
    """

    def __init__(self, database: Database, pool: AnyPool, run: RunRecord, worker_id: str, host: StepHost) -> None:
        self._database = database
        self._pool = pool
        self._run = run
        self._worker_id = worker_id
        self._host = host
        self._made = run.created or 0.0
        self._key = (stored_id(run.job_id), run.queue)
        self._next = 0
        self._names: set[tuple[str, str]] = set()
        self._loading = asyncio.Lock()
        self._remembered: dict[int, Remembered] | None = None
        self.runs = 0
        self.progressed = False

    # -- steps

    async def call(self, name: str, function: Callable[..., Any], args: Sequence[Any], result: Any, source: Any) -> Any:
        """The value of a step: remembered, or of a call of ``function`` that is recorded."""
        position = self._enter("step", name)
        if (known := await self._known(position, "step", name)) is not None:
            return decoded(name, known.value, result)
        if source is not None:
            return await self._call_in_transaction(position, name, function, args, result, source)
        started, inside = time(), _INSIDE.set((self, name))
        try:
            value = function(*args)
            if inspect.isawaitable(value):
                value = await value
        finally:
            _INSIDE.reset(inside)
        raw = encoded(name, value)
        made = decoded(name, raw, result)
        await uninterrupted(self._record(position, "step", name, raw, started=started))
        return made

    def call_blocking(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], result: Any, source: Any
    ) -> Any:
        """`call` in a handler's thread."""
        position = self._enter("step", name)
        if (known := self.wait(self._known(position, "step", name))) is not None:
            return decoded(name, known.value, result)
        if source is not None:
            return self._blocking_transaction(position, name, function, args, result, source)
        started, inside = time(), _INSIDE.set((self, name))
        try:
            value = function(*args)
        finally:
            _INSIDE.reset(inside)
        raw = encoded(name, value)
        made = decoded(name, raw, result)
        self.wait(self._record(position, "step", name, raw, started=started))
        return made

    async def _call_in_transaction(
        self, position: int, name: str, function: Callable[..., Any], args: Sequence[Any], result: Any, source: Any
    ) -> Any:
        made = PoolTransaction(self._pool) if source is True else transaction_of(source)
        if made.blocking:
            raise UsageError(f"the step {name!r} has a transaction that blocks: call ctx.step_blocking()")
        ending = StepRecord(self, position, name, time())
        around = StepTransaction(made, self._database, self._run, self._worker_id, self._host.deadline_at)
        around.ending = ending
        inside = _INSIDE.set((self, name))
        try:
            with self._host.during(around):
                async with around as given:
                    value = function(given, *args)
                    if inspect.isawaitable(value):
                        value = await value
                    ending.raw = encoded(name, value)
                    back = decoded(name, ending.raw, result)
        finally:
            _INSIDE.reset(inside)
        self.progressed = True
        return back

    def _blocking_transaction(
        self, position: int, name: str, function: Callable[..., Any], args: Sequence[Any], result: Any, source: Any
    ) -> Any:
        made = None if source is True else transaction_of(source)
        if made is None or not made.blocking:
            raise UsageError(
                f"the step {name!r} is in a sync handler: its transaction= takes a pool, an engine or a session "
                "factory that blocks"
            )
        ending = StepRecord(self, position, name, time())
        around = BlockingStepTransaction(made, self._database, self._run, self._worker_id, self._host.deadline_at)
        around.ending = ending
        inside = _INSIDE.set((self, name))
        try:
            with self._host.during(around), around as given:
                ending.raw = encoded(name, function(given, *args))
                back = decoded(name, ending.raw, result)
        finally:
            _INSIDE.reset(inside)
        self.progressed = True
        return back

    # -- signals

    async def wait_for(self, name: str, timeout: float | None, result: Any) -> Any:
        """The data of a signal, if it was sent; else the job is parked."""
        position = self._enter("wait", name)
        known = await self._known(position, "wait", name)
        answer = await self._signalled(name)
        if answer is None and (known is not None or timeout == 0):
            if known is None:
                await uninterrupted(self._record(position, "wait", name, None, until=0.0))
            await self._ask(TIME_OUT, *self._key, str(position))
            answer = await self._signalled(name)
        if answer is None:
            until = known.until if known is not None else None
            if known is None:
                until = await uninterrupted(self._record(position, "wait", name, None, until=timeout))
            raise Parked(name, until)
        data, timed_out = answer
        if known is None and timeout != 0:
            await uninterrupted(self._record(position, "wait", name, None, until=timeout))
        if timed_out == "true":
            raise SignalTimeout(f"no signal {name!r} came in time")
        if data is not None:
            data = self._host.sealer.opened_json("step", self._run.job_id, data)
        return decoded(f"the signal {name!r}", data, result)

    async def sleep(self, seconds: float) -> None:
        """Return if the time of an earlier run has passed; else the job is parked."""
        position = self._enter("sleep", "")
        known = await self._known(position, "sleep", "")
        if known is not None and known.over:
            return
        until = known.until if known is not None else None
        if known is None:
            until = await uninterrupted(self._record(position, "sleep", "", None, until=seconds))
            if seconds <= 0:
                return
        raise Parked("", until)

    async def _signalled(self, name: str) -> Sequence[Any] | None:
        rows = await self._ask(SIGNALLED, *self._key, name)
        return rows[0] if rows else None

    async def _ask(self, statement: str, *values: Any) -> Sequence[Any]:
        try:
            return await self._database.fetch(statement, *values)
        except Exception as error:
            if is_outage(error) or is_unable(error):
                raise self._lost("look for the signal", error) from error
            raise

    # -- the cursor

    async def cursor(self, default: Any, result: Any) -> Any:
        """The last cursor that a run of the job set."""
        known = (await self._load()).get(CURSOR)
        return default if known is None else decoded("the cursor", known.value, result)

    async def set_cursor(self, value: Any, given: Any) -> None:
        """Record a cursor; on the caller's connection, with the caller's rows."""
        raw = encoded("the cursor", value)
        await self._load()
        theirs = None
        if given is not None:
            theirs = await connection_of(given, blocking=False, instead="call ctx.cursor.set_blocking()")
        await uninterrupted(self._move(raw, theirs))

    def set_cursor_blocking(self, value: Any, given: Any) -> None:
        """`set_cursor` in a handler's thread."""
        raw = encoded("the cursor", value)
        self.wait(self._load())
        if given is None:
            self.wait(self._move(raw, None))
        else:
            instead = "await ctx.cursor.set()"
            theirs = at_once(connection_of(given, blocking=True, instead=instead))
            at_once(self._move(raw, theirs))

    async def _move(self, raw: str, theirs: SqlConnection | None) -> None:
        await self._record(CURSOR, "cursor", "", raw, connection=theirs)
        (await self._load())[CURSOR] = Remembered("cursor", "", raw)

    # -- order

    def _enter(self, kind: Kind, name: Any) -> int:
        """The position of the step that begins now.

        Raises:
            UsageError: it has no name, one that another step of this run has, or it is inside of another step.
        """
        if kind != "sleep" and (not isinstance(name, str) or "\x00" in name or not 0 < len(name) <= MOST_NAME):
            raise UsageError(f"a {kind} needs a name of 1 to {MOST_NAME} characters, not {name!r:.100}")
        steps, inside = _INSIDE.get()
        if steps is self:
            raise UsageError(f"the {kind} {name!r} is inside of the step {inside!r}: call one after the other")
        if kind != "step" and self._host.connection is not None:
            raise UsageError(
                f"the {kind} {name!r} is inside of a transaction, which cannot wait: end the block before it"
            )
        if kind != "step" and self._host.batch:
            raise UsageError(f"the {kind} {name!r} is in a handler of batches, whose jobs cannot wait")
        if kind != "sleep" and (kind, name) in self._names:
            raise UsageError(f"two {kind}s of this handler are named {name!r}: put what tells them apart into the name")
        self._names.add((kind, name))
        position, self._next = self._next, self._next + 1
        return position

    async def _known(self, position: int, kind: Kind, name: str) -> Remembered | None:
        """What an earlier run recorded at this position.

        Raises:
            StepsChanged: that was another step.
        """
        remembered = await self._load()
        known = remembered.get(position)
        if known is not None:
            if (known.kind, known.name) != (kind, name):
                raise changed(position, f"{known.kind} {known.name!r}", f"{kind} {name!r}")
            return known
        for at, each in remembered.items():
            if at != CURSOR and (each.kind, each.name) == (kind, name) and kind != "sleep":
                raise changed(at, f"{kind} {name!r}", f"step {position + 1}")
        return None

    async def _load(self) -> dict[int, Remembered]:
        """Take the job's row for this run, and read what earlier runs recorded; once."""
        if self._remembered is not None:
            return self._remembered
        async with self._loading:
            if self._remembered is None:
                try:
                    self._remembered = await self._read()
                except RunEnded as ended:
                    self._host.refuse(refusal(ended))
                    raise
                except Exception as error:
                    if self._host.connection is None and (is_outage(error) or is_unable(error)):
                        raise self._lost("read the steps of this job", error) from error
                    raise
        return self._remembered

    async def _read(self) -> dict[int, Remembered]:
        connection: Any = self._host.connection
        if connection is None:  # else the transaction has taken it
            connection = self._database
            await take(connection, self._run, self._worker_id, becomes="running", within=None)
        rows = await connection.fetch(REMEMBERED, *self._key)
        self.runs = int(rows[0][7])
        found: dict[int, Remembered] = {}
        stale = False
        for position, kind, name, value, made, over, until, _ in rows:
            if position is None:
                continue
            if self._made and float(made) and abs(float(made) - self._made) > SAME:
                stale = True  # of another job, whose id this one uses anew
                continue
            opened = None if value is None else self._host.sealer.opened_json("step", self._run.job_id, value)
            found[int(position)] = Remembered(
                kind, name, opened, over == "true", None if until is None else float(until)
            )
        if stale:
            await connection.fetch(FORGET, *self._key, repr(self._made))
        return found

    # -- records

    def values(self, position: int, kind: Kind, name: str, raw: str | None, *more: float | None) -> tuple[Any, ...]:
        """The values of `RECORD`; ``more`` are seconds from now until its time comes, and when it began."""
        until, started = (*more, None, None)[:2]
        sealed = None if raw is None else self._host.sealer.sealed_json("step", self._run.job_id, raw)
        return (
            *self._key, str(self._run.hop), small(self._run.deliveries), str(position), kind, text(name), sealed,
            repr(self._made), self._worker_id, None if until is None else repr(float(until)),
            None if started is None else repr(started),
        )  # fmt: skip

    async def _record(
        self,
        position: int,
        kind: Kind,
        name: str,
        raw: str | None,
        *,
        started: float | None = None,
        until: float | None = None,
        connection: SqlConnection | None = None,
    ) -> float | None:
        """Record a step under the fence; returns when its time comes.

        What a step has done is done: while PostgreSQL does not answer it is tried again, until the run is cancelled.

        Raises:
            RunEnded: a later run has the job, or it has ended.
            Unreachable: the run is cancelled, and PostgreSQL still does not answer.
        """
        values = self.values(position, kind, name, raw, until, started)
        theirs: Any = connection or self._host.connection
        pause = AGAIN[0]
        while True:
            try:
                rows = await (theirs or self._database).fetch(RECORD, *values)
                break
            except Exception as error:
                passing = is_outage(error) or is_unable(error) or sqlstate(error) in BUSY
                if theirs is not None or not passing:
                    raise
                if self._host.cause:
                    log.error("step_not_recorded", job_id=self._run.job_id, step=name, error=reason(error))
                    raise self._lost(f"record the step {name!r}", error) from error
                await anyio.sleep(pause)
                pause = min(AGAIN[1], 2 * pause)
        if not rows:
            await self._refused(theirs or self._database)
        self.progressed = True
        return None if rows[0][1] is None else float(rows[0][1])

    async def _refused(self, connection: Any) -> None:
        rows = await connection.fetch(WHY, *self._key)
        status = rows[0][0] if rows else "forgotten"
        ended = RunEnded(f"the job is {status}", superseded=status not in ("completed", "cancelled", "expired"))
        self._host.refuse(refusal(ended))
        log.info("step_refused", job_id=self._run.job_id, kind=self._run.kind, queue=self._run.queue, reason=status)
        raise ended

    def _lost(self, what: str, error: BaseException) -> Unreachable:
        self._host.refuse(Effect.LOST)
        return Unreachable(f"PostgreSQL cannot {what}: {reason(error)}")

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, in a handler's thread.

        Raises:
            UsageError: this is the event loop, which it would block.
        """
        if self._host.connection is not None and self._host.connection.blocking:
            return at_once(work)
        return in_loop(self._database.loop, work)


class StepRecord:
    """How the transaction of a step ends: the step is recorded in it."""

    def __init__(self, steps: JobSteps, position: int, name: str, started: float) -> None:
        self._steps = steps
        self._name = name
        self._started = started
        self.position = position
        self.raw = ""

    def values(self) -> tuple[Any, ...]:
        """Of `RECORD`."""
        return self._steps.values(self.position, "step", self._name, self.raw, None, self._started)


class _OfStep:
    """What the transaction of a step commits beside the user's rows: its value, and the job goes on."""

    ending: StepRecord
    _ledger: Database
    _run: RunRecord

    async def _finish(self, connection: SqlConnection) -> bool:
        return bool(await connection.fetch(RECORD, *self.ending.values()))

    async def _is_there(self) -> bool:
        return await recorded(self._ledger, self._run, self.ending.position)


class StepTransaction(_OfStep, RunTransaction):
    """The transaction of a step: its writes and its value commit together."""


class BlockingStepTransaction(_OfStep, BlockingRunTransaction):
    """`StepTransaction` for handlers in threads."""


async def recorded(ledger: Database, run: RunRecord, position: int) -> bool:
    """Whether a run has recorded a step. A commit that is under way has locked the job's row, and is waited for."""
    key = (stored_id(run.job_id), run.queue)
    await ledger.fetch(LOCK_JOB, *key)
    return bool(await ledger.fetch(IS_RECORDED, *key, position, run.hop, int(small(run.deliveries))))


def encoded(name: str, value: Any) -> str:
    """A value as JSON.

    Raises:
        UsageError: JSON cannot say it, or it is too large.
    """
    try:
        raw = msgspec.json.encode(value)
        msgspec.json.decode(raw)  # raw JSON inside of it may be none
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise UsageError(f"the value of {name} cannot be written as JSON: {error}") from None
    if len(raw) > MOST_BYTES:
        raise UsageError(
            f"the value of {name} has {len(raw)} bytes of JSON and {MOST_BYTES} are allowed: store it elsewhere and "
            "give a reference"
        )
    return raw.decode()


def decoded(name: str, raw: str | None, result: Any) -> Any:
    """The remembered value, also in the run that made it: so that every run of the handler is given the same.

    Raises:
        StepsChanged: it does not fit the type.
    """
    try:
        return msgspec.json.decode(raw or "null", type=Any if result is None else result)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise StepsChanged(f"what is remembered of {name} does not fit the type that is asked for: {error}") from None


def changed(position: int, before: str, now: str) -> StepsChanged:
    """The error of a handler whose steps are not those of the run that recorded them."""
    return StepsChanged(
        f"the steps of this handler were renamed or reordered: step {position + 1} of this job was recorded as "
        f"{before} and is {now} now; deploy the steps as they were, or give the changed handler a new kind"
    )

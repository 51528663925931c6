"""`ctx.transaction()`: the handler's writes and the job's status ``completed`` commit together, once.

The first statement locks the job's row, so that of all runs of a job, on all workers, one at a time may write. A zombie
finds the row completed, or taken by a later delivery, and is refused; it holds the lock no longer than its deadline,
because the server ends a session that is idle in a transaction for longer.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from time import monotonic
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar

import anyio

from streamworker.errors import RunEnded, Unreachable, UsageError
from streamworker.loops import at_once
from streamworker.postgres import Effect, RunRecord, SqlConnection, SqlTransaction, refusal
from streamworker.postgres.adapters import connection_of
from streamworker.postgres.encoding import headers_text, json_text, stored_id, text
from streamworker.postgres.pool import Database
from streamworker.postgres.sqlstate import is_outage, is_unable, reason, schema_expected, sqlstate
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.ledger")

T = TypeVar("T")

COMMIT_TIMEOUT: Final = 10.0
"""Seconds a commit may take."""
RESOLVE_TIMEOUT: Final = 10.0
"""Seconds to find out whether a commit whose reply was lost took effect; then the job is released."""
BUSY: Final = ("55P03", "40001", "40P01")
"""SQLSTATEs of a row that another transaction has: lock_not_available, serialization_failure, deadlock_detected."""
_MOST_INT: Final = 2**31 - 1

# The connection is the user's, with the user's type codecs: every value is sent as text and cast by the server.
TAKE: Final = """
select streamworker.take_job(
  $1::text, $2::text::bigint, $3::text::integer, $4::text, $5::text, $6::text::integer, $7::text, $8::text, $9::text,
  $10::text, $11::text, convert_to($12::text, 'UTF8'), $13::text::integer, $14::text::integer,
  $15::text, $16::text::double precision, $17::text::double precision)::text"""

FINISH: Final = """
update streamworker.jobs
set status = 'completed', finished_at = clock_timestamp(), updated_at = clock_timestamp()
where id = $1::text and queue_name = $4::text and hop = $2::text::bigint and deliveries = $3::text::integer
  and status = 'running' and xmin = pg_current_xact_id()::xid
returning id"""
"""Of the row as this very transaction wrote it: in another one, begun inside the block, nothing is finished."""

IS_COMPLETED: Final = """
select (status = 'completed' and hop = $2 and deliveries = $3) as completed
from streamworker.jobs where id = $1 and queue_name = $4 for update"""


class Timer(Protocol):
    """Of an event loop or a thread."""

    def cancel(self) -> object:
        """Do nothing when the time has come."""


class _Transaction:
    """What `RunTransaction` and `BlockingRunTransaction` share, as coroutines: none suspends on what blocks.

    Args:
        transaction: on a connection of the handlers' source.
        ledger: to look the job up when the reply to a commit was lost.
        run: of the job.
        worker_id: the worker that runs it.
        deadline: monotonic seconds at which the run times out.
    """

    def __init__(
        self,
        transaction: SqlTransaction,
        ledger: Database,
        run: RunRecord,
        worker_id: str,
        deadline: float | None,
    ) -> None:
        self._transaction = transaction
        self._ledger = ledger
        self._run = run
        self._worker_id = worker_id
        self._deadline = deadline
        self._connection: SqlConnection | None = None
        self.effect = Effect.UNDONE

    @property
    def connection(self) -> SqlConnection | None:
        """For our statements, while the block is open."""
        return self._connection

    async def _begin(self) -> Any:
        try:
            self._connection, given = await self._transaction.begin()
            self.effect = Effect.OPEN
            within = None if self._deadline is None else max(1, int((self._deadline - monotonic()) * 1000))
            await take(self._connection, self._run, self._worker_id, becomes="running", within=within)
        except BaseException as error:
            await self._undo(refusal(error) if isinstance(error, RunEnded) else Effect.UNDONE)
            if is_outage(error) or is_unable(error):
                self.effect = Effect.LOST
                raise Unreachable(f"PostgreSQL cannot begin ctx.transaction(): {reason(error)}") from error
            raise
        return given

    async def _commit(self) -> None:
        connection, run = self._connection, self._run
        if connection is None:
            raise AssertionError("a transaction is committed after it began")
        # A silent server must not block the handler for ever; a broken connection is resolved below.
        timer = self._break_off_later()
        try:
            if not await self._finish(connection):
                raise UsageError(
                    "the transaction was ended inside the block, or the job's row was changed in it: leave commit, "
                    "rollback and streamworker.jobs to ctx.transaction()"
                )
            await self._transaction.commit()
        except BaseException as error:
            if is_unable(error) and not is_outage(error):
                await self._undo(Effect.LOST)
                raise Unreachable(f"PostgreSQL cannot commit: {reason(error)}") from error
            if not is_outage(error):
                await self._undo(Effect.UNDONE)
                raise
            await self._undo(Effect.LOST)
            self.effect = await self._looked_up()
            log.warning(
                "commit_uncertain", job_id=run.job_id, kind=run.kind, fate=self.effect.value, error=reason(error)
            )
            if self.effect is not Effect.COMMITTED:
                self.effect = Effect.LOST
                raise Unreachable(f"PostgreSQL was lost during the commit: {reason(error)}") from error
            return
        finally:
            timer.cancel()
        self.effect = Effect.COMMITTED
        await self._release()

    async def _finish(self, connection: SqlConnection) -> bool:
        """Write what the commit stands for; False if the row of the job is no longer this transaction's."""
        run = self._run
        key = (stored_id(run.job_id), str(run.hop), small(run.deliveries), run.queue)
        return bool(await connection.fetch(FINISH, *key))

    async def _is_there(self) -> bool:
        """Whether what `_finish` wrote is committed; waits for a commit in flight."""
        run = self._run
        key = (stored_id(run.job_id), run.hop, min(run.deliveries, _MOST_INT), run.queue)
        done = await self._ledger.fetch(IS_COMPLETED, *key)
        return bool(done and done[0][0])

    def _break_off_later(self) -> Timer:
        return self._ledger.loop.call_later(COMMIT_TIMEOUT, self._transaction.break_off)

    async def _looked_up(self) -> Effect:
        return await self._resolved()

    async def _resolved(self) -> Effect:
        """Whether the commit took effect; the query locks the row, so that it waits for a commit in flight."""
        run, give_up_at = self._run, monotonic() + RESOLVE_TIMEOUT
        while True:
            try:
                there = await self._is_there()
            except Exception as error:  # noqa: BLE001 - down, or locked by the commit itself
                if monotonic() > give_up_at:
                    log.debug("commit_unresolved", job_id=run.job_id, error=reason(error))
                    return Effect.LOST
                await anyio.sleep(0.2)
            else:
                return Effect.COMMITTED if there else Effect.UNDONE

    async def _undo(self, effect: Effect) -> None:
        """Roll back, if a transaction has begun."""
        self.effect = effect
        try:
            await self._transaction.rollback()
        except Exception as error:  # noqa: BLE001 - the server rolls back by itself when the connection ends
            log.debug("rollback_failed", job_id=self._run.job_id, error=reason(error))
            self._transaction.break_off()
        finally:
            await self._release()

    async def _release(self) -> None:
        self._connection = None
        try:
            await self._transaction.release()
        except Exception as error:  # noqa: BLE001 - the outcome is known already
            log.debug("release_failed", job_id=self._run.job_id, error=reason(error))


class RunTransaction(_Transaction):
    """`Transaction` on PostgreSQL; yields a connection or a session of its source."""

    async def __aenter__(self) -> Any:
        """Begin, and lock the job's row.

        Raises:
            RunEnded: the job was completed before, a later delivery took it, or another run has locked its row.
            Unreachable: no server answers; the job is released uncharged.
        """
        return await self._begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Commit if the block ended well, else roll back."""
        if error is not None:
            await self._undo(Effect.UNDONE)
            return
        await uninterrupted(self._commit())


class BlockingRunTransaction(_Transaction):
    """`BlockingTransaction` on PostgreSQL, for handlers in threads."""

    def __enter__(self) -> Any:
        """Begin, and lock the job's row; raises what `RunTransaction` raises."""
        return at_once(self._begin())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Commit if the block ended well, else roll back."""
        at_once(self._commit() if error is None else self._undo(Effect.UNDONE))

    def _break_off_later(self) -> Timer:
        timer = threading.Timer(COMMIT_TIMEOUT, self._transaction.break_off)
        timer.daemon = True
        timer.start()
        return timer

    async def _looked_up(self) -> Effect:
        """The ledger's connections belong to the event loop, and this thread waits for it."""
        return asyncio.run_coroutine_threadsafe(self._resolved(), self._ledger.loop).result()


async def complete(given: Any, run: RunRecord, worker_id: str, *, blocking: bool) -> None:
    """Mark the job completed in the caller's own transaction: `Ledger.complete`."""
    other = "`await ctx.complete(connection)`" if blocking else "`ctx.complete_blocking(connection)`"
    connection = await connection_of(given, blocking=blocking, instead=f"call {other}")
    await take(connection, run, worker_id, becomes="completed", within=None)


async def take(connection: SqlConnection, run: RunRecord, worker_id: str, *, becomes: str, within: int | None) -> None:
    """Lock the job's row for a run.

    Args:
        connection: in a transaction.
        run: the run.
        worker_id: the worker that runs it.
        becomes: the job's status when the transaction commits, unless a later statement changes it.
        within: milliseconds the transaction may take.

    Raises:
        RunEnded: this run may do nothing more for the job.
        ConfigurationError: the database has no schema streamworker.
    """
    try:
        with schema_expected("complete jobs"):
            rows = await connection.fetch(
                TAKE, stored_id(run.job_id), str(run.hop), small(run.deliveries), becomes, worker_id,
                None if within is None else small(within), run.queue, text(run.kind), run.level,
                json_text(run.payload), headers_text(run.headers),
                None if run.body is None else run.body.decode(errors="replace"), small(run.attempts),
                None if run.max_attempts is None else small(run.max_attempts),
                text(run.epoch.decode(errors="backslashreplace")), _float(run.created), _float(run.started),
            )  # fmt: skip
    except Exception as error:
        if sqlstate(error) not in BUSY:
            raise
        raise RunEnded("another run of this job is at work", busy=True) from error
    against = rows[0][0]
    if against is not None:
        log.info("run_ended", job_id=run.job_id, kind=run.kind, queue=run.queue, reason=against)
        raise RunEnded(f"the job is {against}", superseded=against == "superseded")


async def uninterrupted(work: Awaitable[T]) -> T:
    """Await ``work`` to its end; a cancellation meanwhile is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled() and task.exception() is not None:
            log.debug("commit_failed", error=reason(task.exception()))  # type: ignore[arg-type]
        raise cancelled
    return task.result()


def small(number: int) -> str:
    """The number as text for a column of 32 bits."""
    return str(min(number, _MOST_INT))


def _float(number: float | None) -> str | None:
    return None if number is None else repr(number)

"""`ctx.transaction()`: the handler's writes and the job's status ``completed`` commit together, once.

The first statement locks the job's row, so that of all runs of a job, on all workers, one at a time may write. A zombie
finds the row completed, or taken by a later delivery, and is refused; it holds the lock no longer than its deadline,
because the server ends a session that is idle in a transaction for longer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from time import monotonic
from types import TracebackType
from typing import Any, Final, TypeVar

import anyio
import asyncpg
from asyncpg.transaction import Transaction as AsyncpgTransaction

from streamworker.errors import RunEnded, Unreachable, UsageError
from streamworker.postgres import Effect, RunRecord, refusal
from streamworker.postgres.encoding import headers_text, json_text, stored_id, text
from streamworker.postgres.pool import AnyPool, Connection, Database
from streamworker.postgres.sqlstate import break_off, is_gone, is_outage, is_unable, reason
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.ledger")

T = TypeVar("T")

COMMIT_TIMEOUT: Final = 10.0
"""Seconds a commit may take."""
RESOLVE_TIMEOUT: Final = 10.0
"""Seconds to find out whether a commit whose reply was lost took effect; then the job is released."""
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
  and status = 'running'
returning id"""

IS_COMPLETED: Final = """
select (status = 'completed' and hop = $2 and deliveries = $3) as completed
from streamworker.jobs where id = $1 and queue_name = $4 for update"""


class RunTransaction:
    """`Transaction` on PostgreSQL; yields an asyncpg connection.

    Args:
        pool: the pool of the handlers.
        ledger: to look the job up when the reply to a commit was lost.
        run: of the job.
        worker_id: the worker that runs it.
        deadline: monotonic seconds at which the run times out.
    """

    def __init__(self, pool: AnyPool, ledger: Database, run: RunRecord, worker_id: str, deadline: float | None) -> None:
        self._pool = pool
        self._ledger = ledger
        self._run = run
        self._worker_id = worker_id
        self._deadline = deadline
        self._connection: Connection | None = None
        self._transaction: AsyncpgTransaction | None = None
        self.effect = Effect.UNDONE

    async def __aenter__(self) -> Connection:
        """Begin, and lock the job's row.

        Raises:
            RunEnded: the job was completed before, a later delivery took it, or another run has locked its row.
            Unreachable: no server answers; the job is released uncharged.
        """
        try:
            connection = self._connection = await self._pool.acquire()
            transaction = connection.transaction()
            await transaction.start()
            self._transaction = transaction
            self.effect = Effect.OPEN
            within = None if self._deadline is None else max(1, int((self._deadline - monotonic()) * 1000))
            await take(connection, self._run, self._worker_id, becomes="running", within=within)
        except BaseException as error:
            await self._undo(self._effect_of(error))
            if is_outage(error) or is_unable(error):
                self.effect = Effect.LOST
                raise Unreachable(f"PostgreSQL cannot begin ctx.transaction(): {reason(error)}") from error
            raise
        return connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Commit if the block ended well, else roll back."""
        if error is not None:
            await self._undo(Effect.UNDONE)
            return
        await uninterrupted(self._commit())

    async def _commit(self) -> None:
        connection, transaction, run = self._connection, self._transaction, self._run
        if connection is None or transaction is None:
            raise AssertionError("a transaction is committed after it began")
        if not is_gone(connection) and not connection.is_in_transaction():
            await self._undo(Effect.UNDONE)
            raise UsageError(
                "the transaction was ended inside the block: leave commit and rollback to ctx.transaction()"
            )
        # A silent server must not block the handler for ever; a broken connection is resolved below.
        timer = asyncio.get_running_loop().call_later(COMMIT_TIMEOUT, break_off, connection)
        try:
            key = (stored_id(run.job_id), str(run.hop), _small(run.deliveries), run.queue)
            if not await connection.fetchval(FINISH, *key):
                raise UsageError("the job's row was changed inside its own transaction: leave streamworker.jobs alone")
            await transaction.commit()
        except BaseException as error:
            if is_unable(error) and not is_outage(error):
                await self._undo(Effect.LOST)
                raise Unreachable(f"PostgreSQL cannot commit: {reason(error)}") from error
            if not is_outage(error):
                await self._undo(Effect.UNDONE)
                raise
            await self._undo(Effect.LOST)
            self.effect = await self._resolved()
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

    async def _resolved(self) -> Effect:
        """Whether the commit took effect; the query locks the row, so that it waits for a commit in flight."""
        run, give_up_at = self._run, monotonic() + RESOLVE_TIMEOUT
        while True:
            try:
                key = (stored_id(run.job_id), run.hop, min(run.deliveries, _MOST_INT), run.queue)
                done = await self._ledger.fetch(IS_COMPLETED, *key)
            except Exception as error:  # noqa: BLE001 - down, or locked by the commit itself
                if monotonic() > give_up_at:
                    log.debug("commit_unresolved", job_id=run.job_id, error=reason(error))
                    return Effect.LOST
                await anyio.sleep(0.2)
            else:
                return Effect.COMMITTED if done and done[0][0] else Effect.UNDONE

    @staticmethod
    def _effect_of(error: BaseException) -> Effect:
        if isinstance(error, RunEnded):
            return refusal(error)
        return Effect.UNDONE

    async def _undo(self, effect: Effect) -> None:
        """Roll back, if a transaction has begun."""
        self.effect = effect
        transaction, connection = self._transaction, self._connection
        try:
            if transaction is not None and connection is not None and not is_gone(connection):
                await transaction.rollback()
        except Exception as error:  # noqa: BLE001 - the server rolls back by itself when the connection ends
            log.debug("rollback_failed", job_id=self._run.job_id, error=reason(error))
            break_off(connection)
        finally:
            await self._release()

    async def _release(self) -> None:
        connection, self._connection, self._transaction = self._connection, None, None
        if connection is None:
            return
        try:
            await self._pool.release(connection)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - the outcome is known already
            log.debug("release_failed", job_id=self._run.job_id, error=reason(error))


async def complete(connection: Any, run: RunRecord, worker_id: str) -> None:
    """Mark the job completed in the caller's own transaction: `Ledger.complete`."""
    if not hasattr(connection, "is_in_transaction") or not hasattr(connection, "fetchval"):
        raise UsageError("ctx.complete() needs an asyncpg connection, in a transaction of yours")
    if not connection.is_in_transaction():
        raise UsageError(
            "ctx.complete() needs a connection in a transaction: use it inside `async with connection.transaction():`"
        )
    await take(connection, run, worker_id, becomes="completed", within=None)


async def take(connection: Any, run: RunRecord, worker_id: str, *, becomes: str, within: int | None) -> None:
    """Lock the job's row for a run.

    Args:
        connection: in a transaction.
        run: the run.
        worker_id: the worker that runs it.
        becomes: the job's status when the transaction commits, unless a later statement changes it.
        within: milliseconds the transaction may take.

    Raises:
        RunEnded: this run may do nothing more for the job.
    """
    try:
        against = await connection.fetchval(
            TAKE, stored_id(run.job_id), str(run.hop), _small(run.deliveries), becomes, worker_id,
            None if within is None else _small(within), run.queue, text(run.kind), run.level, json_text(run.payload),
            headers_text(run.headers), None if run.body is None else run.body.decode(errors="replace"),
            _small(run.attempts), None if run.max_attempts is None else _small(run.max_attempts),
            text(run.epoch.decode(errors="backslashreplace")), _float(run.created), _float(run.started),
        )  # fmt: skip
    except (asyncpg.LockNotAvailableError, asyncpg.SerializationError, asyncpg.DeadlockDetectedError) as error:
        raise RunEnded("another run of this job is at work", busy=True) from error
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


def _small(number: int) -> str:
    return str(min(number, _MOST_INT))


def _float(number: float | None) -> str | None:
    return None if number is None else repr(number)

"""Jobs that wait: parked by their worker when a run has ended, and woken by the relay when a signal was sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from streamworker.encryption import Sealer
from streamworker.errors import StreamworkerError, UsageError
from streamworker.postgres import RunRecord, SqlConnection, Stored
from streamworker.postgres.adapters import connection_of
from streamworker.postgres.encoding import refused_by_jsonb, stored_id
from streamworker.postgres.pool import Database
from streamworker.postgres.recording import moment
from streamworker.postgres.sqlstate import reason, schema_expected, sqlstate, translated
from streamworker.postgres.steps import encoded
from streamworker.postgres.transaction import small

SIGNAL: Final = "select streamworker.signal($1::text, $2::text, $3::text::jsonb, $4::text)::text"
# In the order of their ids, so that two batches cannot wait for each other.
PARK: Final = """
select item.place, streamworker.park_job(item.id, item.queue_name, item.hop, item.deliveries, item.waits_for,
  item.wake_at, item.document, item.attempts, item.attempt, $1::text, item.started, item.finished, item.expires)
  as answer
from (
  select * from unnest($2::text[], $3::text[], $4::bigint[], $5::integer[], $6::text[], $7::float8[], $8::bytea[],
    $9::integer[], $10::integer[], $11::float8[], $12::float8[], $13::float8[]) with ordinality as item (id, queue_name,
    hop, deliveries, waits_for, wake_at, document, attempts, attempt, started, finished, expires, place)
  order by queue_name, id offset 0
) as item"""


async def park(database: Database, runs: Sequence[RunRecord], worker_id: str) -> list[Stored]:
    """Let jobs wait; see `Ledger.park`."""
    rows = [
        (stored_id(run.job_id), run.queue, run.hop, int(small(run.deliveries)), run.waits_for, run.run_at, run.body,
         int(small(run.attempts)), int(small(run.attempt)), run.started, run.finished, moment(run.expires))
        for run in runs
    ]  # fmt: skip
    try:
        found = await database.fetch(PARK, worker_id, *map(list, zip(*rows, strict=True)))
    except Exception as error:
        raise translated(error, "letting jobs wait") from error
    answers = [Stored.SUPERSEDED] * len(runs)
    for row in found:
        answers[row["place"] - 1] = Stored(row["answer"])
    return answers


async def send_signal(
    connection: SqlConnection | Database, job_id: str, name: str, data: str | None, queue: str | None
) -> bool:
    """Send a signal, on a connection in the caller's transaction or on one of ours; see `Archive.signal`."""
    if data is not None and refused_by_jsonb(data):
        raise UsageError(f"the data of the signal {name!r} holds a NUL, which PostgreSQL cannot store in jsonb")
    try:
        with schema_expected("send signals"):
            rows: Any = await connection.fetch(SIGNAL, stored_id(job_id), name, data, queue)
    except Exception as error:
        if sqlstate(error) == "22023":
            raise UsageError(reason(error)) from None
        if isinstance(connection, Database) and not isinstance(error, StreamworkerError):
            raise translated(error, "sending a signal") from error
        raise
    return bool(rows[0][0] == "true")


def signal_data(data: Any, job_id: str, sealer: Sealer) -> str | None:
    """The data of a signal as JSON text, sealed for its job if the app has keys.

    Raises:
        UsageError: JSON cannot say it, or it is too large.
    """
    return None if data is None else sealer.sealed_json("step", job_id, encoded("the data of a signal", data))


async def signal_in_transaction(
    given: Any, job_id: str, name: str, data: str | None, queue: str | None, *, blocking: bool = False
) -> bool:
    """Send a signal on the caller's connection, in the caller's transaction; without suspending if that blocks."""
    other = "await app.signal(..., connection=...)" if blocking else "call app.signal_blocking(..., connection=...)"
    made = await connection_of(given, blocking=blocking, instead=other)
    return await send_signal(made, job_id, name, data, queue)

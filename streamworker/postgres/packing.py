"""Many runs as a few values: what an array of every column costs to encode is most of what recording costs.

Columns that differ from run to run are joined into one text each, with a control character that neither JSON nor any
sane id contains; everything else stands once per *shape*, as JSON. Whatever does not fit that goes the long way
(`recording.RECORD`), which can also tell which row is at fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from streamworker.postgres import RunRecord
from streamworker.postgres.rows import created, headers_text, refused_by_jsonb

_COLUMN: Final = "\x1f"
_NULL: Final = "\x1e"
_MICROSECONDS: Final = 1e6
_MOST_INT: Final = 2**31 - 1
_encode = msgspec.json.encode

ON_CONFLICT: Final = """
  on conflict (id) do update set
      status = excluded.status, kind = coalesce(nullif(stored.kind, ''), excluded.kind),
      attempt_count = excluded.attempt_count, hop = excluded.hop, deliveries = excluded.deliveries,
      run_at = coalesce(excluded.run_at, stored.run_at),
      worker_id = excluded.worker_id, started_at = coalesce(excluded.started_at, stored.started_at),
      finished_at = excluded.finished_at, last_error = excluded.last_error,
      result = coalesce(excluded.result, stored.result), epoch = excluded.epoch, updated_at = now()
    where (excluded.hop, excluded.deliveries) >= (stored.hop, stored.deliveries)
      and stored.status not in ('completed', 'cancelled')
      or (excluded.hop, excluded.deliveries) = (stored.hop, stored.deliveries)
      and stored.status = 'completed' and excluded.status = 'completed'
  returning id"""

# Ordered, so that all batches lock their rows in the order of the ids. `1e6` alone is a numeric: dear to divide by.
_PACKED: Final = """
with shapes as materialized (
  select * from json_to_recordset($2::text::json) as shape (
    n integer, queue text, kind text, level text, status text, attempts integer, max_attempts integer, hop bigint,
    deliveries integer, run_at double precision, error text, epoch text, attempt integer, outcome text)
), items as materialized (
  select item.id, item.payload::jsonb, item.headers::jsonb, item.result::jsonb, shape.*,
      to_timestamp($3::float8 + item.started::float8 / 1e6::float8) as started_at,
      to_timestamp($3::float8 + item.finished::float8 / 1e6::float8) as finished_at,
      to_timestamp($3::float8 + item.created::float8 / 1e6::float8) as created_at
    from unnest(
      string_to_array($4::text, e'\\x1f'), string_to_array($5::text, e'\\x1f'), string_to_array($6::text, e'\\x1f'),
      string_to_array($7::text, e'\\x1f', e'\\x1e'), string_to_array($8::text, e'\\x1f', e'\\x1e'),
      string_to_array($9::text, e'\\x1f', e'\\x1e'), string_to_array($10::text, e'\\x1f', e'\\x1e'),
      string_to_array($11::text, e'\\x1f', e'\\x1e')
    ) with ordinality as item (id, shape, payload, headers, result, started, finished, created, place)
    join shapes as shape on shape.n = item.shape::integer
    order by item.place
), logged as (
  insert into streamworker.job_logs
      (job_id, hop, deliveries, attempt, worker_id, started_at, finished_at, outcome, error)
    select id, hop, deliveries, attempt, $1, started_at, finished_at, outcome, error from items
    on conflict do nothing
), written as (
  insert into streamworker.jobs as stored (id, queue_name, kind, payload, level, status, attempt_count, max_attempts,
      hop, deliveries, run_at, worker_id, created_at, started_at, finished_at, last_error, result, headers, epoch)
    select id, queue, kind, payload, level, status, attempts, max_attempts, hop,
        deliveries, to_timestamp(run_at), $1, coalesce(created_at, now()), started_at,
        case when status in ('completed', 'cancelled', 'dead') then finished_at end, error, result, headers, epoch
      from items
"""

# The ids of what was written only if something was not: nearly always one null instead of hundreds.
_LEFT_ALONE: Final = """
)
select case when count(*) < (select count(*) from items) then coalesce(array_agg(id), '{}') end as ids from written"""

PACK: Final = _PACKED + ON_CONFLICT + _LEFT_ALONE


def packed(runs: Sequence[RunRecord], epochs: dict[bytes, str]) -> tuple[Any, ...] | None:
    """The values of `PACK` from the second on; ``None`` if the runs do not fit it.

    Args:
        runs: in the order of their ids, no id twice.
        epochs: bytes to text, kept between calls.
    """
    base = runs[0].finished or 0.0
    shapes: dict[tuple[Any, ...], str] = {}
    places, payloads, headers, results = [], [], [], []
    started, finished, born = [], [], []
    some_headers = some_results = False
    try:
        for run in runs:
            shape = (
                run.queue, run.kind, run.level, run.status, run.attempts, run.max_attempts, run.hop, run.deliveries,
                run.run_at, run.error, run.epoch, run.attempt, run.outcome,
            )  # fmt: skip
            place = shapes.get(shape)
            if place is None:
                place = shapes[shape] = str(len(shapes))
            places.append(place)
            payloads.append(str(run.payload, "utf-8"))  # type: ignore[arg-type]
            if run.headers:
                some_headers = True
                headers.append(headers_text(run.headers) or "\x00")
            else:
                headers.append(_NULL)
            if run.result is not None:
                some_results = True
                results.append(run.result.decode())
            else:
                results.append(_NULL)
            started.append(_NULL if run.started is None else str(int((run.started - base) * _MICROSECONDS)))
            finished.append(_NULL if run.finished is None else str(int((run.finished - base) * _MICROSECONDS)))
            at = created(run.body)
            born.append(_NULL if at is None else str(int((at - base) * _MICROSECONDS)))
    except (TypeError, UnicodeError, OverflowError):
        return None
    columns = [[run.job_id for run in runs], places, payloads]
    texts = [_joined(column) for column in columns]
    texts.append(_joined(headers) if some_headers else None)
    texts.append(_joined(results) if some_results else None)
    texts += [_joined(started), _joined(finished), _joined(born)]
    wanted = [True, True, True, some_headers, some_results, True, True, True]
    if any(text is None and needed for text, needed in zip(texts, wanted, strict=True)):
        return None
    described = _described(shapes, epochs)
    return None if described is None else (described, base, *texts)


def _joined(column: list[str]) -> str | None:
    """One text; ``None`` if it could not be taken apart again, or not be stored."""
    text = _COLUMN.join(column)
    if text.count(_COLUMN) != len(column) - 1 or "\x00" in text or refused_by_jsonb(text):
        return None
    return text


def _described(shapes: dict[tuple[Any, ...], str], epochs: dict[bytes, str]) -> str | None:
    rows = []
    for shape, place in shapes.items():
        queue, kind, level, status, attempts, limit, hop, deliveries, run_at, error, epoch, attempt, outcome = shape
        name = epochs.get(epoch)
        if name is None:
            name = epochs[epoch] = epoch.decode(errors="backslashreplace")
        rows.append({
            "n": int(place), "queue": queue, "kind": kind, "level": level, "status": status,
            "attempts": attempts, "max_attempts": limit, "hop": hop, "deliveries": deliveries, "run_at": run_at,
            "error": error, "epoch": name, "attempt": attempt, "outcome": outcome,
        })  # fmt: skip
    try:
        text = _encode(rows).decode()
    except (msgspec.MsgspecError, UnicodeError):
        return None
    return None if "\\u0000" in text else text

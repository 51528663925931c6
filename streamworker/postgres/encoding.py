"""Encoding of a batch of runs for PostgreSQL, and of single values that text or jsonb cannot hold.

An array per column is expensive to encode: most of the cost of a record. So a column that differs from run to run is
one text: numbers in PostgreSQL's array syntax, and texts joined with a control character that neither JSON nor any sane
id contains. The other columns are sent once per *shape*, as JSON. A batch that does not fit is recorded with
`recording.RECORD`, which can also find the row at fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, Final
from uuid import UUID, uuid5

import msgspec

from streamworker.codec import FIRST_MOMENT, LAST_MOMENT
from streamworker.postgres import RunRecord

_NAMESPACE: Final = UUID("0b1d2e3c-7f55-5b0e-8a41-3f2f6c1b9d10")
_NO_JSONB: Final = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
# Matches that are harmless: an escaped backslash before a "u", and both halves of a surrogate pair.
_HARMLESS: Final = re.compile(r"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_ODD: Final = re.compile("[\x00\ud800-\udfff]")
SEPARATOR: Final = "\x1f"
"""Joins many texts into one, for a tenth of the cost of an array: neither JSON nor any sane id contains it."""


def text(value: str) -> str:
    """The text, with characters that PostgreSQL cannot hold written as escapes."""
    if value.isascii() and "\x00" not in value:
        return value
    return _ODD.sub(lambda match: f"\\u{ord(match.group()):04x}", value)


def stored_id(job_id: str) -> str:
    """The id in the job's row: its own, or the UUIDv5 of one that text cannot hold."""
    if "\x00" in job_id:
        return str(uuid5(_NAMESPACE, job_id))
    return job_id


def separable(joined: str, count: int) -> bool:
    """Whether ``count`` texts that were joined with `SEPARATOR` can be split again, and stored."""
    return joined.count(SEPARATOR) == count - 1 and "\x00" not in joined


def json_text(raw: msgspec.Raw | bytes | None) -> str | None:
    """JSON as text for jsonb; ``None`` if a cheap check finds what jsonb refuses."""
    if raw is None:
        return None
    try:
        written = str(raw, "utf-8")
    except UnicodeDecodeError:
        return None
    return None if refused_by_jsonb(written) else written


def refused_by_jsonb(written: str) -> bool:
    """Whether JSON text holds the escape of a NUL, or of half a surrogate pair."""
    if "\\u" not in written or _NO_JSONB.search(written) is None:
        return False
    return _NO_JSONB.search(_HARMLESS.sub(".", written)) is not None


def headers_text(headers: dict[str, Any] | None) -> str | None:
    """The headers as text for jsonb, or ``None``."""
    return json_text(_encode(headers)) if headers else None


def within_python(column: str) -> str:
    """SQL for a column of times, moved to `codec.FIRST_MOMENT` or `codec.LAST_MOMENT` where Python has no such time."""
    early, late = (
        f"timestamptz '{datetime.fromtimestamp(moment, UTC).isoformat()}'" for moment in (FIRST_MOMENT, LAST_MOMENT)
    )
    return f"case when {column} < {early} then {early} when {column} > {late} then {late} else {column} end"


_NULL: Final = "\x1e"
_encode = msgspec.json.encode
_shape_of: Final[Callable[[RunRecord], tuple[Any, ...]]] = attrgetter(
    "queue", "kind", "level", "status", "attempts", "max_attempts", "hop", "deliveries", "run_at", "error", "epoch",
    "attempt", "outcome", "expires",
)  # fmt: skip

ON_CONFLICT: Final = """
  on conflict (queue_name, id) do update set
      status = excluded.status, kind = coalesce(nullif(stored.kind, ''), excluded.kind),
      attempt_count = excluded.attempt_count, hop = excluded.hop, deliveries = excluded.deliveries,
      run_at = coalesce(excluded.run_at, stored.run_at),
      worker_id = excluded.worker_id, started_at = coalesce(excluded.started_at, stored.started_at),
      finished_at = excluded.finished_at, last_error = excluded.last_error,
      result = coalesce(excluded.result, stored.result), epoch = excluded.epoch, updated_at = now()
    where (excluded.hop, excluded.deliveries) >= (stored.hop, stored.deliveries)
      and stored.status not in ('completed', 'cancelled', 'expired')
      or (excluded.hop, excluded.deliveries) = (stored.hop, stored.deliveries)
      and stored.status in ('completed', 'expired') and excluded.status = stored.status
  returning id"""

# Ordered, so that all batches lock their rows in the order of the ids.
_UNPACKED: Final = """
with shapes as materialized (
  select * from json_to_recordset($2::text::json) as shape (
    n integer, queue text, kind text, level text, status text, attempts integer, max_attempts integer, hop bigint,
    deliveries integer, run_at double precision, error text, epoch text, attempt integer, outcome text,
    expires double precision)
), items as materialized (
  select item.id, item.payload::jsonb, item.headers::jsonb, item.result::jsonb, shape.*,
      to_timestamp($3::float8 + item.started) as started_at, to_timestamp($3::float8 + item.finished) as finished_at,
      to_timestamp($3::float8 + item.created) as created_at
    from unnest(
      string_to_array($4::text, e'\\x1f'), $5::text::integer[], string_to_array($6::text, e'\\x1f'),
      string_to_array($7::text, e'\\x1f', e'\\x1e'), string_to_array($8::text, e'\\x1f', e'\\x1e'),
      $9::text::float8[], $10::text::float8[], $11::text::float8[]
    ) with ordinality as item (id, shape, payload, headers, result, started, finished, created, place)
    join shapes as shape on shape.n = item.shape
    order by item.place
)"""
_LOG: Final = """
  insert into streamworker.job_logs
      (job_id, queue_name, hop, deliveries, attempt, worker_id, started_at, finished_at, outcome, error)
    select id, queue, hop, deliveries, attempt, $1, started_at, finished_at, outcome, error from items"""
_STORE: Final = """
  insert into streamworker.jobs as stored (id, queue_name, kind, payload, level, status, attempt_count, max_attempts,
      hop, deliveries, run_at, worker_id, created_at, started_at, finished_at, last_error, result, headers, epoch,
      expires_at)
    select id, queue, kind, payload, level, status, attempts, max_attempts, hop,
        deliveries, to_timestamp(run_at), $1, coalesce(created_at, now()), started_at,
        case when status in ('completed', 'cancelled', 'expired', 'dead') then finished_at end, error, result, headers,
        epoch, to_timestamp(expires)
      from items"""

# The written ids only if a row was not written: nearly always one null instead of hundreds of ids.
_LEFT_ALONE: Final = """
select case when count(*) < (select count(*) from items) then coalesce(array_agg(id), '{}') end as ids from written"""

PACK: Final = f"""{_UNPACKED},
logged as ({_LOG}
  on conflict do nothing),
written as ({_STORE}{ON_CONFLICT})
{_LEFT_ALONE}"""

PACK_NEW: Final = f"{_UNPACKED}, logged as ({_LOG}) {_STORE}"
"""The same for jobs without a row, or error 23505: ON CONFLICT costs a third of the statement."""


def packed(runs: Sequence[RunRecord], epochs: dict[bytes, str]) -> tuple[Any, ...] | None:
    """The values of `PACK` from the second on; ``None`` if the runs do not fit it.

    Args:
        runs: in the order of their ids, no id twice.
        epochs: bytes to text, kept between calls.
    """
    base = runs[0].finished or 0.0
    shapes: dict[tuple[Any, ...], int] = {}
    headers = results = None
    try:
        places = [shapes.setdefault(shape, len(shapes)) for shape in map(_shape_of, runs)]
        ids = _joined([run.job_id for run in runs])
        payloads = _checked(SEPARATOR.encode().join([run.payload for run in runs]).decode(), len(runs))  # type: ignore[misc]
        if any(run.headers for run in runs):
            headers = _joined([(headers_text(run.headers) or "\x00") if run.headers else _NULL for run in runs])
        if any(run.result is not None for run in runs):
            results = _joined([_NULL if run.result is None else run.result.decode() for run in runs])
    except (TypeError, ValueError):  # no payload, or not UTF-8; or it does not fit
        return None
    described = _described(shapes, epochs)
    if described is None:
        return None
    started = _times([run.started for run in runs], base)
    finished = _times([run.finished for run in runs], base)
    born = _times([run.created for run in runs], base)
    return (described, base, ids, _array(places), payloads, headers, results, started, finished, born)


def _joined(column: list[str]) -> str:
    return _checked(SEPARATOR.join(column), len(column))


def _checked(text: str, count: int) -> str:
    """The text; ValueError if it could not be split again, or not be stored."""
    if not separable(text, count) or refused_by_jsonb(text):
        raise ValueError("this does not fit")
    return text


def _array(numbers: Sequence[float | None]) -> str:
    """An array in PostgreSQL's syntax."""
    return f"{{{_encode(numbers)[1:-1].decode()}}}"


def _times(moments: Sequence[float | None], base: float) -> str:
    return _array([None if moment is None else moment - base for moment in moments])


def _described(shapes: dict[tuple[Any, ...], int], epochs: dict[bytes, str]) -> str | None:
    rows = []
    for shape, place in shapes.items():
        (queue, kind, level, status, attempts, limit, hop, deliveries, run_at, error, epoch, attempt, outcome,
         expires) = shape  # fmt: skip
        name = epochs.get(epoch)
        if name is None:
            name = epochs[epoch] = epoch.decode(errors="backslashreplace")
        rows.append({
            "n": place, "queue": queue, "kind": kind, "level": level, "status": status,
            "attempts": attempts, "max_attempts": limit, "hop": hop, "deliveries": deliveries, "run_at": run_at,
            "error": error, "epoch": name, "attempt": attempt, "outcome": outcome, "expires": expires,
        })  # fmt: skip
    try:
        text = _encode(rows).decode()
    except (msgspec.MsgspecError, UnicodeError):
        return None
    return None if "\\u0000" in text else text

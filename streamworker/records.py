"""What the ledger is told of a run, made of its claim and its document."""

from __future__ import annotations

from streamworker import codec
from streamworker.codec import Reading
from streamworker.job import Claim
from streamworker.postgres import RunRecord


def run_record(claim: Claim, reading: Reading, *, kind: str, started: float | None) -> RunRecord:
    """The record of a run that has begun.

    Args:
        claim: what runs.
        reading: its document.
        kind: the handler's kind, or the document's.
        started: epoch seconds.
    """
    attempts = reading.attempt_count or 0
    return RunRecord(
        codec.job_id(reading, claim),
        claim.queue,
        kind,
        claim.level,
        reading.hop or 0,
        deliveries_of(claim, reading),
        attempts + 1,
        attempts,
        reading.max_attempts,
        claim.epoch,
        claim.body,
        reading.payload,
        reading.headers,
        started,
        codec.made_at(reading),
    )


def unread_record(claim: Claim) -> RunRecord:
    """The record of a claim whose document cannot be read: of the job that it names, if it names one."""
    told, hop = codec.told_of(claim.body)
    job_id = told or codec.derived_id(claim.place, claim.epoch, claim.entry)
    deliveries = deliveries_of(claim, None)
    return RunRecord(
        job_id, claim.queue, "", claim.level, hop, deliveries, 1, 0, None, claim.epoch, claim.body, None, None, None,
        None if claim.body is None else codec.made_at(claim.body),
    )  # fmt: skip


def deliveries_of(claim: Claim, reading: Reading | None) -> int:
    """Deliveries so far, those on earlier entries of the same job and one that is only reserved included."""
    count = claim.count + claim.suspect
    if reading is None or (reading.state is None and reading.streamworker is None):
        return count
    return count + codec.state_of(reading, claim.secret).deliveries

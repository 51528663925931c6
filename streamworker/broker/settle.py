"""Settling claims in groups: one script for each ready key and kind of verdict, finished jobs first."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from redis.exceptions import RedisError

from streamworker import codec, results
from streamworker.broker import Refusal, SettleRequest, scripts
from streamworker.broker.keys import QueueKeys, due_member
from streamworker.broker.redis.reactions import SILENT, Reaction, cure_of, reaction_to
from streamworker.errors import InvalidJob, StreamworkerError
from streamworker.job import Claim, Dead, Done, Drop, Expire, Park, ReleaseAt, RetryAt, Settled
from streamworker.results import BOUNDS, OutputBatch, log_bounds
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

BATCH: Final = 500
"""Most claims of one script call, so that it does not block the server for long."""
EMIT_BATCH: Final = 100
"""Most jobs whose output one script call appends to, for the same reason."""
_STAGES: Final[dict[type, int]] = {Done: 0, Park: 0, Drop: 2, Expire: 2, RetryAt: 3, ReleaseAt: 3, Dead: 4}
IN_ORDER: Final = 1
"""Stage of finished jobs with order keys, the last that tells callers in a call of its own."""
_CODES: Final = (Settled.LOST, Settled.SETTLED)
BISECTIONS: Final = 12
"""Most script calls of one batch that may fail before the rest of it is put off."""
Code: TypeAlias = int | bytes
"""1 settled, 0 lost, a text: why it was refused."""


class ClaimSettlement(Protocol):
    """Settles claims of one worker, all of one ready key; answers a code for each, in order."""

    waited: bool
    """Whether a caller waited for jobs of the queue to end, when jobs were last finished."""

    async def done(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        """Delete finished claims."""

    async def done_in_order(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        """Delete finished claims of jobs with order keys, and pass these on."""

    async def tell(self, keys: QueueKeys, items: list[SettleRequest]) -> None:
        """Publish to waiting callers that jobs are finished."""

    async def finish(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        """Delete ended claims that have a result note, were cancelled, or have expired."""

    async def park(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        """Store the next form of a job that goes on, then delete the claim."""

    async def bury(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        """Store a dead letter, then delete the claim."""

    async def emit(self, keys: QueueKeys, batches: list[OutputBatch]) -> list[Code]:
        """Append to the outputs of claims that hold."""


async def settle(
    sender: ClaimSettlement,
    homes: Mapping[str, QueueKeys],
    items: Sequence[SettleRequest],
    refusals: dict[str, Refusal],
    *,
    spread: bool = False,
) -> list[Settled]:
    """Settle claims, each only if it still holds.

    Args:
        sender: settles claims of the worker, in its mode.
        homes: ready key to the keys of its queue.
        items: the claims and their verdicts.
        refusals: takes why the server refused to store some, by queue.
        spread: several nodes serve the queues: claims on a node that does not answer are refused, the others settled.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    group, last_stage, last_place = list[int](), -1, ""
    for index, item in enumerate(items):
        stage, place = _STAGES[type(item.verdict)], item.claim.place
        if stage == 0 and item.note is not None:  # a result is kept, or a deduplication key is freed
            stage = _STAGES[Drop]
        elif stage == 0 and item.order:
            stage = IN_ORDER
        if stage != last_stage or place is not last_place:  # else as the one before: nearly all
            last_stage, last_place = stage, place
            group = groups.setdefault((stage, place), [])
        group.append(index)
    stages = (sender.done, sender.done_in_order, sender.finish, sender.park, sender.bury)
    results = [Settled.LOST] * len(items)
    for (stage, place), indexes in sorted(groups.items()):
        for batch in _batches(indexes):
            sent = [items[index] for index in batch]
            codes = await _sent(stages[stage], homes[place], sent, spread=spread)
            if codes.count(1) == len(items):  # nearly always
                results = [Settled.SETTLED] * len(items)
            else:
                for index, code in zip(batch, codes, strict=True):
                    results[index] = _result_of(code, homes[place], refusals)
            if stage <= IN_ORDER and sender.waited:
                ended = [items[index] for index, code in zip(batch, codes, strict=True) if code == 1]
                told = [item for item in ended if not isinstance(item.verdict, Park)]
                await sender.tell(homes[place], told)
    return results


def _result_of(code: Code, keys: QueueKeys, refusals: dict[str, Refusal]) -> Settled:
    if not isinstance(code, bytes):
        return _CODES[code]
    error = code.decode(errors="replace")
    refusals.setdefault(keys.name, Refusal(error, cure_of(error)))
    return Settled.REFUSED


T = TypeVar("T", SettleRequest, OutputBatch)


async def _sent(
    stage: Callable[[QueueKeys, list[T]], Awaitable[list[Code]]], keys: QueueKeys, items: list[T], *, spread: bool
) -> list[Code]:
    """Send a batch; an error that is not about the whole server is bisected, and refuses only its own claims."""
    codes: list[Code] = []
    rest, failures = [items], 0
    while rest:
        batch = rest.pop()
        try:
            codes += await stage(keys, batch)
        except (RedisError, OSError, StreamworkerError) as error:
            reaction = reaction_to(error)
            if reaction in (Reaction.FATAL, Reaction.RECONNECT) or (reaction is Reaction.WAIT and not spread):
                raise
            failures += 1
            if len(batch) == 1 or failures > BISECTIONS or reaction is Reaction.WAIT:
                why = f"{SILENT}: {error}" if reaction is Reaction.WAIT else str(error) or "refused"
                codes += [why.encode(errors="replace")] * len(batch)
            else:
                half = len(batch) // 2
                rest += [batch[half:], batch[:half]]
    return codes


async def emit(
    sender: ClaimSettlement, homes: Mapping[str, QueueKeys], batches: Sequence[OutputBatch], *, spread: bool = False
) -> list[Settled | None]:
    """Append to the outputs of claims that hold; see `streamworker.results.Outputs.emit`.

    Args:
        sender: of the worker, in its mode.
        homes: ready key to the keys of its queue.
        batches: what to append.
        spread: several nodes serve the queues.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for index, each in enumerate(batches):
        groups.setdefault((each.claim.place, each.lines), []).append(index)
    answers: list[Settled | None] = [None] * len(batches)
    for (place, _), indexes in groups.items():
        for start in range(0, len(indexes), EMIT_BATCH):
            some = indexes[start : start + EMIT_BATCH]
            codes = await _sent(sender.emit, homes[place], [batches[index] for index in some], spread=spread)
            for index, code in zip(some, codes, strict=True):
                answers[index] = _emitted(batches[index], code)
    return answers


def _emitted(batch: OutputBatch, code: Code) -> Settled | None:
    if not isinstance(code, bytes):
        return _CODES[code]
    error = code.decode(errors="replace")
    if error.startswith(SILENT):
        return None
    log.error("output_refused", queue=batch.claim.queue, job_id=batch.job_id, error=error, hint=cure_of(error))
    return Settled.REFUSED


class StreamSettlement:
    """`ClaimSettlement` of pending entries of a consumer; the fence is (consumer, delivery count).

    Args:
        client: sends the scripts.
        group: the consumer group.
        consumer: the worker's id.
    """

    def __init__(self, client: scripts.AsyncCaller, group: str, consumer: str) -> None:
        self._client, self._group, self._consumer = client, group, consumer
        self.waited = False

    async def done(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        args = self._fences(items)
        return self._codes(items, await scripts.DONE(self._client, [items[0].claim.place, keys.meta], args))

    async def done_in_order(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        args = lines_of(items) + self._fences(items)
        return self._codes(items, await scripts.DONE_IN_ORDER(self._client, [items[0].claim.place, keys.meta], args))

    def _fences(self, items: list[SettleRequest]) -> list[Any]:
        claims = [item.claim for item in items]
        same = claims[0].count
        if all(claim.count == same for claim in claims):  # nearly always 1: half of the texts to send
            return [self._group, self._consumer, same, *[claim.entry for claim in claims]]
        return [self._group, self._consumer, "", *[part for claim in claims for part in (claim.entry, claim.count)]]

    def _codes(self, items: list[SettleRequest], reply: list[int]) -> list[Code]:
        waited, *lost = reply
        self.waited = bool(waited)
        codes: list[Code] = [1] * len(items)
        for number in lost:
            codes[number - 1] = 0
        return codes

    async def tell(self, keys: QueueKeys, items: list[SettleRequest]) -> None:
        await tell(self._client, keys, items)

    async def finish(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        names = [items[0].claim.place, keys.cancelled, keys.meta, *kept_at(keys, items)]
        args: list[Any] = [self._group, self._consumer]
        for item in items:
            fence = (item.claim.entry, item.claim.count)
            args += (*fence, item.job_id, *note(item), freed(item, keys, names), item.order)
        return list(await scripts.FINISH(self._client, names, args))

    async def park(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        args: list[Any] = [self._group]
        now = time.time()
        for item in items:
            claim = item.claim
            args += (self._consumer, claim.entry, claim.count, *parking(item, now))
        return list(await scripts.PARK(self._client, [items[0].claim.place, keys.due, keys.bodies, keys.calls], args))

    async def bury(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        args: list[Any] = [self._group]
        for item in items:
            args += (
                self._consumer,
                item.claim.entry,
                item.claim.count,
                *dead_letter_fields(item).values(),
                *note(item),
                int(item.halts),
            )
        names = [items[0].claim.place, keys.dead, *(keys.result(item.job_id) for item in items)]
        return list(await scripts.BURY(self._client, names, args))

    async def emit(self, keys: QueueKeys, batches: list[OutputBatch]) -> list[Code]:
        outputs, bounds = appended_to(keys, batches, BOUNDS)
        args: list[Any] = [self._group, self._consumer, *bounds]
        for batch in batches:
            args += (batch.claim.entry, batch.claim.count, batch.attempt, batch.offset, batch.count, batch.chunks)
        names = [batches[0].claim.place, *outputs]
        return list(await scripts.EMIT(self._client, names, args))


def appended_to(
    keys: QueueKeys, batches: Sequence[OutputBatch], bounds: tuple[int, int, int]
) -> tuple[list[str], tuple[int, int, int]]:
    """(key of each batch, bounds): of outputs, or of logs; all batches are of the same."""
    if lines := batches[0].lines:
        return [keys.log(batch.job_id) for batch in batches], log_bounds(lines)
    return [keys.output(batch.job_id) for batch in batches], bounds


def lines_of(items: Sequence[SettleRequest]) -> list[Any]:
    """Their number, order keys and job ids, as the scripts take them that pass the keys on."""
    ids = ("" if isinstance(item.verdict, Park) else item.job_id for item in items)
    return [len(items), *(item.order for item in items), *ids]


async def tell(client: scripts.AsyncCaller, keys: QueueKeys, items: Iterable[SettleRequest]) -> None:
    """Publish that jobs are finished. A hint: waiting callers also look now and then."""
    ids = [item.job_id or id_of(item.claim) for item in items]
    names = [keys.result(job_id) for job_id in ids if job_id]
    if names:
        with suppress(RedisError, OSError):
            await scripts.TELL(client, [keys.meta, *names], [results.COMPLETED] * len(names))


def kept_at(keys: QueueKeys, items: Iterable[SettleRequest]) -> list[str]:
    """Two keys for each ending: of the result note, and of the mark that remembers that it was kept."""
    return [key for item in items for key in (keys.result(item.job_id), keys.ended(item.job_id))]


def note(item: SettleRequest) -> tuple[int, bytes]:
    """(ms for which the result note can be read (0: not at all), the note) of an ending."""
    told = item.note
    if told is None:
        verdict = item.verdict
        why = f"{verdict.reason}: {verdict.error}" if isinstance(verdict, Dead) and verdict.error else None
        if isinstance(verdict, Dead):
            told = results.written(results.JobEnd("dead", error=why or verdict.reason))
        elif isinstance(verdict, Expire):
            told = results.written(results.JobEnd("expired", error=verdict.error or None))
        else:
            told = results.CANCELLED if isinstance(verdict, Drop) else results.COMPLETED
    return round(item.keep * 1000), told


def freed(item: SettleRequest, keys: QueueKeys, names: list[str]) -> int:
    """Append the deduplication key that an ending frees to ``names``; its number there, 0 for none."""
    if isinstance(item.verdict, Done):
        found = (item.key, item.job_id) if item.key else None
    else:
        found = codec.keyed(item.claim.body, held=not isinstance(item.verdict, Drop))
    if found is None or found[1] != item.job_id:
        return 0
    names.append(keys.key(found[0]))
    return len(names)


def id_of(claim: Claim) -> str | None:
    """The id of a claim's job; ``None`` if its document cannot be read."""
    try:
        return codec.job_id(codec.read(claim.body or b""), claim)
    except InvalidJob:
        return None


def parking(item: SettleRequest, now: float) -> tuple[int, str, bytes]:
    """(ms to wait, member of the due set, document) of a job that goes on.

    -1 ms is ready at once; -2 ms the same, by way of its tenant's line.
    """
    verdict = item.verdict
    body = item.body if item.body is not None else item.claim.body
    if not isinstance(verdict, RetryAt | ReleaseAt) or body is None:
        raise StreamworkerError(f"an entry without a document cannot go on: {verdict}")
    at_once = -2 if isinstance(verdict, ReleaseAt) and verdict.line else -1
    delay = at_once if verdict.at is None else max(0, round((verdict.at - now) * 1000))
    return delay, item.member or due_member(item.claim.level, item.job_id), body


def dead_letter_fields(item: SettleRequest) -> dict[str, Any]:
    """Fields of a dead letter, in the order of the script's arguments."""
    verdict = item.verdict
    if not isinstance(verdict, Dead):
        raise StreamworkerError(f"only the dead are buried, not {verdict}")
    return {
        "id": item.job_id,
        "kind": item.kind,
        "level": item.claim.level,
        "reason": verdict.reason,
        "error": verdict.error.encode(errors="backslashreplace"),
        "attempts": item.attempts,
        "failed_at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }


def _batches(indexes: Iterable[int]) -> Iterable[list[int]]:
    rest = iter(indexes)
    while batch := list(islice(rest, BATCH)):
        yield batch

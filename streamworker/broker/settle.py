"""Ending claims in groups: one script a place and kind of verdict, the finished ones first."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, Protocol

from streamworker.broker import Ending, scripts
from streamworker.broker.keys import QueueKeys
from streamworker.errors import StreamworkerError
from streamworker.job import Dead, Done, Drop, Level, ReleaseAt, RetryAt, Settled

BATCH: Final = 500
"""Most claims of one script call, so that it never blocks the server for long."""
_STAGES: Final[dict[type, int]] = {Drop: 1, RetryAt: 2, ReleaseAt: 2, Dead: 3}
_CODES: Final = (Settled.LOST, Settled.SETTLED, Settled.REFUSED)


def due_member(level: Level, job_id: str) -> str:
    """A member for the due set: names the level, and twins of one job never collapse."""
    return f"{level}/{job_id}/{secrets.token_hex(4)}"


class Sender(Protocol):
    """Ends claims of one worker, all of one place; each answers 1 settled, 0 lost, 2 refused, in order."""

    async def done(self, keys: QueueKeys, items: list[Ending]) -> list[int]:
        """Delete what is finished."""

    async def finish(self, keys: QueueKeys, items: list[Ending]) -> list[int]:
        """Delete what ended without having been done, and the mark that it was cancelled."""

    async def park(self, keys: QueueKeys, items: list[Ending]) -> list[int]:
        """Store what goes on, then delete the claim."""

    async def bury(self, keys: QueueKeys, items: list[Ending]) -> list[int]:
        """Store a dead letter, then delete the claim."""


async def settle(sender: Sender, homes: Mapping[str, QueueKeys], items: Sequence[Ending]) -> list[Settled]:
    """End claims, each only if it still holds.

    Args:
        sender: whose claims these are, and what they lie in.
        homes: place to the keys of its queue.
        items: what to end, and how.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for index, item in enumerate(items):
        verdict = item.verdict
        stage = 0 if isinstance(verdict, Done) else _STAGES[type(verdict)]
        groups.setdefault((stage, item.claim.place), []).append(index)
    stages = (sender.done, sender.finish, sender.park, sender.bury)
    results = [Settled.LOST] * len(items)
    for (stage, place), indexes in sorted(groups.items()):
        for batch in _batches(indexes):
            codes = await stages[stage](homes[place], [items[index] for index in batch])
            for index, code in zip(batch, codes, strict=True):
                results[index] = _CODES[code]
    return results


class StreamSender:
    """Claims in the pending lists of consumer groups; the fence is (consumer, delivery count).

    Args:
        client: what to send with.
        group: the consumer group.
        consumer: whose claims these are.
    """

    def __init__(self, client: scripts.AsyncCaller, group: str, consumer: str) -> None:
        self._client, self._group, self._consumer = client, group, consumer

    async def done(self, keys: QueueKeys, items: list[Ending]) -> list[int]:  # noqa: ARG002 - the stream is enough
        """See `Sender.done`."""
        args: list[Any] = [self._group, self._consumer]
        for item in items:
            args += (item.claim.entry, item.claim.count)
        return list(await scripts.DONE(self._client, [items[0].claim.place], args))

    async def finish(self, keys: QueueKeys, items: list[Ending]) -> list[int]:
        """See `Sender.finish`."""
        args: list[Any] = [self._group, self._consumer]
        for item in items:
            args += (item.claim.entry, item.claim.count, item.job_id)
        return list(await scripts.FINISH(self._client, [items[0].claim.place, keys.cancelled, keys.meta], args))

    async def park(self, keys: QueueKeys, items: list[Ending]) -> list[int]:
        """See `Sender.park`."""
        args: list[Any] = [self._group]
        now = time.time()
        for item in items:
            claim = item.claim
            args += (self._consumer, claim.entry, claim.count, *parking(item, now))
        return list(await scripts.PARK(self._client, [items[0].claim.place, keys.due, keys.bodies, keys.calls], args))

    async def bury(self, keys: QueueKeys, items: list[Ending]) -> list[int]:
        """See `Sender.bury`."""
        args: list[Any] = [self._group]
        for item in items:
            args += (self._consumer, item.claim.entry, item.claim.count, *obituary(item).values())
        return list(await scripts.BURY(self._client, [items[0].claim.place, keys.dead], args))


def parking(item: Ending, now: float) -> tuple[int, str, bytes]:
    """How a job goes on: ms to wait (negative: ready at once), its member in the due set, its document."""
    verdict = item.verdict
    body = item.body if item.body is not None else item.claim.body
    if not isinstance(verdict, RetryAt | ReleaseAt) or body is None:
        raise StreamworkerError(f"an entry without a document cannot go on: {verdict}")
    delay = -1 if verdict.at is None else max(0, round((verdict.at - now) * 1000))
    return delay, item.member or due_member(item.claim.level, item.job_id), body


def obituary(item: Ending) -> dict[str, Any]:
    """What a dead letter tells of its job, in the order in which scripts take it."""
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

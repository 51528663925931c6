"""Ending claims in groups: one script a stream and kind of verdict, the finished ones first."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final

from streamworker.broker import Ending, scripts
from streamworker.broker.keys import QueueKeys
from streamworker.errors import StreamworkerError
from streamworker.job import Dead, Done, Level, ReleaseAt, RetryAt, Settled

BATCH: Final = 500
"""Most claims of one script call, so that it never blocks the server for long."""
_CODES: Final = (Settled.LOST, Settled.SETTLED, Settled.REFUSED)


def due_member(level: Level, job_id: str) -> str:
    """A member for the due set: names the level, and twins of one job never collapse."""
    return f"{level}/{job_id}/{secrets.token_hex(4)}"


async def settle(
    client: scripts.AsyncCaller, group: str, consumer: str, homes: Mapping[str, QueueKeys], items: Sequence[Ending]
) -> list[Settled]:
    """End claims of ``consumer``, each only if it still holds.

    Args:
        client: the client to send with.
        group: the consumer group.
        consumer: whose claims these are.
        homes: stream to the keys of its queue.
        items: what to end, and how.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for index, item in enumerate(items):
        verdict = item.verdict
        stage = 0 if isinstance(verdict, Done) else 2 if isinstance(verdict, Dead) else 1
        groups.setdefault((stage, item.claim.place), []).append(index)
    results = [Settled.LOST] * len(items)
    for (stage, place), indexes in sorted(groups.items()):
        keys = homes[place]
        for batch in _batches(indexes):
            codes = await _SENDERS[stage](client, group, consumer, keys, [items[index] for index in batch])
            for index, code in zip(batch, codes, strict=True):
                results[index] = _CODES[code]
    return results


async def _done(client: scripts.AsyncCaller, group: str, consumer: str, _: QueueKeys, items: list[Ending]) -> list[int]:
    args: list[Any] = [group, consumer]
    for item in items:
        args += (item.claim.entry, item.claim.count)
    return list(await scripts.DONE(client, [items[0].claim.place], args))


async def _park(
    client: scripts.AsyncCaller, group: str, consumer: str, keys: QueueKeys, items: list[Ending]
) -> list[int]:
    args: list[Any] = [group]
    now = time.time()
    for item in items:
        claim, verdict = item.claim, item.verdict
        body = item.body if item.body is not None else claim.body
        if not isinstance(verdict, RetryAt | ReleaseAt) or body is None:
            raise StreamworkerError(f"an entry without a document cannot go on: {verdict}")
        delay = -1 if verdict.at is None else max(0, round((verdict.at - now) * 1000))
        args += (consumer, claim.entry, claim.count, delay, due_member(claim.level, item.job_id), body)
    return list(await scripts.PARK(client, [items[0].claim.place, keys.due, keys.bodies], args))


async def _bury(
    client: scripts.AsyncCaller, group: str, consumer: str, keys: QueueKeys, items: list[Ending]
) -> list[int]:
    args: list[Any] = [group]
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    for item in items:
        claim, verdict = item.claim, item.verdict
        if not isinstance(verdict, Dead):
            raise StreamworkerError(f"only the dead are buried, not {verdict}")
        args += (consumer, claim.entry, claim.count, item.job_id, item.kind, claim.level)
        args += (verdict.reason, verdict.error.encode(errors="backslashreplace"), item.attempts, now)
    return list(await scripts.BURY(client, [items[0].claim.place, keys.dead], args))


_SENDERS: Final = (_done, _park, _bury)


def _batches(indexes: Iterable[int]) -> Iterable[list[int]]:
    rest = iter(indexes)
    while batch := list(islice(rest, BATCH)):
        yield batch

"""Limits of kinds, in both modes: one script decides which jobs may run now, on keys beside the due set."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

from streamworker.broker import scripts
from streamworker.broker.keys import QueueKeys
from streamworker.broker.redis.session import Session
from streamworker.job import Claim
from streamworker.limits import AcquireRequest, AcquireResult, Limit, Permit

PATIENCE: Final = 1.0
"""Seconds in which a called job must ask again before others are called in its place."""


class RedisLimiter:
    """`Limiter` of both modes.

    Args:
        session: the connections.
        queues: keys of the queues whose jobs may be limited.
        lease: seconds a permit lives unless it is renewed.
    """

    def __init__(self, session: Session, queues: Iterable[QueueKeys], *, lease: float) -> None:
        self._session = session
        self._keys: Final = {keys.queue: keys for keys in queues}
        self._lease: Final = int(lease * 1000)

    async def acquire(
        self, worker: str, queue: str, requests: Sequence[AcquireRequest], released: Sequence[Permit]
    ) -> list[AcquireResult]:
        """`Limiter.acquire` for the worker of that id."""
        keys = self._keys[queue]
        numbers: dict[Limit, int] = {}
        for limit in (*(each.limit for each in requests), *(permit.limit for permit in released)):
            numbers.setdefault(limit, len(numbers) + 1)
        args: list[Any] = [keys.shape, self._lease, int(PATIENCE * 1000), len(numbers), len(released)]
        for limit in numbers:
            args += (limit.concurrency, round(limit.gap * 1_000_000), limit.burst)
        for permit in released:
            args += (numbers[permit.limit], permit.token)
        holds: list[Permit] = []
        members: list[str] = []
        for each in requests:
            arrival, _, before = each.turn.partition(" ")
            stem = f"{each.claim.level}/{each.job_id}/"
            holds.append(Permit(each.limit, _token(worker, each.claim)))
            members.append(stem + each.mark)
            args += (numbers[each.limit], holds[-1].token, members[-1], stem + before if before else "", arrival or 0)
        names = [keys.due, keys.bodies, *keys.places, keys.calls, keys.permits]
        names += [name for limit in numbers for name in keys.limit(limit.name)]
        reply = await self._session.run(scripts.LIMIT, names, args)
        return [
            AcquireResult(hold)
            if granted
            else AcquireResult(None, wait / 1000, f"{arrival.decode()} {each.mark}", member)
            for each, (granted, wait, arrival), hold, member in zip(requests, reply, holds, members, strict=True)
        ]

    async def renew_permits(self, permits: Collection[Permit]) -> None:
        """`Limiter.renew_permits`."""
        by_queue: dict[str, list[Permit]] = {}
        for permit in permits:
            by_queue.setdefault(permit.limit.queue, []).append(permit)
        for queue, mine in by_queue.items():
            numbers: dict[str, int] = {}
            args: list[Any] = [self._lease]
            for permit in mine:
                args += (numbers.setdefault(permit.limit.name, len(numbers) + 1), permit.token)
            keys = self._keys[queue]
            names = [keys.permits, *(keys.limit(name)[0] for name in numbers)]
            await self._session.in_thread(scripts.RETAIN, names, args)


def _token(worker: str, claim: Claim) -> str:
    """Token of a permit: no other execution of the job, here or elsewhere, has the same."""
    return f"{worker} {claim.place} {claim.entry.decode()} {claim.count}"

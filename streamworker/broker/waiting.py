"""Waiting for one job to end, without polling: an ear on its channels, and what was kept of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from streamworker.broker import scripts
from streamworker.broker.ears import Ear, Ears
from streamworker.broker.keys import QueueKeys
from streamworker.broker.link import Link

TOLD: Final = 30.0
"""Seconds for which ends of a queue's jobs are told after somebody has last asked for it."""


class Waiting:
    """`Hearing` of a job that lies in one of some queues."""

    def __init__(self, link: Link, ear: Ear, queues: Sequence[QueueKeys], job_id: str) -> None:
        self._link = link
        self._queues = queues
        self._job_id = job_id
        self.heard = ear.heard

    async def kept(self) -> bytes | None:
        """See `Hearing.kept`."""
        found: bytes | None = None
        for keys in self._queues:
            names = [keys.meta, keys.result(self._job_id), keys.ended(self._job_id)]
            answer = await self._link.run(scripts.WAIT, names, [round(TOLD * 1000)])
            found = found or answer
        return found


@asynccontextmanager
async def waiting(link: Link, ears: Ears, queues: Sequence[QueueKeys], job_id: str) -> AsyncIterator[Waiting]:
    """See `Broker.ended`."""
    async with ears.on([keys.result(job_id) for keys in queues]) as ear:
        yield Waiting(link, ear, queues, job_id)

"""Loss detection of a relay: notices a Redis that lost jobs, and passes pauses of the ledger on to it.

Three signs say that jobs may be lost: the queue has another epoch (FLUSHALL, a restart without persistence), another
server answers (a failover to a replica that lags, an old backup), or the count of relayed jobs fell. One lease later,
so that running jobs can finish, the queue is compared with the ledger job by job; and twice more, for late records. A
job that is in Redis is left alone, whatever the signs said.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime
from time import monotonic
from typing import Final

import anyio

from streamworker.loops import LookLoop
from streamworker.relay import Dispatcher, KnownQueue, Lost, Outbox, Pulse
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.relay")


async def missing(outbox: Outbox, dispatcher: Dispatcher, queue: str, before: datetime) -> list[str]:
    """Ids of a queue's open jobs that are not in Redis; jobs that changed since ``before`` are left out.

    A page of ids of the ledger is held in memory and compared with the whole queue. The queue is read twice: a job may
    have moved past the first read.
    """
    found: list[str] = []
    after = ""
    while True:
        page = await outbox.open_ids(queue, after, before)
        if not page:
            return found
        after = page[-1]
        unseen = set(page)
        for _ in range(2):
            if unseen:
                async for ids in dispatcher.ids(queue):
                    unseen.difference_update(ids)
        found += sorted(unseen)


async def reconcile(outbox: Outbox, dispatcher: Dispatcher, queue: str, before: datetime) -> Lost:
    """Queue missing jobs again."""
    gone = await outbox.lost(queue, await missing(outbox, dispatcher, queue, before), before)
    if gone.queued:
        log.warning("jobs_lost_by_redis", queue=queue, jobs=len(gone.queued), hint="they are dispatched again")
    return gone


LOOK: Final = 3.0
"""Seconds between looks at the queues while notifications of the ledger arrive."""
LOOK_UNNOTIFIED: Final = 0.8
"""The same without notifications: a queue has to pause within a second."""
COMPARISONS: Final = 3
"""How often a queue is compared after a sign of loss."""
COMPARISON_TIMEOUT: Final = 60.0
"""Seconds after which a comparison whose relay died may be taken by another."""
ANOTHER_REDIS: Final = (
    "processes with another Redis use this ledger, so that nothing is relayed from here: one schema is for one Redis, "
    "give this one a database of its own"
)
PRUNE: Final = 60.0
"""Seconds between deletions of expired deduplication keys."""


class LossDetector:
    """Compares the queues of Redis with the ledger until it is stopped.

    Args:
        outbox: the ledger.
        dispatcher: Redis.
        stopping: ends it; call `wake` with it.
        lease: seconds after a sign of loss in which running jobs may finish.
        listening: whether notifications of the ledger arrive; `listen` changes it.
        queues: those that this process serves.
        suspected: called with each queue of which something may be lost.
    """

    def __init__(
        self,
        outbox: Outbox,
        dispatcher: Dispatcher,
        stopping: anyio.Event,
        *,
        lease: float,
        listening: bool = False,
        queues: tuple[str, ...] = (),
        suspected: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._outbox = outbox
        self._dispatcher = dispatcher
        self._lease = lease
        self._listening = listening
        self._queues = queues
        self._suspected = suspected
        self._agreed: dict[str, str] = {}
        """The server of each queue, as this process last agreed on it with the ledger."""
        self._foreign: set[str] = set()
        self._loop = LookLoop(stopping)
        self._prune_at = monotonic() + PRUNE * random.random()  # noqa: S311 - spreads load

    def wake(self) -> None:
        """Look now."""
        self._loop.wake()

    def listen(self, listening: bool) -> None:
        """Notifications of the ledger arrive from now on, or no longer: without them it looks more often."""
        self._listening = listening

    async def run(self) -> None:
        """Look until stopped; an error is logged and followed by a pause."""
        await self._loop.run(self._look_again, lambda error: log.error("relay_watch_failed", error=str(error)))

    async def _look_again(self) -> float:
        await self.look()
        seconds = min(LOOK, self._lease) if self._listening else LOOK_UNNOTIFIED
        return seconds * random.uniform(0.8, 1.0)  # noqa: S311 - spreads load

    async def look(self) -> None:
        """One look at every queue."""
        if self._queues:
            await self._outbox.meet(dict.fromkeys(self._queues, ""))
            self._queues = ()
        known = await self._outbox.queues()
        pulses = await self._dispatcher.pulses([queue.name for queue in known])
        for queue, pulse in zip(known, pulses, strict=True):
            if pulse.held == queue.is_active:
                await self._dispatcher.hold(queue.name, held=not queue.is_active)
                log.info("queue_paused" if not queue.is_active else "queue_resumed", queue=queue.name, by="job_queues")
            await self._compare(queue, pulse)
            if queue.due and queue.name not in self._foreign:
                await self._recheck(queue.name)
        if monotonic() >= self._prune_at:
            self._prune_at = monotonic() + PRUNE * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load
            await self._outbox.prune_keys()

    async def _compare(self, known: KnownQueue, pulse: Pulse) -> None:
        if not pulse.epoch:
            if known.epoch:  # the keys were deleted; perhaps no worker is there to notice
                await self._dispatcher.found(known.name)
                (pulse,) = await self._dispatcher.pulses([known.name])
            else:
                return  # no process has used it yet
        server = pulse.server or known.server
        if known.server and server != known.server and server == self._agreed.get(known.name):
            self._log_foreign(known.name)
            return
        self._agree(known.name)
        if (pulse.epoch, pulse.relayed, server) == (known.epoch, known.relayed, known.server):
            self._agreed[known.name] = server
            return
        signs = {
            "another epoch": bool(known.epoch) and pulse.epoch != known.epoch,
            "another server": bool(known.server) and server != known.server,
            "fewer jobs were relayed than before": pulse.relayed < known.relayed,
        }
        why = [sign for sign, seen in signs.items() if seen]
        recheck = (self._lease, COMPARISONS) if why else None
        noted = await self._outbox.observe(
            known, epoch=pulse.epoch, relayed=pulse.relayed, server=server, recheck=recheck
        )
        if noted:
            self._agreed[known.name] = server
        if why:
            self._suspected(known.name)
        if noted and why:
            log.warning("redis_may_have_lost_jobs", queue=known.name, why=why, compared_in=self._lease)

    @property
    def barred(self) -> bool:
        """Nothing may be relayed: other processes use the same ledger with another Redis, while ours is the same.

        Two Redis on one ledger, or this process still reaches the old master of a failover: jobs added there are lost
        to the others, and jobs missing there are with them.
        """
        return bool(self._foreign)

    @property
    def trouble(self) -> str | None:
        """Why this process is not ready: `barred`, in a sentence for operators."""
        return ANOTHER_REDIS if self.barred else None

    def _log_foreign(self, queue: str) -> None:
        if not self._foreign:
            log.error("ledger_has_another_redis", queue=queue, hint=ANOTHER_REDIS)
        self._foreign.add(queue)

    def _agree(self, queue: str) -> None:
        if queue in self._foreign:
            self._foreign.remove(queue)
            if not self._foreign:
                log.info("ledger_has_this_redis", queue=queue)

    async def _recheck(self, queue: str) -> None:
        before = await self._outbox.recheck(queue, COMPARISON_TIMEOUT)
        if before is None:
            return
        lost = await reconcile(self._outbox, self._dispatcher, queue, before)
        await self._outbox.rechecked(queue, self._lease if lost.locked else 4 * self._lease, done=not lost.locked)
        log.info("queue_compared", queue=queue, lost=len(lost.queued), locked=len(lost.locked))

"""What dead workers held in list mode: given back to the right ends of its lists as soon as its lease is over.

Needs no free slot and no leader: every worker looks, one at a time per queue, and whoever has room takes it from there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from time import monotonic
from typing import Any, Final

from streamworker.broker import scripts
from streamworker.broker.held import lease_of
from streamworker.broker.keys import ListKeys
from streamworker.broker.link import Link
from streamworker.job import Claim
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

MOST: Final = 10_000
"""Most orphans of a queue one look brings."""
BATCH: Final = 500
"""Most of them one script call gives back."""


class Orphans:
    """Gives back claims of ``queues`` that nobody renews.

    Args:
        link: the connections.
        queues: whose.
        lease: seconds after which an unrenewed claim is an orphan.
    """

    def __init__(self, link: Link, queues: Sequence[ListKeys], *, lease: float) -> None:
        self._link = link
        self._keys = list(queues)
        self._lease = lease
        self._longest = 0.0
        self.worker = ""
        """Who looks."""
        self.look_at = [0.0] * len(self._keys)
        """When each queue is looked at next, by the monotonic clock."""
        self._resting_until = 0.0
        self.missing = 0
        """Claims whose jobs were deleted underneath, since the start."""

    def add(self, keys: ListKeys) -> None:
        """One more queue."""
        self._keys.append(keys)
        self.look_at.append(self._resting_until)

    def rest(self, seconds: float) -> None:
        """Take nobody for dead for some seconds."""
        seconds = max(seconds, self._longest) if seconds > 0 else seconds
        self._resting_until = max(self._resting_until, monotonic() + seconds)
        self.look_at = [max(at, self._resting_until) for at in self.look_at]

    def rest_after_outage(self) -> None:
        """Nobody could renew meanwhile: no one is taken for dead before everyone had a lease to come back."""
        if self._link.outage() > self._lease / 3:
            self.rest(self._lease)

    async def give_back(self, running: Collection[Claim] | None) -> float:
        """Give back what is due; returns the seconds until the next look.

        Args:
            running: what runs here; it is left to others to find that it overran its lease. ``None``: all we hold.
        """
        now = monotonic()
        due = [index for index, at in enumerate(self.look_at) if at <= now]
        if due:
            names = [name for index in due for name in (self._keys[index].meta, self._keys[index].leases)]
            expected, sent = self._link.clock_should_show(), now
            shown, *reply = await self._link.run(
                scripts.LIST_OVERDUE, names, [round(self._lease * 1000), MOST, expected]
            )
            self._link.clock_shows(shown, sent, expected, self._lease)
            own = None if running is None else {(claim.queue, claim.entry) for claim in running}
            for index, (wait, members, trouble, longest) in zip(due, reply, strict=True):
                self.look_at[index] = monotonic() + wait / 1000
                self._longest = max(self._longest, longest / 1000)
                keys = self._keys[index]
                if trouble:
                    log.error("orphans_unreadable", queue=keys.queue, error=trouble.decode(errors="replace"))
                elif members:
                    await self._return(keys, members, own)
        return max(0.0, min(self.look_at, default=self._lease + monotonic()) - monotonic())

    async def _return(self, keys: ListKeys, members: list[bytes], own: set[tuple[str, bytes]] | None) -> None:
        """The newest first, so that the oldest ends up rightmost however often this is interrupted."""
        holders: dict[str, int] = {}
        entries: list[tuple[bytes, int]] = []
        for member in sorted(members, reverse=True):
            lease = lease_of(member)
            if lease is None or (lease[2] == self.worker and (own is None or (keys.queue, lease[0]) in own)):
                continue  # whoever runs it here past its deadline must not find it in the list again
            entries.append((member, holders.setdefault(lease[2], len(holders) + 6)))
        names = [keys.leases, *keys.lists, keys.meta, *(keys.claimed(worker) for worker in holders)]
        for start in range(0, len(entries), BATCH):
            args: list[Any] = [round(max(self._lease, self._longest) * 1000)]
            for entry in entries[start : start + BATCH]:
                args += entry
            returned, missing, *errors = await self._link.run(scripts.LIST_RETURN, names, args)
            self.missing += missing
            if returned:
                log.info("jobs_returned", queue=keys.queue, jobs=returned, workers=list(holders))
            for error in set(errors):
                log.error("orphans_stuck", queue=keys.queue, error=error.decode(errors="replace"))

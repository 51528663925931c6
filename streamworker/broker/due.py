"""Moving delayed jobs behind the ready ones when they are due, in bounded batches by the server's clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streamworker.broker import scripts
from streamworker.broker.keys import QueueKeys
from streamworker.broker.link import Link
from streamworker.errors import Unreachable
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

PROMOTE_BATCH: Final = 500
"""Most due jobs one script call moves."""
IDLE_TICK: Final = 5.0
"""Most seconds between looks at the due sets; the bell tells of jobs that others park."""
REFUSED_TICK: Final = 1.0
"""Seconds before due jobs that could not be moved are offered again."""


async def promote(link: Link, queues: Sequence[QueueKeys]) -> float:
    """Move what is due by now; returns the seconds until it should be called again."""
    # All queues in one call, unless a cluster keeps them in different slots.
    together = [[keys] for keys in queues] if link.address.spread else [queues] if queues else []
    waits: list[float] = []
    failure: Unreachable | None = None
    for group in together:
        try:
            waits.append(await _promote(link, group))
        except Unreachable as error:  # a node of a cluster: the others' jobs are due all the same
            failure = error
    if failure is not None and not waits:
        raise failure
    return min([*waits, *([REFUSED_TICK] if failure is not None else [])], default=IDLE_TICK)


async def _promote(link: Link, queues: Sequence[QueueKeys]) -> float:
    names = [name for keys in queues for name in (keys.due, keys.bodies, *keys.places)]
    wait = IDLE_TICK
    reply = await link.run(scripts.PROMOTE, names, [PROMOTE_BATCH, queues[0].shape])
    for keys, (moved, soonest, refused) in zip(queues, reply, strict=True):
        if refused:  # a key of a wrong type, or no memory: this queue's trouble alone
            log.error("due_jobs_stuck", queue=keys.queue, error=refused.decode(errors="replace"))
            wait = min(wait, REFUSED_TICK)
        elif moved >= PROMOTE_BATCH:
            wait = 0.0
        elif soonest >= 0:
            wait = min(wait, soonest / 1000)
    return wait

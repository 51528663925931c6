"""The bridge: out of the lists of legacy producers and of list mode, into the streams of the same level.

Each batch is one script, so that a bridge may be killed at any moment, and any number of them may run. It reads no
document: elements go into the stream byte for byte, and workers judge them. It also releases expired claims of list
mode: where all workers run in stream mode, no other process does.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Container, Sequence
from time import monotonic
from typing import Any, Final

import anyio
import msgspec
from redis import exceptions as redis_errors

from streamworker.broker import scripts
from streamworker.broker.keys import ListKeys, queue_of_list
from streamworker.broker.lists import Reclaimer, WakeLists
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.redis.reactions import Reaction, clustered, reaction_to
from streamworker.broker.redis.session import Session
from streamworker.errors import ConfigurationError
from streamworker.job import LEVELS, Level, Moved
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

BATCH: Final = 500
"""Most elements of one script call: a few milliseconds in which the server does nothing else."""
BATCH_BYTES: Final = 1 << 20
LANES: Final = 96
"""Most lists of one script call, and most that are waited on: each needs a connection."""
SWEEP: Final = 5.0
"""Seconds between looks at all lists: blocking reads announce new elements, and this finds what they miss."""
POLL: Final = 1.0
"""The same where a list is not waited on, where a list is stuck, or where a drain waits for workers."""
DISCOVER: Final = 5.0
"""Seconds between looks for new queues, at least; and looking takes at most a fiftieth of the time."""
COMPLAIN: Final = 60.0
"""Seconds between log lines about one list."""
CLUSTER: Final = (
    "the bridge is not for a Redis Cluster, where a list and its stream lie on different nodes: let producers write to "
    "the streams (XADD), or run it where the lists are on a single Redis or behind Sentinel"
)
_SERVER_WIDE: Final = (Reaction.WAIT, Reaction.RECONNECT, Reaction.FATAL)
"""Reactions to errors that are not about one list."""


class BridgeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a bridge.

    Attributes:
        queues: queues of the lists; ``None`` for all lists with the name of a queue's list, except those that look
            like another program's processing lists.
        known: names of queues, even if they look like processing lists.
        namespace: prefix of the streams; lists have none.
        lease: seconds after which unrenewed claims of list mode are released; the workers' lease.
    """

    queues: tuple[str, ...] | None
    known: frozenset[str] = frozenset()
    namespace: str = ""
    lease: float = 15.0


class _Lane:
    """One list, and the stream its elements go to."""

    def __init__(self, queue: str, level: Level, list_: str, stream: str) -> None:
        self.queue, self.level, self.list, self.stream = queue, level, list_, stream
        self.awake, self.stuck = True, False
        self.complain_at = 0.0


class ListBridge:
    """`streamworker.bridge.Mover` on Redis."""

    def __init__(self, address: RedisAddress, options: BridgeOptions) -> None:
        self._options = options
        self._session = Session(address)
        self._wake_lists = WakeLists(
            self._session, LANES if options.queues is None else len(LEVELS) * len(options.queues)
        )
        self._reclaimer = Reclaimer(self._session, [], lease=options.lease)
        self._lanes: deque[_Lane] = deque()
        self._keys: dict[str, ListKeys] = {}
        self._skipped: set[str] = set()
        self._sweep_at = self._discover_at = self._look_at = 0.0
        self._held = 0
        self._interrupted = anyio.Event()

    async def open(self) -> None:
        if self._session.address.spread:
            raise ConfigurationError(CLUSTER)
        with self._session.watched():
            info = await self._session.commands.info("server")
        if clustered(info):
            raise ConfigurationError(CLUSTER)
        # After a restart of the server every worker gets one lease to renew before any lease expires.
        self._reclaimer.rest(max(0.0, self._options.lease - float(info.get("uptime_in_seconds", 0))))
        for queue in self._options.queues or ():
            self._add(queue)

    async def move(self, *, everything: bool = False) -> list[Moved]:
        now = monotonic()
        if self._options.queues is None and (everything or now >= self._discover_at):
            await self._discover()
        self._reclaimer.rest_after_outage()
        self._look_at = monotonic() + await self._reclaimer.give_back(None)
        sweep = everything or now >= self._sweep_at
        self._lanes.rotate(-1)  # a list that fills a whole batch must not starve the others
        lanes = [lane for lane in self._lanes if lane.awake or sweep]
        moved: list[Moved] = []
        for start in range(0, len(lanes), LANES):
            moved += await self._batch(lanes[start : start + LANES])
        if sweep:
            self._sweep_at = now + POLL
        return moved

    async def held(self) -> int:
        with self._session.watched():
            async with self._session.commands.pipeline(transaction=False) as pipe:
                for keys in self._keys.values():
                    pipe.zcard(keys.leases)
                answers = await pipe.execute(raise_on_error=False)
        self._held = sum(answer for answer in answers if isinstance(answer, int))
        return self._held

    async def wait(self) -> None:
        poll = len(self._lanes) > LANES or any(lane.stuck for lane in self._lanes) or self._held
        seconds = max(0.0, min(POLL if poll else SWEEP, self._look_at - monotonic()))
        awaited = sorted(lane.list for lane in self._lanes if not lane.stuck)[:LANES]
        if not awaited:
            with anyio.move_on_after(seconds):
                await self._interrupted.wait()
        elif await self._wake_lists.wait(awaited, seconds):
            for lane in self._lanes:
                lane.awake = True

    async def interrupt(self) -> None:
        self._interrupted.set()
        await self._wake_lists.unblock()

    async def close(self) -> None:
        await self._wake_lists.close()
        await self._session.close()

    # -- which lists

    def _add(self, queue: str) -> None:
        keys = ListKeys(queue, self._options.namespace)
        self._lanes += [_Lane(queue, level, keys.ready(level), keys.stream(level)) for level in LEVELS]
        self._reclaimer.add(keys)
        self._keys[queue] = keys

    async def _discover(self) -> None:
        started, namespace = monotonic(), self._options.namespace
        cursor: Any = 0
        found: dict[str, bool] = {}
        while True:
            # A namespace is a prefix of claimed lists, and not of ready lists.
            command = ("SCAN", cursor, "MATCH", f"{'*' if namespace else ''}queue:*", "COUNT", 1000, "TYPE", "list")
            with self._session.watched():
                cursor, names = await self._session.commands.execute_command(*command)
            for name in (name.decode(errors="replace") for name in names):
                queue = queue_of_list(name, namespace)
                if queue is not None and queue not in self._keys:
                    # Claimed lists of our own workers prove their queue, whatever its name.
                    found[queue] = found.get(queue, queue in self._options.known) or ":claimed:" in name
            if not int(cursor):
                break
        for queue in sorted(found):  # a processing list comes behind its queue
            if found[queue] or not looks_held(queue, self._keys):
                self._add(queue)
                log.info("bridge_found", queue=queue)
            elif queue not in self._skipped:
                self._skipped.add(queue)
                hint = f"it looks like what workers of another program hold: --queue {queue} moves it all the same"
                log.warning("bridge_skipped", queue=queue, list=f"queue:{queue}", hint=hint)
        self._discover_at = monotonic() + max(DISCOVER, 50 * (monotonic() - started))

    # -- moving

    async def _batch(self, lanes: Sequence[_Lane]) -> list[Moved]:
        names = [name for lane in lanes for name in (lane.list, lane.stream)]
        reply = await self._session.run(scripts.BRIDGE, names, [BATCH, BATCH_BYTES])
        return [self._noted(lane, *row) for lane, row in zip(lanes, reply, strict=True)]

    def _noted(self, lane: _Lane, jobs: int, size: int, left: int, error: bytes) -> Moved:
        trouble = error.decode(errors="replace")
        reaction = reaction_to(trouble) if trouble else None
        if reaction in _SERVER_WIDE:
            with self._session.watched():
                raise redis_errors.ResponseError(trouble)
        if trouble and monotonic() >= lane.complain_at:
            lane.complain_at = monotonic() + COMPLAIN
            hint = _hint(lane, reaction, is_list=left >= 0)
            log.error("bridge_stuck", queue=lane.queue, level=lane.level, error=trouble, hint=hint)
        if not trouble:
            lane.complain_at = 0.0
        lane.stuck = bool(trouble)
        # A list that was not empty is read once more before it is waited on: producers push in bursts.
        lane.awake = not trouble and bool(jobs or left)
        lasting = reaction in (Reaction.KEY, Reaction.REFUSE)
        return Moved(lane.queue, lane.level, jobs, size, max(0, left), trouble, lasting)


_HELD: Final = frozenset((
    "processing", "inprogress", "in-progress", "in_progress", "progress", "working", "inflight", "in-flight",
    "in_flight", "active", "running", "reserved", "unacked", "unacknowledged", "pending", "backup", "tmp", "temp",
    "failed", "errors", "dead", "deadletter", "dead-letter", "dead_letter", "dlq",
))  # fmt: skip
"""Names that other programs give their lists of running and of failed jobs."""
_PROCESSING: Final = frozenset(("processing", "inprogress", "in-progress", "in_progress"))
_SUFFIX: Final = re.compile(r"(.+)[-_.]([a-z]+)")


def looks_held(queue: str, known: Container[str]) -> bool:
    """Whether a list of this name looks like another program's list of running or failed jobs.

    ``BRPOPLPUSH queue:q queue:q:processing`` is how Redis' own pages take a job, so a word of `_HELD` between or behind
    colons counts; behind another separator only if the name before it is a queue's; alone only `_PROCESSING`.

    Args:
        queue: name of the queue, by the name of the list.
        known: names of existing queues.
    """
    words = queue.lower().split(":")
    if len(words) > 1 and not _HELD.isdisjoint(words):
        return True
    if queue.lower() in _PROCESSING:
        return True
    behind = _SUFFIX.fullmatch(queue)
    return behind is not None and behind[2] in _HELD and behind[1] in known


def _hint(lane: _Lane, reaction: Reaction | None, *, is_list: bool) -> str:
    match reaction:
        case Reaction.KEY:
            key, kind = (lane.stream, "stream") if is_list else (lane.list, "list")
            return f"the key {key} is not a {kind}: rename or delete it"
        case Reaction.FULL:
            return "nothing is lost: jobs are moved when there is room; let workers make some, or raise maxmemory"
        case _:
            return "nothing is lost: it is tried again"

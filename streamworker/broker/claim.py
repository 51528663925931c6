"""Claim order of a worker, in both modes: reclaim expired leases, claim new jobs by priority, else wait."""

from __future__ import annotations

import math
import secrets
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from time import monotonic
from typing import Final

import anyio
import msgspec

from streamworker.broker import scripts
from streamworker.broker.keys import QueueKeys
from streamworker.broker.redis.session import Session
from streamworker.job import LEVELS, Claim, Level
from streamworker.policy import SUSPECT_DELIVERIES, apart_from, half_of
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

TROUBLE_PAUSE: Final = 60.0
"""Seconds between log lines about a key that cannot be read."""
IDLE: Final = 1.0
"""Most seconds of a wait without a key: what ends it earlier is `ClaimSource.stir`."""
SILENT_WAIT: Final = 1.0
"""Most seconds of a wait while no notification arrives that a queue was paused or resumed."""
UNBLOCK_EVERY: Final = 0.02
"""Seconds between CLIENT UNBLOCKs: a read that begins just after one blocks."""
PATIENCE: Final = 0.6
"""Most seconds a busy worker leaves suspects to idle ones."""
STEP_ASIDE: Final = 0.2
"""Seconds a busy worker does not reclaim after it left a suspect, so that idle workers are first."""
DRAIN_LOOK: Final = 0.05
"""Seconds between looks while a worker drains for a suspect."""
JUST_LOOKED: Final = 0.05
"""Seconds within which the next reclaim is due if the last one left suspects to other workers."""
TURN: Final = 1.0
"""Least seconds of a turn of new jobs, and of suspects that run apart while there are more."""
REFUSING: Final = 40.0
"""Seconds after a refused ending in which the queue's suspects are left alone: longer than a pause between offers."""
LEAVE, RESERVE, ASK, DRAIN, LATER = range(5)
"""What to do about suspects that run apart: leave them; being idle, reserve a group; ask to be the one that drains;
drain unasked; being idle, look for new jobs first."""


def none_ended(queue: str) -> int:
    """``ended`` of `Broker.claim` where no running claim waits to be settled."""
    del queue
    return 0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a broker.

    Attributes:
        queues: (name, cap) in claim order; a cap bounds how many jobs of the queue one worker runs.
        namespace: prefix of every key, but for the lists that producers push to.
        lease: seconds a claim lives unrenewed.
        weighted: weighted order of levels instead of strict order.
        fair_weights: weights of tenants; 1 for one that is not named.
        partitions: (name, number of partitions, URLs of their servers) of the queues that have some.
        groups: most suspects that run together, by delivery from the third on, see `streamworker.policy.group_sizes`.
    """

    queues: tuple[tuple[str, int | None], ...]
    namespace: str = ""
    lease: float = 15.0
    weighted: bool = False
    fair_weights: tuple[tuple[str, float], ...] = ()
    partitions: tuple[tuple[str, int, tuple[str, ...]], ...] = ()
    groups: tuple[int, ...] = (5, 1)


class StreamOptions(Options, frozen=True, kw_only=True):
    """Options of a stream broker.

    Attributes:
        group: the consumer group.
    """

    group: str = "workers"


class Turns:
    """Turns of new jobs and of suspects that run apart.

    A worker begins with new jobs: a fleet whose workers die one after the other still does them. Then suspects have a
    turn while there are more of them, and new jobs have one as long. A worker without new jobs keeps no turn.
    Suspects of a queue whose endings the server refuses have none: they would run in vain, one group after the other.
    """

    def __init__(self) -> None:
        self._new_until = math.inf
        self._apart_since: float | None = None
        self._refusing: dict[str, float] = {}

    def refused(self, queues: Iterable[str]) -> None:
        """The server refused endings of these queues."""
        self._refusing |= dict.fromkeys(queues, monotonic() + REFUSING)

    def refuses(self, queue: str) -> bool:
        """Whether the server has refused endings of this queue lately."""
        return queue in self._refusing and monotonic() < self._refusing[queue]  # each claim of list mode asks

    @property
    def new_first(self) -> bool:
        """It is the turn of new jobs."""
        return monotonic() < self._new_until

    def apart(self, *, more: bool) -> bool:
        """A group of suspects was reserved, and there are more or not; whether the next one follows at once."""
        now = monotonic()
        since = self._apart_since = (self._apart_since or now) if more else None
        if since is not None and now - since > TURN:
            self._apart_since, self._new_until = None, now + now - since
            return False
        return more

    async def claim(
        self,
        look: Callable[[int, Collection[Claim]], Awaitable[list[Claim]]],
        limit: int,
        running: Collection[Claim],
    ) -> list[Claim]:
        """Look for claims. Where a worker that runs nothing finds none in the turn of new jobs, it looks again."""
        claims = await look(limit, running)
        if not self.new_first:
            return claims
        if not claims and not running:
            self._new_until = 0.0
            return await look(limit, running)
        self._new_until = min(self._new_until, monotonic() + TURN)
        return claims


class ClaimSource(ABC):
    """Source of claims: caps, the pace of reclaiming, rest after an outage, keys that cannot be read.

    Args:
        session: the connections.
        queues: (keys, cap) in claim order.
        options: the broker's.
        heads: keys of each queue that come before the ready keys in the claiming script's KEYS.
    """

    def __init__(
        self, session: Session, queues: Sequence[tuple[QueueKeys, int | None]], options: Options, heads: int = 1
    ) -> None:
        self._session = session
        self._keys: Final[list[QueueKeys]] = [keys for keys, _ in queues]
        self._caps = [cap for _, cap in queues]
        self._lease, self._groups = options.lease, options.groups
        self._apart_from = apart_from(options.groups)
        self._half_since: float | None = None
        self.turns = Turns()
        names = [keys.name for keys in self._keys]
        self._order = Order(names, weighted=options.weighted, heads=heads)
        self._firsts: Final = [names.index(name) for name in names]
        """Of each partition, the index of its queue's first one, whose cap it shares."""
        self.ready_keys: Final[list[tuple[QueueKeys, Level, str]]] = [
            (keys, level, keys.ready(level)) for keys in self._keys for level in LEVELS
        ]
        self.consumer = ""
        self._ended: Callable[[str], int] = none_ended
        self._shut: Collection[str] = ()
        self.secrets: dict[str, bytes] = {}
        """Secret of each queue, by the last look; it seals the state of jobs."""
        self._seal_at = 0.0
        self.missing = 0
        """Jobs that were deleted while claimed, since the start."""
        self._reclaim_at = [0.0] * len(self._keys)
        self._longest = [0.0] * len(self._keys)
        """The longest lease of each queue's workers, by the last look."""
        self._passing_since: list[float | None] = [None] * len(self._keys)
        self._draining_since: list[float | None] = [None] * len(self._keys)
        self._unreadable_until: dict[str, float] = {}
        self._paused: frozenset[int] = frozenset()
        self.marked = frozenset(keys.queue for keys in self._keys)
        """Queues with cancelled jobs, by the last look; all queues before the first look."""
        self._lined = False
        """Whether a queue has jobs in tenants' lines, by the last look."""
        self._interrupted = anyio.Event()
        self._stirred = anyio.Event()
        self.stale = False
        """Since the last look a queue was paused or resumed, or fell below its cap."""
        self._blocked = False
        self.silent = False
        """No notification arrives, see `listen`: waits have to be short."""
        self.reply_lost = False
        """The reply to a claim may have been lost: `Consumer.own_pending` finds what it claimed."""

    def bound(self, ended: Callable[[str], int], shut: Collection[str]) -> None:
        """``ended`` and ``shut`` of `Broker.claim`, for the claims from now on."""
        self._ended, self._shut = ended, shut

    async def claim(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        """`Broker.claim`, within the bounds that `bound` set."""
        # Before reclaiming: the first command after an outage would find all leases expired.
        self._rest_after_outage()
        claims = await self.turns.claim(self._look, limit, running)
        self._rest_after_outage()
        if not claims and wait > 0 and not self._interrupted.is_set():
            if self.draining:
                await self._idle(min(wait, DRAIN_LOOK))
                return claims
            claims = await self.wait_unless_stale(limit, min(wait, SILENT_WAIT) if self.silent else wait, running)
        return claims

    async def _look(self, limit: int, running: Collection[Claim]) -> list[Claim]:
        """Reclaim, then claim new jobs."""
        claims = await self.reclaim(limit, running)
        # A suspect waits until all else has ended: nothing new is claimed beside it.
        if len(claims) < limit and not any(claim.suspect for claim in claims):
            self.stale = False  # from here on a notification may be newer than this look
            claims += await self.take(limit - len(claims), [*running, *claims] if claims else running)
        return claims

    async def _lined_up(self, fair: Sequence[int], left: int, running: Collection[Claim]) -> list[Claim]:
        """Note whether queues have jobs in tenants' lines; the first look that finds some claims of them, too.

        Args:
            fair: indexes of such queues, from 1.
            left: how many jobs may still be claimed.
            running: claims that run here.
        """
        before, self._lined = self._lined, bool(fair)
        if not fair or before:
            return []
        if left > 0 and not self.draining:
            return await self.take(left, running)
        for index in fair:
            keys = self._keys[index - 1]
            await self._session.run(scripts.PULL, [keys.meta], [keys.shape, 0])
        return []

    @property
    def queues(self) -> list[str]:
        """Names of its queues."""
        return [keys.queue for keys in self._keys]

    @property
    def draining(self) -> bool:
        """Nothing new is claimed, so that this worker becomes idle and can run suspects apart."""
        return any(self._draining_since)

    async def wait_unless_stale(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        """`wait`, unless the queues to wait for are out of date."""
        if self.stale:
            return []
        self._blocked = True
        try:
            return await self.wait(limit, wait, running)
        finally:
            self._blocked = False

    def stir(self) -> None:
        """The queues to wait for are out of date: no wait begins before the next look."""
        self.stale = True
        self._stirred.set()

    async def seal(self, keys: QueueKeys) -> None:
        """Create the queue's secret if it has none, see `streamworker.codec`."""
        self.secrets[keys.queue] = await self._session.run(scripts.SECRET, [keys.meta], [secrets.token_hex(16)])

    async def _seal_again(self) -> None:
        """Create lost secrets again, at most once a minute. Before a claim: an error after it would lose its reply."""
        if monotonic() >= self._seal_at and not all(self.secrets.get(keys.queue) for keys in self._keys):
            self._seal_at = monotonic() + TROUBLE_PAUSE
            for keys in self._keys:
                if not self.secrets.get(keys.queue):
                    await self.seal(keys)

    async def look_again(self) -> None:
        """End a wait that is out of date: a queue was paused or resumed, or fell below its cap."""
        self.stir()
        while self.stale and self._blocked:
            with anyio.CancelScope(shield=True):  # the wait may be a command
                await self.end_wait()
            await anyio.sleep(UNBLOCK_EVERY)

    async def end_wait(self) -> None:
        """End the current wait."""
        await self.unblock()

    @property
    def reclaims_now(self) -> bool:
        """Whether `reclaim` has something to do."""
        return self.draining or min(self._reclaim_at) <= monotonic()

    @abstractmethod
    async def reclaim(self, limit: int, running: Collection[Claim]) -> list[Claim]:
        """Reclaim expired leases of the queues whose turn has come."""

    @abstractmethod
    async def take(self, limit: int, running: Collection[Claim]) -> list[Claim]:
        """Claim new jobs, in order."""

    @abstractmethod
    async def wait(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        """Wait for a job, at most ``wait`` seconds."""

    def _group_here(self, running: Collection[Claim]) -> tuple[int, str, str]:
        """The scripts' arguments about groups: suspects that may join the one here, its half, sizes of those apart.

        One half runs after the other, or on another worker; but a suspect that has run for a lease keeps no others
        waiting.
        """
        sizes = " ".join(str(size) for size in self._groups[self._apart_from - SUSPECT_DELIVERIES :])
        if self._apart_from <= SUSPECT_DELIVERIES:
            return 0, "", sizes
        group = [claim for claim in running if SUSPECT_DELIVERIES <= claim.count < self._apart_from]
        # Ended claims of a queue that refuses to settle them must not block suspects of other queues.
        held = Counter(claim.queue for claim in group)
        live = {queue: count - ended for queue, count in held.items() if count > (ended := self._ended(queue))}
        if not live:
            self._half_since = None
            return self._groups[0], "", sizes
        now = monotonic()
        self._half_since = self._half_since or now
        latest = next(claim for claim in reversed(group) if claim.queue in live)
        half = half_of(latest.entry, SUSPECT_DELIVERIES)
        if now - self._half_since > self._lease:
            self._half_since, half = now, ""
        return max(0, self._groups[0] - sum(live.values())), half, sizes

    def _about_suspects(self, index: int, running: Collection[Claim]) -> int:
        """What to do about suspects of this queue.

        An idle worker reserves a group and runs it at once, unless it is the turn of new jobs. A busy worker leaves it
        to idle ones for a while; if there are none, it asks to be the worker that drains: that claims nothing new until
        it is idle. The suspects stay unclaimed meanwhile: the first idle worker reserves it, and a worker that dies
        while it drains delays it by a second. After a lease a worker asks no more, so that another one, whose jobs are
        shorter, may drain too.
        """
        if any(claim.suspect for claim in running):
            return LEAVE
        if self.turns.new_first:
            return LEAVE if running else LATER
        if not running:
            return RESERVE
        now, passing, draining = monotonic(), self._passing_since[index], self._draining_since[index]
        if draining is not None:
            return ASK if now - draining < self._lease else DRAIN
        patient = passing is None or now - passing < min(PATIENCE, self._lease / 3)
        return LEAVE if patient else ASK

    def _left_to_others(self, index: int, suspects: int, wish: int, *, granted: bool) -> None:
        """Record that suspects were left to other workers.

        Args:
            index: of the queue.
            suspects: how many; negative if it was too early to look.
            wish: what this worker wanted to do about them.
            granted: this worker drains.
        """
        now, draining = monotonic(), self._draining_since[index]
        if suspects == 0:
            self._passing_since[index] = self._draining_since[index] = None
            if not self.draining:
                self.turns.apart(more=False)
        elif wish == RESERVE:  # idle: claims nothing new before the next suspect, while their turn lasts
            self._draining_since[index] = (draining or now) if self.turns.apart(more=True) else None
        elif wish == ASK:
            self._draining_since[index] = (draining or now) if granted else None
        if suspects > 0 and wish not in (RESERVE, LATER):
            self._passing_since[index] = self._passing_since[index] or now
            self._reclaim_at[index] = max(self._reclaim_at[index], now + STEP_ASIDE)

    def _drain_no_more(self) -> None:
        self._draining_since = [None] * len(self._keys)

    def rest(self, seconds: float) -> None:
        """Reclaim nothing for some seconds, at least for the longest known lease."""
        self._drain_no_more()
        now, more = monotonic(), seconds > 0
        self._reclaim_at = [
            max(at, now + max(seconds, longest if more else 0.0))
            for at, longest in zip(self._reclaim_at, self._longest, strict=True)
        ]

    def _rest_after_outage(self) -> None:
        """After an outage no worker could renew: reclaim nothing before every worker had one lease to renew."""
        if self._session.outage() > self._lease / 3:
            self.rest(self._lease)

    def interrupt(self) -> None:
        """From now on no claim waits."""
        self._interrupted.set()
        self._stirred.set()

    async def unblock(self) -> None:
        """End a wait soon."""
        await self._session.unblock()

    async def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End pending reads; call it when nothing is claimed any more."""

    def _allowances(self, limit: int, running: Collection[Claim]) -> list[int]:
        """How many jobs of each queue may be claimed: a cap bounds how many of it this worker runs."""
        if not any(self._caps) and not self._shut:
            return [limit] * len(self._caps)
        used = Counter(claim.queue for claim in running)
        return [
            0
            if keys.name in self._shut
            else limit
            if cap is None
            else max(0, cap - used[keys.name] + self._ended(keys.name))
            for keys, cap in zip(self._keys, self._caps, strict=True)
        ]

    def _bounds(self, limit: int, running: Collection[Claim]) -> list[int]:
        """The scripts' arguments about allowances: -N for a partition that shares the Nth one."""
        allowances = self._allowances(limit, running)
        if not self._order.rotates:
            return allowances
        firsts = self._firsts
        return [allowed if firsts[index] == index else -1 - firsts[index] for index, allowed in enumerate(allowances)]

    def _next_reclaim(self, running: Collection[Claim]) -> float:
        """Monotonic seconds of the next reclaim; a queue at its cap is reclaimed from when it falls below it."""
        allowances = self._allowances(1, running)
        due = [at for at, allowed in zip(self._reclaim_at, allowances, strict=True) if allowed > 0]
        return min(due, default=math.inf)

    def _open(self, running: Collection[Claim]) -> dict[str, tuple[QueueKeys, Level]]:
        """Ready keys to wait on: of queues that are neither paused nor at their cap, and that can be read."""
        now, allowances = monotonic(), self._allowances(1, running)
        open_ = {keys.queue for i, keys in enumerate(self._keys) if allowances[i] > 0 and i not in self._paused}
        return {
            place: (keys, level)
            for keys, level, place in self.ready_keys
            if keys.queue in open_ and self._unreadable_until.get(place, 0.0) < now
        }

    async def _idle(self, wait: float) -> None:
        """Wait without a key: all queues are paused, at their cap or unreadable."""
        if self._interrupted.is_set() or self.stale:
            return
        self._blocked = False  # this wait needs no command to end
        self._stirred = anyio.Event()
        with anyio.move_on_after(min(wait, IDLE)):
            await self._stirred.wait()

    def _complain(self, key: str, message: str) -> None:
        """Log at most once a minute that a key cannot be used, and do not block on it meanwhile."""
        if self._unreadable_until.get(key, 0.0) < monotonic():
            log.error("key_unreadable", key=key, error=message)
            self._unreadable_until[key] = monotonic() + TROUBLE_PAUSE


WEIGHTS: Final = (6, 3, 1)
"""Shares of high, normal and low while all three have jobs."""


class Order:
    """Order in which the claiming scripts walk the ready keys of queues, three a queue.

    The partitions of a queue rotate, level by level: the first one of a walk comes last in the next.

    Args:
        names: of the queues; its partitions have one name.
        weighted: weighted order instead of strict.
        heads: keys of each queue that come before the ready keys in the script's KEYS.
    """

    def __init__(self, names: Sequence[str], *, weighted: bool, heads: int = 1) -> None:
        self._weighted, self._heads = weighted, heads * len(names)
        self._credit = [0] * len(LEVELS)
        self._groups = {name: [i for i, each in enumerate(names) if each == name] for name in dict.fromkeys(names)}
        self._turn, self._turns = 0, math.lcm(*map(len, self._groups.values()))
        self._first = self._walk(dict.fromkeys(self._groups, 0))

    @property
    def rotates(self) -> bool:
        """Whether a queue has partitions here."""
        return self._turns > 1

    def walk(self, starts: Mapping[str, int] | None = None) -> list[int]:
        """The walk of one claim: (ready key, queue, budget) of each step, counted from 1 as Lua does.

        Args:
            starts: the queues to walk alone, and the partition of each that comes first, counted from 0; all queues,
                whose partitions rotate, if not given.
        """
        if starts is not None:
            return self._walk(starts)
        if self._turns == 1:
            return self._first
        self._turn = (self._turn + 1) % self._turns
        return self._walk(dict.fromkeys(self._groups, self._turn))

    def _walk(self, starts: Mapping[str, int]) -> list[int]:
        levels = range(len(LEVELS))
        groups = []
        for name, start in starts.items():
            group = self._groups[name]
            at = start % len(group)
            groups.append(group[at:] + group[:at])
        if self._weighted:
            shares = [(queue, level, level) for level in levels for group in groups for queue in group]
            rest = [(queue, level, len(LEVELS)) for level in levels for group in groups for queue in group]
            steps = shares + rest
        else:
            steps = [(queue, level, 0) for group in groups for level in levels for queue in group]
        width, heads = len(LEVELS), self._heads
        return [
            number
            for queue, level, budget in steps
            for number in (heads + queue * width + level + 1, queue + 1, budget + 1)
        ]

    def budgets(self, limit: int) -> list[int]:
        """Most jobs of each budget of the walk, for a claim of ``limit`` jobs."""
        if not self._weighted:
            return [limit]
        total = sum(WEIGHTS)
        rounds, rest = divmod(limit, total)
        shares = [weight * rounds for weight in WEIGHTS]
        for _ in range(rest):  # smooth weighted round robin keeps the shares true over many small claims
            self._credit = [credit + weight for credit, weight in zip(self._credit, WEIGHTS, strict=True)]
            best = self._credit.index(max(self._credit))
            self._credit[best] -= total
            shares[best] += 1
        return [*shares, limit]

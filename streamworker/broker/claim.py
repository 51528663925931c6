"""How a worker comes to jobs, whatever they lie in: orphans first, new ones in order, waiting when there is none."""

from __future__ import annotations

import math
import secrets
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from time import monotonic
from typing import Final

import anyio

from streamworker.broker import scripts
from streamworker.broker.keys import QueueKeys
from streamworker.broker.redis.session import Session
from streamworker.job import LEVELS, Claim, Level
from streamworker.policy import SUSPECT_DELIVERIES
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

TROUBLE_PAUSE: Final = 60.0
"""Seconds between complaints about a key that cannot be read."""
SILENT_WAIT: Final = 1.0
"""Most seconds of a wait while the bell cannot tell that a queue was paused or resumed."""
UNBLOCK_EVERY: Final = 0.02
"""Seconds between unblockings: a read that begins just after one would block on."""
PATIENCE: Final = 0.6
"""Most seconds a busy worker leaves suspects to idle ones."""
STEP_ASIDE: Final = 0.2
"""Seconds it does not sweep after it left one, so that idle ones come first."""
DRAIN_LOOK: Final = 0.05
"""Seconds between looks whether a worker that drains for a suspect has become idle."""
JUST_LOOKED: Final = 0.05
"""Seconds; whoever left suspects to others has the next sweep made sooner than that."""
LEAVE, RESERVE, ASK, DRAIN = range(4)
"""About suspects: leave them; take one, being idle; ask to be the one that drains; drain unasked."""


def none_ended(queue: str) -> int:
    """Nothing of what runs waits to be settled: see ``ended`` of `Broker.claim`."""
    del queue
    return 0


class ClaimSource(ABC):
    """What all ways of taking share: caps, the pace of sweeps, rest after an outage, complaints about keys.

    Args:
        session: the connections.
        queues: (keys, cap) in the order they are taken.
        lease: seconds after which an unrenewed claim is an orphan.
        alone_from: the delivery from which on a job runs alone.
    """

    def __init__(
        self, session: Session, queues: Sequence[tuple[QueueKeys, int | None]], *, lease: float, alone_from: int
    ) -> None:
        self._session = session
        self._keys: Final[list[QueueKeys]] = [keys for keys, _ in queues]
        self._caps = [cap for _, cap in queues]
        self._lease = lease
        self._alone_from = alone_from
        self.slots = 1
        self.ready_keys: Final[list[tuple[QueueKeys, Level, str]]] = [
            (keys, level, keys.ready(level)) for keys in self._keys for level in LEVELS
        ]
        self.consumer = ""
        self.ended: Callable[[str], int] = none_ended
        self.shut: Collection[str] = ()
        self.secrets: dict[str, bytes] = {}
        """What the state of each queue's jobs is sealed with, by the last look."""
        self._seal_at = 0.0
        self.missing = 0
        """Jobs that were deleted underneath their claim, since the start."""
        self._sweep_at = [0.0] * len(self._keys)
        self._longest = [0.0] * len(self._keys)
        """The longest lease of each queue's workers, by the last look."""
        self._passing_since: list[float | None] = [None] * len(self._keys)
        self._draining_since: list[float | None] = [None] * len(self._keys)
        self._unreadable_until: dict[str, float] = {}
        self._paused: frozenset[int] = frozenset()
        self.marked = frozenset(keys.queue for keys in self._keys)
        """Queues with cancelled jobs, by the last look; before the first one nobody knows."""
        self._interrupted = anyio.Event()
        self._stirred = anyio.Event()
        self.stale = False
        """Since the last look a queue was paused or resumed, or has room again."""
        self._blocked = False
        self.silent = False
        """The bell is not heard: see `listen`."""
        self.reply_lost = False
        """The reply to a claim may have been lost: `Consumer.own_pending` finds what it claimed."""

    async def claim(
        self,
        limit: int,
        wait: float,
        running: Collection[Claim],
        ended: Callable[[str], int] = none_ended,
        shut: Collection[str] = (),
    ) -> list[Claim]:
        self.ended, self.shut = ended, shut
        # Before the sweep, or the first command that gets through again would take everybody for dead.
        self._rest_after_outage()
        claims = await self.reclaim(limit, running)
        # A suspect waits for everything else to end: nothing new comes beside it.
        if len(claims) < limit and not any(claim.suspect for claim in claims):
            self.stale = False  # whatever rings from here on, this look may not have seen
            claims += await self.take(limit - len(claims), [*running, *claims] if claims else running)
        self._rest_after_outage()
        if not claims and wait > 0 and not self._interrupted.is_set():
            if self.draining:
                await self._idle(min(wait, DRAIN_LOOK))
                return claims
            claims = await self.wait_unless_stale(limit, min(wait, SILENT_WAIT) if self.silent else wait, running)
        return claims

    @property
    def draining(self) -> bool:
        """Nothing new is taken, so that this worker becomes idle and can run a suspect alone."""
        return any(self._draining_since)

    async def wait_unless_stale(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        """`wait`, unless what it would wait for is out of date."""
        if self.stale:
            return []
        self._blocked = True
        try:
            return await self.wait(limit, wait, running)
        finally:
            self._blocked = False

    def stir(self) -> None:
        """Which queues can be waited for is out of date: no wait begins before the next look."""
        self.stale = True
        self._stirred.set()

    async def seal(self, keys: QueueKeys) -> None:
        """Make sure that the queue has a secret, see `streamworker.codec`."""
        self.secrets[keys.queue] = await self._session.run(scripts.SECRET, [keys.meta], [secrets.token_hex(16)])

    async def _seal_again(self) -> None:
        """Give queues that lost their secret a new one, now and then. Before a claim: an error would lose its reply."""
        if monotonic() >= self._seal_at and not all(self.secrets.get(keys.queue) for keys in self._keys):
            self._seal_at = monotonic() + TROUBLE_PAUSE
            for keys in self._keys:
                if not self.secrets.get(keys.queue):
                    await self.seal(keys)

    async def look_again(self) -> None:
        """A queue was paused or resumed, or has room again: end the wait that does not know it yet."""
        self.stir()
        while self.stale and self._blocked:
            with anyio.CancelScope(shield=True):  # it may be a command
                await self.end_wait()
            await anyio.sleep(UNBLOCK_EVERY)

    async def end_wait(self) -> None:
        """End a wait that may go on elsewhere."""
        await self.unblock()

    @abstractmethod
    async def reclaim(self, limit: int, running: Collection[Claim]) -> list[Claim]:
        """Orphans, of the queues whose sweep is due."""

    @abstractmethod
    async def take(self, limit: int, running: Collection[Claim]) -> list[Claim]:
        """New jobs, in order."""

    @abstractmethod
    async def wait(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        """Wait for a job, at most ``wait`` seconds."""

    def _group_room(self, running: Collection[Claim]) -> int:
        """How many suspects that do not run alone yet may be taken: all of them fill at most half of the slots."""
        if self._alone_from <= SUSPECT_DELIVERIES:
            return 0
        held = Counter(claim.queue for claim in running if SUSPECT_DELIVERIES <= claim.count < self._alone_from)
        # What has ended and cannot be settled, of a queue that refuses it, must not keep others' suspects waiting.
        group = sum(max(0, count - self.ended(queue)) for queue, count in held.items())
        return max(0, max(1, self.slots // 2) - group)

    def _about_suspects(self, index: int, running: Collection[Claim]) -> int:
        """What to do about suspects of this queue.

        An idle worker takes one and runs it at once. A busy one leaves it to idle ones for a while; if there are none,
        it asks to be the one that takes nothing new until it is idle. The suspect is nobody's meanwhile: whoever is
        idle first takes it, and a worker that dies while it drains delays it by a second. After a lease it asks no
        more, so that another one, whose jobs are shorter, may drain too.
        """
        if any(claim.suspect for claim in running):
            return LEAVE
        if not running:
            return RESERVE
        now, passing, draining = monotonic(), self._passing_since[index], self._draining_since[index]
        if draining is not None:
            return ASK if now - draining < self._lease else DRAIN
        patient = passing is None or now - passing < min(PATIENCE, self._lease / 3)
        return LEAVE if patient else ASK

    def _left_to_others(self, index: int, suspects: int, wish: int, *, granted: bool) -> None:
        """A look left suspects to others.

        Args:
            index: of the queue.
            suspects: how many; a negative number: it was too early to look.
            wish: what was said about them.
            granted: this worker drains.
        """
        now, draining = monotonic(), self._draining_since[index]
        if suspects == 0:
            self._passing_since[index] = self._draining_since[index] = None
        elif wish == RESERVE:  # idle, and nothing new comes before the next one, unless that takes too long
            late = draining is not None and now - draining > self._lease
            self._draining_since[index] = None if late else draining or now
        elif wish == ASK:
            self._draining_since[index] = (draining or now) if granted else None
        if suspects > 0 and wish != RESERVE:
            self._passing_since[index] = self._passing_since[index] or now
            self._sweep_at[index] = max(self._sweep_at[index], now + STEP_ASIDE)

    def _drain_no_more(self) -> None:
        self._draining_since = [None] * len(self._keys)

    def rest(self, seconds: float) -> None:
        """Take nobody for dead for some seconds, or for a lease of those who have a longer one than we."""
        self._drain_no_more()
        now, more = monotonic(), seconds > 0
        self._sweep_at = [
            max(at, now + max(seconds, longest if more else 0.0))
            for at, longest in zip(self._sweep_at, self._longest, strict=True)
        ]

    def _rest_after_outage(self) -> None:
        """Nobody could renew meanwhile: no one is taken for dead before everyone had a lease to come back."""
        if self._session.outage() > self._lease / 3:
            self.rest(self._lease)

    def interrupt(self) -> None:
        """No claim waits any more."""
        self._interrupted.set()
        self._stirred.set()

    async def unblock(self) -> None:
        """End a wait soon."""
        await self._session.unblock()

    async def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End what still reads; call it when nothing is claimed any more."""

    def _allowances(self, limit: int, running: Collection[Claim]) -> list[int]:
        """How many jobs of each queue may be taken: a cap bounds what this worker runs of it."""
        if not any(self._caps) and not self.shut:
            return [limit] * len(self._caps)
        used = Counter(claim.queue for claim in running)
        return [
            0
            if keys.queue in self.shut
            else limit
            if cap is None
            else max(0, cap - used[keys.queue] + self.ended(keys.queue))
            for keys, cap in zip(self._keys, self._caps, strict=True)
        ]

    def _next_sweep(self, running: Collection[Claim]) -> float:
        """When the next sweep is due (monotonic seconds); a queue at its cap is swept as soon as it has room."""
        allowances = self._allowances(1, running)
        return min((at for at, room in zip(self._sweep_at, allowances, strict=True) if room > 0), default=math.inf)

    def _open(self, running: Collection[Claim]) -> dict[str, tuple[QueueKeys, Level]]:
        """Where a job may be waited for: nothing paused, capped out or unreadable."""
        now, allowances = monotonic(), self._allowances(1, running)
        open_ = {keys.queue for i, keys in enumerate(self._keys) if allowances[i] > 0 and i not in self._paused}
        return {
            place: (keys, level)
            for keys, level, place in self.ready_keys
            if keys.queue in open_ and self._unreadable_until.get(place, 0.0) < now
        }

    async def _idle(self, wait: float) -> None:
        """Nothing can be waited for: all is paused, capped out or unreadable."""
        if self._interrupted.is_set() or self.stale:
            return
        self._blocked = False  # this wait needs no command to end
        self._stirred = anyio.Event()
        with anyio.move_on_after(min(wait, 1.0)):
            await self._stirred.wait()

    def _complain(self, key: str, message: str) -> None:
        """Say now and then that a key cannot be used, and do not block on it meanwhile."""
        if self._unreadable_until.get(key, 0.0) < monotonic():
            log.error("key_unreadable", key=key, error=message)
            self._unreadable_until[key] = monotonic() + TROUBLE_PAUSE


WEIGHTS: Final = (6, 3, 1)
"""Shares of high, normal and low when all are saturated."""


class Order:
    """The walk over ``queues`` queues of three streams each, as the scripts that take take it.

    Args:
        queues: number of queues.
        weighted: weighted order instead of strict.
        heads: keys of each queue that the script takes before all streams or lists.
    """

    def __init__(self, queues: int, *, weighted: bool, heads: int = 1) -> None:
        self._weighted = weighted
        self._credit = [0] * len(LEVELS)
        levels = range(len(LEVELS))
        strict = [(queue, level) for queue in range(queues) for level in levels]
        # Steps of (stream, queue, budget), counted from 1 as Lua does.
        if weighted:
            shares = [(queue, level, level) for level in levels for queue in range(queues)]
            rest = [(queue, level, len(LEVELS)) for level in levels for queue in range(queues)]
            steps = shares + rest
        else:
            steps = [(queue, level, 0) for queue, level in strict]
        width = len(LEVELS)
        self.steps: Final[list[int]] = [
            number
            for queue, level, budget in steps
            for number in (heads * queues + queue * width + level + 1, queue + 1, budget + 1)
        ]

    def budgets(self, limit: int) -> list[int]:
        """Entries each budget of the walk allows, for a claim of ``limit`` entries."""
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

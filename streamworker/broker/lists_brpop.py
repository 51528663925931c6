"""List mode by ``BRPOP key... timeout``, one job at a time, as legacy workers do.

A popped job is in this process alone: a crash loses it, and so does a lost reply. A worker that is stopped loses
nothing: the last job is finished, or put back. For fleets whose jobs must not run twice after a crash; for all others
there is `lists`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from time import monotonic
from typing import ClassVar, Final

import anyio

from streamworker import codec
from streamworker.broker import SettleRequest, scripts
from streamworker.broker.claim import SILENT_WAIT, ClaimSource, Options
from streamworker.broker.keys import SECRET, ListKeys, QueueKeys, leased
from streamworker.broker.lists import ListBroker, ListSettlement, Reclaimer
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.redis.session import BLOCK, Session
from streamworker.broker.settle import Code
from streamworker.codec import unmarked
from streamworker.errors import StreamworkerError
from streamworker.job import LEVELS, Claim, Settled
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

_ASKED: Final = ("paused", "inactive", "cancelled", "waits", SECRET, "fair")
AT_ONCE = 0.01
"""Seconds of a BRPOP that should not wait: zero means for ever."""


class BrpopClaims(ClaimSource):
    """`ClaimSource` that pops one element at a time.

    Args:
        session: the connections.
        queues: (keys, cap) in claim order.
        options: the broker's.
        reclaimer: releases expired claims of workers that do not pop.
    """

    def __init__(
        self,
        session: Session,
        queues: Sequence[tuple[ListKeys, int | None]],
        options: Options,
        reclaimer: Reclaimer,
    ) -> None:
        super().__init__(session, queues, options, 0)
        self._weighted = options.weighted
        self._reclaimer = reclaimer
        self.waited: frozenset[str] = frozenset()
        """Queues with jobs whose end a caller waits for, by the last look."""

    async def claim(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:
        """`Broker.claim`: BRPOP reads and waits in one, while no job runs, so that no cap is ever reached."""
        self._rest_after_outage()
        await self.reclaim(limit, running)
        if not await self._hands_free(wait, running):
            return []
        self.stale = False
        if wait <= 0 or self._interrupted.is_set():
            return await self.take(limit, running)
        return await self.wait_unless_stale(limit, min(wait, SILENT_WAIT) if self.silent else wait, running)

    async def _hands_free(self, wait: float, running: Collection[Claim]) -> bool:
        """Wait until no job runs: a finished job that is not settled would be lost together with the next one."""
        pause = 0.0005
        with anyio.move_on_after(wait):
            while len(running) and not self._interrupted.is_set():
                pause = min(2 * pause, 0.05)
                await anyio.sleep(pause)  # settling takes no round trip but for what goes on
        return not len(running)

    async def reclaim(self, limit: int, running: Collection[Claim]) -> list[Claim]:  # noqa: ARG002 - they run on their own
        await self._reclaimer.give_back(running)
        return []

    async def take(self, limit: int, running: Collection[Claim]) -> list[Claim]:  # noqa: ARG002 - one job at a time
        """Pop without waiting."""
        return await self._pop(AT_ONCE, running)

    async def wait(self, limit: int, wait: float, running: Collection[Claim]) -> list[Claim]:  # noqa: ARG002
        """Pop within ``wait`` seconds."""
        wait = max(AT_ONCE, min(wait, BLOCK, min(self._reclaimer.look_at) - monotonic()))
        return await self._pop(wait, running)

    async def _pop(self, wait: float, running: Collection[Claim]) -> list[Claim]:
        await self._session.fresh()
        with self._session.watched():
            async with self._session.commands.pipeline(transaction=False) as pipe:
                for keys in self._keys:
                    pipe.execute_command("HMGET", keys.meta, *_ASKED)
                answers = await pipe.execute(raise_on_error=False)
        known = {i: answer for i, answer in enumerate(answers) if isinstance(answer, list)}
        self._paused = frozenset(i for i, answer in known.items() if any(answer[:2]))
        self.marked = frozenset(self._keys[i].queue for i, answer in known.items() if answer[2])
        self.waited = frozenset(self._keys[i].queue for i, answer in known.items() if answer[3])
        self.secrets.update({self._keys[i].queue: answer[4] or b"" for i, answer in known.items()})
        for i, answer in known.items():
            if answer[5]:
                await self._session.run(scripts.PULL, [self._keys[i].meta], [self._keys[i].shape, 1])
        await self._seal_again()  # before anything is popped, which an error would lose
        ready_keys = self._open(running)
        if not ready_keys:
            if wait > AT_ONCE:
                await self._idle(wait)
            return []
        with self._session.watched():
            reply = await self._session.reader.execute_command("BRPOP", *self._ordered(list(ready_keys)), wait)
        if reply is None:
            return []
        place, element = reply[0].decode(), reply[1]
        keys, level = ready_keys[place]
        secret = self.secrets.get(keys.queue, b"")
        body, mark = unmarked(element, secret)
        entry, count = (mark.id, mark.deliveries + 1) if mark is not None else (codec.new_id(), 1)
        return [Claim(keys.name, level, place, entry.encode(), count, body, b"", secret=secret)]

    def _ordered(self, places: list[str]) -> list[str]:
        """Keys as listed; with weighted order the level whose turn it is comes first."""
        if not self._weighted:
            return places
        turn = LEVELS[self._order.budgets(1).index(1)]
        first = [place for keys, level, place in self.ready_keys if level == turn and place in places]
        return [*first, *(place for place in places if place not in first)]

    def rest(self, seconds: float) -> None:
        self._reclaimer.rest(seconds)

    def _rest_after_outage(self) -> None:
        self._reclaimer.rest_after_outage()


class BrpopBroker(ListBroker):
    """List mode with BRPOP: a claim is in this process alone; there is no lease to renew or to reclaim."""

    _source_class: ClassVar[Callable[..., ClaimSource]] = BrpopClaims

    def __init__(self, address: RedisAddress, options: Options) -> None:
        super().__init__(address, options)
        self._popped: set[tuple[str, str]] = set()
        """(queue, id) of jobs with order keys that this worker holds."""

    async def join(self, worker_id: str) -> None:
        await super().join(worker_id)
        log.warning(
            "list_pop_brpop",
            worker_id=worker_id,
            danger="a crash of this worker loses the job in hand: with LIST_POP=brpop jobs run at most once",
            cure="leave STREAMWORKER_LIST_POP out, or set it to move",
        )

    async def confirm(self, claim: Claim) -> Claim | None:
        """Nothing is ever reserved."""
        return claim

    async def renew(self, claims: Collection[Claim]) -> list[Claim]:
        """No claim can be lost."""
        del claims
        return []

    def standby(self, longest: float) -> bytes | None:
        """There is no lease to renew."""
        del longest
        return None

    async def _judged(self, claims: list[Claim]) -> list[Claim]:
        try:
            return await super()._judged(claims)
        except StreamworkerError as error:  # the job is in this process alone
            log.warning("cancelled_unknown", jobs=len(claims), error=str(error))
            return claims

    async def settle(self, items: Sequence[SettleRequest]) -> list[Settled]:
        await self._forget_popped(items)
        return await super().settle(items)

    def _sender(self) -> ListSettlement:
        waited = self._source.waited if isinstance(self._source, BrpopClaims) else frozenset()
        return _PoppedSettlement(self._session.pool, self._source.consumer, waited)

    async def _forget_popped(self, items: Sequence[SettleRequest]) -> None:
        for item in items:
            mine = (item.claim.home, item.job_id)
            if mine in self._popped:
                self._popped.discard(mine)
                await self._session.ask("HDEL", self._key(mine[0]).popped, mine[1])

    async def turns(self, queue: str, jobs: Sequence[tuple[str, str]]) -> list[bool]:
        """`OrderKeys.turns`; noted, because a popped job is nowhere else, and its key is not stuck."""
        answers = await super().turns(queue, jobs)
        for (_, job_id), holds in zip(jobs, answers, strict=True):
            if holds:
                await self._session.ask("HSET", self._key(queue).popped, job_id, self._source.consumer)
                self._popped.add((queue, job_id))
        return answers

    async def own_pending(self, running: Collection[Claim]) -> list[Claim]:
        """What a lost reply claimed is lost."""
        del running
        return []


class _PoppedSettlement(ListSettlement):
    """`ClaimSettlement` of popped claims, which have no fence: scripts check whether an ending was stored before."""

    def __init__(self, client: scripts.AsyncCaller, worker: str, waited: frozenset[str]) -> None:
        super().__init__(client, worker)
        self._waited = waited

    async def done(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        """Nothing to do: a finished job left the server when it was popped."""
        self.waited = keys.queue in self._waited
        return [1] * len(items)

    async def done_in_order(self, keys: QueueKeys, items: list[SettleRequest]) -> list[Code]:
        """Their keys are on the server."""
        self.waited = False  # the script tells callers
        return await self.finish(keys, items)

    def _fence(self, claim: Claim) -> tuple[bytes, bytes]:
        return leased(claim, self._worker), b""

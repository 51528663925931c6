"""The part of a broker that both modes share: publishing, promotion and limits, whatever type the ready keys have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from itertools import chain
from time import monotonic
from typing import Any, Final, Generic, TypeAlias

import msgspec
from typing_extensions import TypeVar

from streamworker.broker import Refusal, SettleRequest, scripts
from streamworker.broker.cancel import Cancels, RedisEndedPayloads, cancel, cancel_in, dispose, pass_on, uncancel
from streamworker.broker.claim import ClaimSource, Options, none_ended
from streamworker.broker.keys import PROGRESS, QueueKeys, worker_key
from streamworker.broker.partitions import JobMover, PartitionedPublisher, Partitions, Router, fresh_epoch
from streamworker.broker.publisher import Publisher
from streamworker.broker.pubsub import listen, reading, subscriber_of, waiting
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.redis.reactions import Reaction, reaction_to
from streamworker.broker.redis.redis_history import RedisHistory
from streamworker.broker.redis.session import Session
from streamworker.broker.schedules import RedisSchedules
from streamworker.broker.settle import ClaimSettlement, emit, settle
from streamworker.broker.stream_claim import ClusterStreamClaims
from streamworker.errors import ConfigurationError, StreamworkerError, Unreachable
from streamworker.job import Claim, CronTick, CronTickResult, Drop, Enqueued, PackedJob, Progress, Settled
from streamworker.limits import AcquireRequest, AcquireResult, Limit, Permit
from streamworker.results import OutputBatch, OutputReader, ResultWaiter
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

RENEW_BATCH: Final = 500
"""Claims one script call renews."""
ScriptCall: TypeAlias = tuple[list[str], list[Any]]
"""(keys, arguments) of a call of a script."""

K = TypeVar("K", bound=QueueKeys)
I = TypeVar("I", bound=ClaimSource | ClusterStreamClaims)  # noqa: E741 - K is for keys, I for source


class RedisBroker(ABC, Generic[K, I]):
    """`WorkerBroker` of both modes; one instance serves one worker, or producers.

    Args:
        address: the server.
        options: queues, lease and the like.
    """

    def __init__(self, address: RedisAddress, options: Options) -> None:
        self._options: Final = options
        self._session = Session(address, options.lease)
        self._partitions = partitions = Partitions(options.partitions)
        queues = [(self._key(home), cap) for name, cap in options.queues for home in partitions.homes(name)]
        self._keys = [keys for keys, _ in queues]
        self._keys_by_place = {place: keys for keys in self._keys for place in keys.places}
        self._router = Router(self._session, self._key, partitions)
        split = [keys.queue for keys in self._keys if keys.name in partitions]
        self._mover = JobMover(self._session, self._key, partitions, split) if split else None
        self._move_at = 0.0
        pool, key = self._session.pool, self._key
        self._publisher = (
            PartitionedPublisher(pool, address, key, self._router) if partitions else Publisher(pool, address, key)
        )
        self._cancels = Cancels(self._session, self._keys)
        self._subscriber = subscriber_of(self._session)
        self.schedules: Final = RedisSchedules(self._session, self._key, options.namespace, self._subscriber)
        self.history: Final = RedisHistory(self._session, self._key, options.namespace)
        self.payloads: Final = RedisEndedPayloads(self._session, self._own_homes, self._subscriber)
        self._limits = RedisLimiter(self._session, self._keys, lease=options.lease)
        self._source = self._claim_source(queues)
        self._refusals: dict[str, Refusal] = {}

    @abstractmethod
    def _key(self, queue: str) -> K:
        """The keys of a queue."""

    def _homes(self, queues: Iterable[str]) -> list[K]:
        """The keys of queues, of each partition where they have some."""
        return [self._key(home) for queue in queues for home in self._partitions.homes(queue)]

    async def _own_homes(self) -> Sequence[QueueKeys]:
        return self._keys

    async def _fresh_epoch(self, keys: K) -> str:
        """An epoch for a queue that has none."""
        return await fresh_epoch(self._session, keys, self._key(keys.name))

    async def _move(self, wait: float) -> float:
        """Move jobs to their partitions; ``wait`` are the seconds after which `promote` is called again."""
        if self._mover is None:
            return wait
        if (now := monotonic()) >= self._move_at:
            for queue in {keys.name for keys in self._keys if keys.name in self._partitions}:
                with suppress(Unreachable):  # a partition learns the numbers when its server is back
                    await self._router.sizes(queue)
            self._move_at = now + await self._mover.move()
        return min(wait, max(0.0, self._move_at - now))

    @abstractmethod
    def _claim_source(self, queues: Sequence[tuple[K, int | None]]) -> I:
        """The claim source of the mode."""

    async def open(self) -> None:
        uptime = await self._session.greet()
        # After a restart of the server every worker gets one lease to renew before any lease expires.
        self._source.rest(max(0.0, self._options.lease - uptime))

    async def join(self, worker_id: str) -> None:
        self._name_worker(worker_id)
        if not self._keys:
            raise ConfigurationError("there is no queue to work on: register a handler, or set STREAMWORKER_QUEUES")
        away: list[str] = []
        spoilt: dict[str, str] = {}
        for keys in self._keys:
            try:
                problem = await self._prepare(keys)
            except Unreachable as error:
                away.append(keys.queue)  # it is prepared when its node is back
                if not self._session.address.spread or len(away) == len(self._keys):
                    raise
                log.error("node_away", queues=[keys.queue], error=str(error))
                continue
            if problem:
                spoilt[keys.queue] = problem
        if spoilt and len(spoilt) + len(away) == len(self._keys):
            raise ConfigurationError(next(iter(spoilt.values())))
        for queue, problem in spoilt.items():
            log.error("queue_unusable", queue=queue, error=problem, hint="other queues are worked on meanwhile")

    def _name_worker(self, worker_id: str) -> None:
        """Claim under this name from now on."""
        self._source.consumer = worker_id
        self._session.named(worker_id)

    async def _prepare(self, keys: K) -> str:
        """Create what a queue needs; returns which of its keys cannot be used, empty if all can.

        Raises:
            ConfigurationError: no worker may start with this queue.
        """
        try:
            if keys.name in self._partitions:
                await self._router.sizes(keys.name)
            problem = await self._create(keys)
            if not problem and self._options.fair_weights:
                await self._weigh(keys)
            return problem
        except StreamworkerError as error:
            if not _of_wrong_type(error):
                raise
            return f"a key of the queue {keys.queue} has a wrong type (see streamworker check): rename or delete it"

    async def _note_lease(self, keys: K, milliseconds: int) -> None:
        """Store this worker's lease with the queue; 0 removes it."""
        await self._session.run(scripts.LEASE, [keys.meta], [self._source.consumer, milliseconds])

    async def _forget_lease(self, keys: K) -> None:
        """Remove this worker's lease from the queue. A queue that is spoilt has none."""
        try:
            await self._note_lease(keys, 0)
        except StreamworkerError as error:
            if not _of_wrong_type(error):
                raise

    @abstractmethod
    async def _create(self, keys: K) -> str:
        """`_prepare`, but for the weights of tenants."""

    async def close(self) -> None:
        await self._subscriber.close()
        await self._source.close()
        await self._session.close()

    @property
    def _name(self) -> str:
        """Key of this worker's heartbeat."""
        return worker_key(self._options.namespace, self._source.consumer)

    @abstractmethod
    def _renewals(self) -> tuple[scripts.LuaScript, list[ScriptCall]]:
        """The script that renews this worker's leases, and each call of it."""

    def standby(self, longest: float) -> bytes | None:
        script, calls = self._renewals()
        return standby(
            self._session.address,
            script,
            calls,
            self._name,
            permits=[keys.permits for keys in self._keys],
            worker=self._source.consumer,
            lease=self._options.lease,
            longest=longest,
        )

    async def _weigh(self, keys: K) -> None:
        """Store the weights of tenants, as the worker that started last knows them."""
        pairs = [part for tenant, weight in self._options.fair_weights for part in (f"weight:{tenant}", repr(weight))]
        await self._session.ask("HSET", keys.fair, *pairs)

    @property
    def _heartbeat_ms(self) -> int:
        """How long a heartbeat lives."""
        return max(1000, int(self._options.lease * 1000))

    async def publish(self, jobs: Sequence[PackedJob]) -> list[Enqueued]:
        return await self._publisher.publish(jobs)

    @property
    def refusals(self) -> Mapping[str, Refusal]:
        return self._refusals

    async def settle(self, items: Sequence[SettleRequest]) -> list[Settled]:
        await self._session.fresh()
        self._refusals = {}
        spread = self._session.address.spread
        with self._session.watched():
            answers = await settle(self._sender(), self._keys_by_place, items, self._refusals, spread=spread)
        if self._refusals:
            self._source.turns.refused(self._refusals)
        if self._mover is not None:
            await self._forget_cancelled(items, answers)
        return answers

    async def _forget_cancelled(self, items: Sequence[SettleRequest], answers: Sequence[Settled]) -> None:
        """Delete the marks of cancelled jobs that have ended from the partitions in which they were not."""
        for item, answer in zip(items, answers, strict=True):
            if type(item.verdict) is Drop and answer is Settled.SETTLED and item.claim.queue in self._partitions:
                for keys in self._homes([item.claim.queue]):
                    with suppress(StreamworkerError):  # it expires
                        await uncancel(self._session, keys, item.job_id)

    async def emit(self, batches: Sequence[OutputBatch]) -> list[Settled | None]:
        """`Outputs.emit`."""
        await self._session.fresh()
        with self._session.watched():
            return await emit(self._sender(), self._keys_by_place, batches, spread=self._session.address.spread)

    def output(
        self, queues: Sequence[str], job_id: str, *, log: bool = False
    ) -> AbstractAsyncContextManager[OutputReader]:
        return reading(self._session, self._subscriber, self._homes(queues), job_id, log=log)

    @abstractmethod
    def _sender(self) -> ClaimSettlement:
        """Settles claims of this worker."""

    async def offer_tick(self, tick: CronTick) -> CronTickResult:
        return await self._publisher.offer_tick(tick)

    async def begin(self, queue: str, jobs: Sequence[tuple[str, str, bool]]) -> list[bool]:
        """`HeldKeys.begin`."""
        keys = self._key(queue)
        names = [keys.cancelled]
        args: list[Any] = []
        for key, job_id, free in jobs:
            names += (keys.key(key), keys.held(job_id))
            args += (job_id, int(free))
        return [bool(each) for each in await self._session.run(scripts.BEGIN, names, args)]

    async def clock(self, queue: str) -> float:
        return int(await self._session.run(scripts.CLOCK, [self._key(queue).meta], [])) / 1000

    async def claim(
        self,
        limit: int,
        wait: float,
        running: Collection[Claim],
        ended: Callable[[str], int] = none_ended,
        shut: Collection[str] = (),
    ) -> list[Claim]:
        """`Broker.claim`. The call after one whose reply may be lost returns what that one claimed."""
        if self._source.reply_lost:
            found = await self.own_pending(running)
            self._source.reply_lost = False
            if found:
                return found
        self._source.bound(ended, shut)
        try:
            return await self._judged(await self._source.claim(limit, wait, running))
        except Exception:
            self._source.reply_lost = True
            raise

    async def _judged(self, claims: list[Claim]) -> list[Claim]:
        """New claims, with the cancelled ones marked."""
        return await self._cancels.judged(claims, self._source.marked)

    @abstractmethod
    async def own_pending(self, running: Collection[Claim]) -> list[Claim]:
        """`Consumer.own_pending`."""

    async def _confirmed(self, script: scripts.LuaScript, names: Sequence[str], args: Sequence[Any]) -> bool:
        """Run a script that counts a delivery; whether it did is found like a claim if its reply is lost."""
        try:
            return bool(await self._session.run(script, names, args))
        except Exception:
            self._source.reply_lost = True
            raise

    async def look_again(self) -> None:
        await self._source.look_again()

    async def cancelled(self, claims: Collection[Claim]) -> list[Claim]:
        return await self._cancels.find(claims)

    async def cancel(self, queue: str, job_id: str) -> bool:
        session = self._session
        return await cancel_in(
            self._homes([queue]),
            lambda keys: cancel(session, keys, job_id),
            lambda keys: uncancel(session, keys, job_id),
        )

    async def dispose(self, queue: str, job_id: str, body: bytes) -> None:
        await dispose(self._session, self._key(queue), job_id, body)

    async def pass_on(self, queue: str, order: str, job_id: str) -> None:
        for keys in self._homes([queue]):
            await pass_on(self._session, keys, order, job_id)

    def ended(self, queues: Sequence[str], job_id: str) -> AbstractAsyncContextManager[ResultWaiter]:
        return waiting(self._session, self._subscriber, self._homes(queues), job_id)

    async def progress(self, told: Mapping[str, Progress], ended: Collection[str]) -> None:
        args: list[Any] = [self._heartbeat_ms, len(ended), *(PROGRESS + job_id for job_id in ended)]
        for job_id, word in told.items():
            args += (PROGRESS + job_id, msgspec.json.encode(word))
        await self._session.in_thread(scripts.PROGRESS, [self._name], args)

    async def beat(self, report: dict[str, str | int | float]) -> None:
        args: list[Any] = [self._heartbeat_ms, *chain.from_iterable(report.items())]
        await self._session.in_thread(scripts.BEAT, [self._name], args)

    async def leave_thread(self) -> None:
        await self._session.leave_thread()

    async def turns(self, queue: str, jobs: Sequence[tuple[str, str]]) -> list[bool]:
        """`OrderKeys.turns`."""
        found = await self._session.ask("HMGET", self._key(queue).order, *(key for key, _ in jobs))
        return [holder == job_id.encode() for holder, (_, job_id) in zip(found, jobs, strict=True)]

    async def acquire(
        self, queue: str, requests: Sequence[AcquireRequest], released: Sequence[Permit]
    ) -> list[AcquireResult]:
        """`Limiter.acquire`."""
        return await self._limits.acquire(self._source.consumer, queue, requests, released)

    async def renew_permits(self, permits: Collection[Permit]) -> None:
        """`Limiter.renew_permits`."""
        await self._limits.renew_permits(permits)

    async def listen(self, parked: Callable[[float], None], cancelled: Callable[[], None] = lambda: None) -> None:

        def notified(channel: bytes) -> None:
            self._cancels.notified(channel)
            cancelled()

        await listen(self._subscriber, [keys.due for keys in self._keys], parked, self._source, notified)

    @property
    def reconnects(self) -> int:
        return self._session.reconnects()


def _of_wrong_type(error: StreamworkerError) -> bool:
    """Whether the server refused a command because a key of the queue has another type."""
    return reaction_to(error.__cause__ or error) is Reaction.KEY


PROMOTE_BATCH: Final = 500
"""Most due jobs of one script call."""
IDLE_TICK: Final = 5.0
"""Most seconds between looks at the due sets; notifications announce jobs that other processes park."""
REFUSED_TICK: Final = 1.0
"""Seconds before due jobs that could not be moved are offered again."""


async def promote(session: Session, queues: Sequence[QueueKeys]) -> float:
    """Move due jobs behind the ready ones; returns the seconds after which it must be called again."""
    # All queues in one call, unless a cluster keeps them in different slots.
    together = [[keys] for keys in queues] if session.address.spread else [queues] if queues else []
    waits: list[float] = []
    failure: Unreachable | None = None
    for group in together:
        try:
            waits.append(await _promote(session, group))
        except Unreachable as error:  # a node of a cluster: jobs on the other nodes are promoted all the same
            failure = error
    if failure is not None and not waits:
        raise failure
    return min([*waits, *([REFUSED_TICK] if failure is not None else [])], default=IDLE_TICK)


async def _promote(session: Session, queues: Sequence[QueueKeys]) -> float:
    names = [name for keys in queues for name in (keys.due, keys.bodies, *keys.places)]
    wait = IDLE_TICK
    reply = await session.run(scripts.PROMOTE, names, [PROMOTE_BATCH, queues[0].shape])
    for keys, (moved, soonest, refused) in zip(queues, reply, strict=True):
        if refused:  # a key of a wrong type, or no memory: the other queues are promoted all the same
            log.error("due_jobs_stuck", queue=keys.queue, error=refused.decode(errors="replace"))
            wait = min(wait, REFUSED_TICK)
        elif moved >= PROMOTE_BATCH:
            wait = 0.0
        elif soonest >= 0:
            wait = min(wait, soonest / 1000)
    return wait


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


class StandbyServer(msgspec.Struct, frozen=True):
    """One server: its login, and the commands for it.

    Attributes:
        login: as `RedisAddress.bare` returns it.
        commands: each a list of words, or (index of a script, keys, arguments), or (index of a script, keys, arguments,
            command that names more keys; the script runs if it names any).
    """

    login: dict[str, Any]
    commands: list[list[Any]]


MOST_LIMITS: Final = 1000
"""Most limits of a queue whose permits the renewing process looks through."""


def standby(
    address: RedisAddress,
    script: scripts.LuaScript,
    calls: Sequence[ScriptCall],
    heartbeat: str,
    *,
    permits: Sequence[str],
    worker: str,
    lease: float,
    longest: float,
) -> bytes | None:
    """Commands of the renewing process, as a line of JSON; ``None`` if only redis-py can log in.

    Args:
        address: the server.
        script: renews leases.
        calls: each call of the script.
        heartbeat: key of the worker's heartbeat, which is prolonged too.
        permits: index of each queue's permits, which are renewed too.
        worker: id of the worker that holds them.
        lease: seconds.
        longest: seconds of silence after which the worker counts as hung for good.
    """
    commands: list[tuple[str, list[Any]]] = [(keys[0], [0, keys, args]) for keys, args in calls]
    commands.append((heartbeat, ["PEXPIRE", heartbeat, max(1000, int(lease * 1000))]))
    mine = [worker, int(lease * 1000)]
    commands += [(key, [1, [key], mine, ["ZRANGE", key, -MOST_LIMITS, -1]]) for key in permits]  # leases come first
    servers: dict[object, StandbyServer] = {}
    for key, command in commands:
        home = address.home(key)
        server = servers.get(home)
        if server is None:
            login = (address if home is None else address.at(home)).bare()
            if login is None:
                return None
            server = servers[home] = StandbyServer(login, [])
        server.commands.append(command)
    told = {
        "lease": lease,
        "longest": longest,
        "scripts": [script.text, scripts.RETAIN_ALL.text],
        "servers": [{**server.login, "commands": server.commands} for server in servers.values()],
    }
    return msgspec.json.encode(told)

"""What the brokers of both modes share: everything that does not depend on what the jobs of a worker lie in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Generic

import msgspec
from typing_extensions import TypeVar

from streamworker.broker import Hearing, Refusal, Tick, Ticked, scripts
from streamworker.broker.bell import listen
from streamworker.broker.cancels import Cancels, cancel
from streamworker.broker.client import Address
from streamworker.broker.ears import Ears
from streamworker.broker.intakes import Intakes
from streamworker.broker.keys import QueueKeys, worker_key
from streamworker.broker.limits import Limiter
from streamworker.broker.link import Link
from streamworker.broker.publish import Publisher
from streamworker.broker.settle import Refusals
from streamworker.broker.taking import Taking, none_ended
from streamworker.broker.waiting import waiting
from streamworker.job import Claim, Enqueued, Outgoing
from streamworker.limits import Answer, Asking, Hold
from streamworker.policy import SUSPECT_DELIVERIES
from streamworker.progress import Progress

RENEW_BATCH: Final = 500
"""Claims one script call renews."""

K = TypeVar("K", bound=QueueKeys)
I = TypeVar("I", bound=Taking | Intakes)  # noqa: E741 - K is for keys, I for intake


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a broker is told.

    Attributes:
        queues: (name, cap) in the order they are taken; a cap bounds what one worker runs of the queue.
        namespace: goes before every key, as it is; but not before the lists that producers push to.
        lease: seconds a claim lives unrenewed.
        weighted: weighted order of levels instead of strict order.
        alone_from: the delivery from which on a job runs alone.
        slots: jobs that run at once; suspects that do not run alone fill at most half of them.
    """

    queues: tuple[tuple[str, int | None], ...]
    namespace: str = ""
    lease: float = 15.0
    weighted: bool = False
    alone_from: int = SUSPECT_DELIVERIES + 1
    slots: int = 10


class Serving(Generic[K, I]):
    """Half of the `Broker` protocol; one instance serves one worker, or producers.

    Args:
        address: the server.
        options: see there.
    """

    def __init__(self, address: Address, options: Options) -> None:
        self._options: Final = options
        self._link = Link(address)
        queues = [(self._key(name), cap) for name, cap in options.queues]
        self._keys = [keys for keys, _ in queues]
        self._homes = {place: keys for keys in self._keys for place in keys.places}
        self._publisher = Publisher(self._link.wires, address, self._key)
        self._cancels = Cancels(self._link, self._keys)
        self._ears = Ears(address)
        self._limits = Limiter(self._link, self._keys, lease=options.lease)
        self._intake = self._take(queues)
        self._intake.slots = options.slots
        self._refusals = Refusals()

    def _key(self, queue: str) -> K:
        """The keys of a queue."""
        raise NotImplementedError

    def _take(self, queues: Sequence[tuple[K, int | None]]) -> I:
        """The way to come to jobs."""
        raise NotImplementedError

    async def open(self) -> None:
        """See `Broker.open`."""
        uptime = await self._link.greet()
        # After a restart everyone alive gets one lease to renew before anybody is taken for dead.
        self._intake.rest(max(0.0, self._options.lease - uptime))

    async def close(self) -> None:
        """See `Broker.close`."""
        await self._ears.close()
        await self._intake.close()
        await self._link.close()

    @property
    def _name(self) -> str:
        """The key that says that this worker lives."""
        return worker_key(self._options.namespace, self._intake.consumer)

    async def publish(self, jobs: Sequence[Outgoing]) -> list[Enqueued]:
        """See `Broker.publish`."""
        return await self._publisher.publish(jobs)

    @property
    def refusals(self) -> Mapping[str, Refusal]:
        """See `Broker.refusals`."""
        return self._refusals.why

    def _refused(self) -> Refusals:
        self._refusals = Refusals()
        return self._refusals

    async def propose(self, tick: Tick) -> Ticked:
        """See `Broker.propose`."""
        return await self._publisher.propose(tick)

    async def clock(self, queue: str) -> float:
        """See `Broker.clock`."""
        return int(await self._link.run(scripts.CLOCK, [self._key(queue).meta], [])) / 1000

    async def claim(
        self,
        limit: int,
        wait: float,
        running: Collection[Claim],
        ended: Callable[[str], int] = none_ended,
        shut: Collection[str] = (),
    ) -> list[Claim]:
        """See `Broker.claim`."""
        return await self._cancels.judged(
            await self._intake.claim(limit, wait, running, ended, shut), self._intake.marked
        )

    async def look_again(self) -> None:
        """See `Broker.look_again`."""
        await self._intake.look_again()

    def cancelled(self, claims: Collection[Claim]) -> list[Claim]:
        """See `Broker.cancelled`."""
        return self._cancels.find(claims)

    async def cancel(self, queue: str, job_id: str) -> bool:
        """See `Broker.cancel`."""
        return await cancel(self._link, self._key(queue), job_id)

    def ended(self, queues: Sequence[str], job_id: str) -> AbstractAsyncContextManager[Hearing]:
        """See `Broker.ended`."""
        return waiting(self._link, self._ears, [self._key(queue) for queue in queues], job_id)

    def progress(self, told: Mapping[str, Progress], ended: Collection[str]) -> None:
        """See `Broker.progress`."""
        self._link.progress(self._name, self._options.lease, told, ended)

    def beat(self, report: dict[str, str | int | float]) -> None:
        """See `Broker.beat`."""
        self._link.beat(self._name, self._options.lease, report)

    async def limit(self, queue: str, asking: Sequence[Asking], leaving: Sequence[Hold]) -> list[Answer]:
        """See `Broker.limit`."""
        return await self._limits.ask(self._intake.consumer, queue, asking, leaving)

    def retain(self, holds: Collection[Hold]) -> None:
        """See `Broker.retain`."""
        self._limits.retain(holds)

    async def listen(self, parked: Callable[[float], None], cancelled: Callable[[], None] = lambda: None) -> None:
        """See `Broker.listen`."""

        def told(channel: bytes) -> None:
            self._cancels.rang(channel)
            cancelled()

        await listen(self._link.address, [keys.due for keys in self._keys], parked, self._intake, told)

    @property
    def reconnects(self) -> int:
        """See `Broker.reconnects`."""
        return self._link.reconnects()

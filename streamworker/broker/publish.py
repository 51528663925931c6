"""Storing new jobs: one plain command where that is enough, one script per queue for everything else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import Any, Final

import anyio
from redis import exceptions as redis_errors

from streamworker.broker import Tick, Ticked, scripts
from streamworker.broker.client import understood
from streamworker.broker.forms import NotExecuted
from streamworker.broker.keys import QueueKeys
from streamworker.broker.settle import due_member
from streamworker.errors import PublishUncertain, Unreachable
from streamworker.job import LEVELS, Enqueued, Level, Outgoing

BATCH: Final = 1000
"""Most jobs of one round trip."""
TRIES: Final = 3
IN_FORCE: Final = 180.0
"""Seconds a schedule stays in force after its last proposal: workers propose at least once a minute."""


class Publisher:
    """Stores jobs of any queue. Only jobs with a deduplication key are sent again after a lost reply.

    Args:
        client: what to send with.
        address: whose, for errors.
        keys: the keys of a queue, by its name.
    """

    def __init__(self, client: scripts.AsyncCaller, address: object, keys: Callable[[str], QueueKeys]) -> None:
        self._client = client
        self._address = address
        self._keys = keys

    async def publish(self, jobs: Sequence[Outgoing]) -> list[Enqueued]:
        """See `Broker.publish`."""
        if len(jobs) == 1 and _is_plain(jobs[0]):
            job = jobs[0]
            command = self._keys(job.queue).adding(job.level, job.body)
            await self._send(lambda: self._client.execute_command(*command), 1)
            return [Enqueued(job.id, new=True)]
        by_queue: dict[str, list[int]] = {}
        for index, job in enumerate(jobs):
            by_queue.setdefault(job.queue, []).append(index)
        answers: dict[int, Enqueued] = {}
        for queue, indexes in by_queue.items():
            for start in range(0, len(indexes), BATCH):
                batch = indexes[start : start + BATCH]
                some = [jobs[index] for index in batch]
                store = self._store_plain if all(map(_is_plain, some)) else self._store
                answers.update(zip(batch, await store(self._keys(queue), some), strict=True))
        return [answers[index] for index in range(len(jobs))]

    async def propose(self, tick: Tick) -> Ticked:
        """See `Broker.propose`. Sending it again is safe."""
        keys = self._keys(tick.queue)
        args: list[str | bytes | int | float] = [tick.schedule, round(tick.at * 1000), keys.shape, tick.body, tick.name]
        args += ["" if each is None else round(each * 1000) for each in (tick.before, tick.now)]
        args.append(round(IN_FORCE * 1000))
        names = [keys.crons, keys.ready(tick.level)]
        early, added, now = await self._send(lambda: scripts.CRON(self._client, names, args), TRIES)
        return Ticked(early / 1000, bool(added), now / 1000)

    async def _store_plain(self, keys: QueueKeys, jobs: list[Outgoing]) -> list[Enqueued]:
        bodies: dict[Level, list[bytes]] = {level: [] for level in LEVELS}
        for job in jobs:
            bodies[job.level].append(job.body)
        args = [keys.shape, *map(len, bodies.values()), *chain.from_iterable(bodies.values())]
        await self._send(lambda: scripts.STORE(self._client, keys.places, args), 1)
        return [Enqueued(job.id, new=True) for job in jobs]

    async def _store(self, keys: QueueKeys, jobs: list[Outgoing]) -> list[Enqueued]:
        names = [*keys.places, keys.due, keys.bodies]
        args: list[Any] = [keys.shape]
        for job in jobs:
            key, member, when = 0, "", ""
            if job.key is not None:
                names.append(keys.key(job.key))
                key = len(names)
            if job.delay is not None or job.run_at is not None:
                member = due_member(job.level, job.id)
                when = (
                    f"+{max(0, round(job.delay * 1000))}"
                    if job.delay is not None
                    else str(max(0, round((job.run_at or 0) * 1000)))
                )
            args += (
                LEVELS.index(job.level) + 1,
                when,
                member,
                key,
                max(1, round(job.key_ttl * 1000)),
                job.id,
                job.body,
            )
        keyed = all(job.key is not None for job in jobs)
        reply = await self._send(lambda: scripts.PUBLISH(self._client, names, args), TRIES if keyed else 1)
        return [
            Enqueued(job.id, new=True) if answer == 1 else Enqueued(answer.decode(errors="replace"), new=False)
            for job, answer in zip(jobs, reply, strict=True)
        ]

    async def _send(self, command: Callable[[], Awaitable[Any]], tries: int) -> Any:
        """Send, and send again only what may be repeated; a lost reply is not a server that is not there."""
        for attempt in range(1, tries + 1):
            try:
                with understood(self._address):
                    return await command()
            except Unreachable as error:
                if attempt < tries:
                    await anyio.sleep(0.05 * attempt)
                elif _was_sent(error.__cause__):
                    raise PublishUncertain(
                        f"the connection to Redis at {self._address} broke before it answered, the job may or may "
                        "not be queued: enqueue it again with key= if it must not run twice"
                    ) from error
                else:
                    raise
        raise AssertionError("unreachable: the loop returns or raises")


def _was_sent(cause: BaseException | None) -> bool:
    """Whether a command can have been run: not if no connection came about, nor if a server said no."""
    if isinstance(cause, NotExecuted | redis_errors.ResponseError | redis_errors.BusyLoadingError):
        return False
    return not (isinstance(cause, redis_errors.ConnectionError) and "onnecting to" in str(cause))


def _is_plain(job: Outgoing) -> bool:
    return job.key is None and job.delay is None and job.run_at is None

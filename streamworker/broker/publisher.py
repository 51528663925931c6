"""Publisher: stores jobs of any queue, from producers, schedules and the relay."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Final

import anyio
import msgspec
from redis import exceptions as redis_errors

from streamworker.broker import scripts
from streamworker.broker.cancel import LIFE
from streamworker.broker.keys import HELD_MEMBER, QueueKeys, due_member
from streamworker.broker.redis.reactions import understood
from streamworker.broker.redis.url import NotExecuted
from streamworker.errors import PublishUncertain, Unreachable
from streamworker.job import LEVELS, CronTick, CronTickResult, Enqueued, Level, PackedJob
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.broker")

BATCH: Final = 1000
"""Most jobs of one call."""
TRIES: Final = 3
IN_FORCE: Final = 180.0
"""Seconds a schedule stays in force after its last offer: workers offer at least once a minute."""


class Publisher:
    """Stores jobs of any queue. Only jobs with a deduplication key are sent again after a lost reply.

    Args:
        client: sends the commands.
        address: names the server in errors.
        keys: the keys of a queue, by its name.
    """

    def __init__(self, client: scripts.AsyncCaller, address: object, keys: Callable[[str], QueueKeys]) -> None:
        self._client = client
        self._address = address
        self._keys = keys

    async def publish(self, jobs: Sequence[PackedJob]) -> list[Enqueued]:
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
            for batch in _batches(indexes, jobs):
                some = [jobs[index] for index in batch]
                store = self._store_plain if all(map(_is_plain, some)) else self._store
                if some[0].held is not None:
                    store = self._store_held
                answers.update(zip(batch, await store(self._keys(queue), some), strict=True))
        return [answers[index] for index in range(len(jobs))]

    async def offer_tick(self, tick: CronTick) -> CronTickResult:
        """`CronStore.offer_tick`. Repeating it is safe."""
        keys = self._keys(tick.queue)
        args: list[str | bytes | int | float] = [tick.schedule, round(tick.at * 1000), keys.shape, tick.body, tick.name]
        args += ["" if each is None else round(each * 1000) for each in (tick.before, tick.now)]
        args.append(round(IN_FORCE * 1000))
        names = [keys.crons, keys.ready(tick.level)]
        early, added, now = await self._send(lambda: scripts.CRON(self._client, names, args), TRIES)
        return CronTickResult(early / 1000, bool(added), now / 1000)

    async def _store_plain(self, keys: QueueKeys, jobs: list[PackedJob]) -> list[Enqueued]:
        bodies: dict[Level, list[bytes]] = {level: [] for level in LEVELS}
        for job in jobs:
            bodies[job.level].append(job.body)
        args = [keys.shape, *map(len, bodies.values()), *chain.from_iterable(bodies.values())]
        await self._send(lambda: scripts.STORE(self._client, keys.places, args), 1)
        return [Enqueued(job.id, new=True) for job in jobs]

    async def _store(self, keys: QueueKeys, jobs: list[PackedJob]) -> list[Enqueued]:
        names = [*keys.places, keys.due, keys.bodies]
        args: list[Any] = [keys.shape]
        for job in jobs:
            key, member, when = 0, "", ""
            if job.key is not None:
                names.append(keys.key(job.key))
                key = len(names)
            if job.delay is not None or job.run_at is not None:
                member = due_member(job.level, job.id)
                when = _due(job)
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

    async def _store_held(self, keys: QueueKeys, jobs: list[PackedJob]) -> list[Enqueued]:
        """Store jobs whose deduplication keys are held until they start or end."""
        names = [*keys.places, keys.due, keys.bodies, keys.cancelled, keys.meta]
        args: list[Any] = [keys.shape, LIFE * 1000]
        for job in jobs:
            held = job.held
            if held is None or job.key is None:
                raise AssertionError("only jobs with such a key are stored so")
            names += (keys.key(job.key), keys.held(job.id))
            args += (
                job.level,
                _due(job),
                max(1, round(held.life * 1000)),
                job.id,
                int(held.replace),
                round(held.debounce * 1000),
                round(held.debounce_max * 1000),
                len(b'{"id":' + msgspec.json.encode(job.id)),
                job.body,
                HELD_MEMBER,
            )
        reply = await self._send(lambda: scripts.UNIQUE(self._client, names, args), TRIES)
        return [
            _answer(job.id, word, name.decode(errors="replace"))
            for job, word, name in zip(jobs, reply[::2], reply[1::2], strict=True)
        ]

    async def _send(self, command: Callable[[], Awaitable[Any]], tries: int) -> Any:
        """Send up to ``tries`` times; a lost reply raises another error than a server that does not answer."""
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


def _batches(indexes: list[int], jobs: Sequence[PackedJob]) -> Iterable[list[int]]:
    """The jobs of a queue for a script each: up to a thousand, with held keys up to a hundred."""
    held = [index for index in indexes if jobs[index].held is not None]
    rest = [index for index in indexes if jobs[index].held is None] if held else indexes
    for some, most in ((rest, BATCH), (held, BATCH // 10)):
        for start in range(0, len(some), most):
            yield some[start : start + most]


def _due(job: PackedJob) -> str:
    """When a job is due, as scripts take it: "" now, "+ms" from now, "ms" since the epoch."""
    if job.delay is not None:
        return f"+{max(0, round(job.delay * 1000))}"
    return "" if job.run_at is None else str(max(0, round(job.run_at * 1000)))


def _answer(job_id: str, word: bytes, name: str) -> Enqueued:
    match word:
        case b"earlier":
            return Enqueued(name, new=False)
        case b"rewritten":
            return Enqueued(name, new=False, replaced=name)
        case b"superseded":
            return Enqueued(job_id, new=True, replaced=name)
    return Enqueued(job_id, new=True)


def _was_sent(cause: BaseException | None) -> bool:
    """Whether a command may have run: not if no connection was made, nor if the server refused it."""
    if isinstance(cause, NotExecuted | redis_errors.ResponseError | redis_errors.BusyLoadingError):
        return False
    return not (isinstance(cause, redis_errors.ConnectionError) and "onnecting to" in str(cause))


def _is_plain(job: PackedJob) -> bool:
    return job.key is None and job.delay is None and job.run_at is None and not job.lined

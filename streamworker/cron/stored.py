"""Schedules that are kept as data: what is stored of them, and `app.schedules`, which changes and lists them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import anyio
import msgspec

from streamworker import codec
from streamworker.broker import ScheduleStore
from streamworker.cron import Missed, Schedule, checked
from streamworker.encryption import PLAIN, Sealer
from streamworker.errors import InvalidJob, StreamworkerError, UsageError
from streamworker.handlers import Handlers
from streamworker.job import Job, Level, ScheduleEntry, ScheduleTick
from streamworker.loops import LookLoop
from streamworker.payload import AnyPayload
from streamworker.postgres import Archive
from streamworker.producer import make_job
from streamworker.relay import KeptSchedule, ScheduleLedger
from streamworker.telemetry.logs import get_logger

log = get_logger("streamworker.cron")

_LONGEST_NAME: Final = 200
"""Characters of the name of a schedule that is kept as data."""


class StoredSchedule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A schedule that is kept as data: what Redis stores of it.

    Attributes:
        name: unique among the schedules of an app.
        expression: as for `Calendar.cron`.
        tz: the time zone of the expression.
        missed: which missed ticks run.
        queue: where its jobs go.
        kind: of its jobs; an app may not know it.
        level: of its jobs.
        payload: of its jobs, a JSON object.
        headers: of its jobs.
        order_key: of its jobs.
        fair_key: of its jobs.
        paused: by whom and when it was paused; empty while it ticks.
        by: who changed it last.
        changed_at: when that was, in epoch seconds.
    """

    name: str
    expression: str
    tz: str = "UTC"
    missed: Missed = "last"
    queue: str
    kind: str
    level: Level = "normal"
    payload: msgspec.Raw = msgspec.Raw(b"{}")
    headers: dict[str, Any] | None = None
    order_key: str | None = None
    fair_key: str | None = None
    paused: str = ""
    by: str = ""
    changed_at: float = 0.0

    def schedule(self) -> Schedule:
        """The same, as it ticks.

        Raises:
            ConfigurationError: the expression or the zone is not known here.
        """
        job = Job(
            id=codec.new_id(), queue=self.queue, kind=self.kind, payload=self.payload, level=self.level,
            created_at=datetime.now(UTC), headers=self.headers, order_key=self.order_key, fair_key=self.fair_key,
        )  # fmt: skip
        return checked(Schedule(self.name, self.expression, self.tz, self.missed, job))


class ScheduleState(msgspec.Struct, frozen=True):
    """A schedule that is kept as data, at the moment.

    Attributes:
        stored: what it is.
        next: epoch seconds of its next tick; ``None`` while it is paused.
        last: epoch seconds of its last tick; ``None`` if there was none.
        known: the app has a handler for its kind; ``None`` where no app is known.
    """

    stored: StoredSchedule
    next: float | None
    last: float | None
    known: bool | None


def stored_schedule(entry: ScheduleEntry) -> StoredSchedule:
    """The schedule of an entry.

    Raises:
        InvalidJob: it is none.
    """
    try:
        return msgspec.json.decode(entry.definition, type=StoredSchedule)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidJob(f"the schedule {entry.name} of {entry.queue} cannot be read: {error}") from None


class Schedules(Sequence[Schedule]):
    """The schedules of an app: as a sequence those in code (`Calendar.cron`); its methods serve those kept as data.

    Redis stores them beside their queue, and the ledger, where there is one, is their durable record. Every worker of
    that queue, and every relay, may offer their ticks; they hear of changes at once.

    Args:
        calendar: those in code.
        handlers: know kinds and the types of their payloads; ``None`` where no app is known.
        store: where the others are; raises if it is not open.
        max_bytes: the largest document of a job.
        sealer: seals their payloads.
    """

    def __init__(
        self,
        calendar: Sequence[Schedule],
        handlers: Handlers[Any] | None,
        store: Callable[[], ScheduleStore],
        max_bytes: Callable[[], int],
        sealer: Sealer = PLAIN,
    ) -> None:
        self._calendar, self._handlers, self._store, self._max_bytes = calendar, handlers, store, max_bytes
        self._sealer = sealer

    @property
    def store(self) -> ScheduleStore:
        """Where those are that are kept as data."""
        return self._store()

    def __len__(self) -> int:
        return len(self._calendar)

    def __getitem__(self, index: Any) -> Any:
        return self._calendar[index]

    async def put(
        self,
        name: str,
        expression: str,
        payload: AnyPayload | Job,
        /,
        *,
        tz: str = "UTC",
        missed: Missed = "last",
        by: str = "",
        queue: str | None = None,
        priority: str | int = "normal",
        headers: dict[str, Any] | None = None,
    ) -> None:
        """Store a schedule, or change the one of that name. Storing the same again changes no tick.

        Args:
            name: among the schedules of the app, those in code included.
            expression: as for `Calendar.cron`.
            payload: of its jobs; or a job, which has its own queue, priority and headers.
            tz: the time zone of the expression.
            missed: of ticks that were missed while no process could offer them, ``last`` runs the last one, once;
                ``skip`` none.
            by: who stores it, for those who look at it.
            queue: another queue than the payload's class names.
            priority: ``high``, ``normal``, ``low``, or a number.
            headers: of its jobs.

        Raises:
            ConfigurationError: the expression or the time zone makes no sense.
            UsageError: the name is that of a schedule in code, or of one on another queue; or an option makes no sense.
            InvalidJob: the payload does not fit the type of the kind's handler.
            Unreachable: no server answers.
        """
        job = payload
        if not isinstance(job, Job):
            job = make_job(job, queue=queue, priority=priority, headers=headers)
        self._check_name(name)
        await self._put(StoredSchedule(
            name=name, expression=expression, tz=tz, missed=missed, queue=job.queue, kind=job.kind, level=job.level,
            payload=msgspec.Raw(bytes(job.payload)), headers=job.headers, by=by, order_key=job.order_key,
            fair_key=job.fair_key,
        ))  # fmt: skip

    async def _put(self, stored: StoredSchedule) -> None:
        self._check_payload(stored)
        stored = self._sealed(stored)
        made = stored.schedule()
        self._packed(made.job)
        store, name, queue = self._store(), stored.name, stored.queue
        for _ in range(_TRIES):
            before = await self._found(name)
            if before is not None and before.queue != queue:
                raise UsageError(f"the schedule {name} is on the queue {before.queue}: remove it there first")
            now = await store.now(queue)
            old = stored_schedule(before) if before is not None else None
            paused = old.paused if old is not None else ""
            new = msgspec.structs.replace(stored, paused=paused, changed_at=now)
            same = old is not None and (old.expression, old.tz) == (stored.expression, stored.tz)
            entry = ScheduleEntry(queue, name, msgspec.json.encode(new), None if paused else made.next(now))
            if await store.put(entry, before.definition if before is not None else b"", keep=same):
                return
        raise StreamworkerError(f"the schedule {name} is being changed by others: try again")

    async def edit(self, name: str, /, *, by: str = "", **changes: Any) -> StoredSchedule:
        """Change some fields of a schedule (those of `StoredSchedule` but name, queue and kind).

        Raises:
            UsageError: there is no such schedule.
            ConfigurationError: the expression or the time zone makes no sense.
            InvalidJob: the payload does not fit the type of the kind's handler.
        """

        def change(old: StoredSchedule, now: float) -> StoredSchedule:
            new = msgspec.structs.replace(old, **changes, by=by, changed_at=now)
            self._check_payload(new)
            return self._sealed(new)

        return await self._change(name, change)

    async def pause(self, name: str, /, *, by: str = "") -> bool:
        """Stop its ticks until `resume`; those that fall into that time are not caught up. False if it is paused."""
        told = f"by {by}" if by else "paused"
        old = await self.get(name)
        await self._change(
            name, lambda old, now: msgspec.structs.replace(old, paused=old.paused or told, changed_at=now)
        )
        return not old.stored.paused

    async def resume(self, name: str, /) -> bool:
        """Let it tick again, from now on. False if it was not paused."""
        old = await self.get(name)
        await self._change(name, lambda old, now: msgspec.structs.replace(old, paused="", changed_at=now))
        return bool(old.stored.paused)

    async def run_now(self, name: str, /) -> str:
        """Enqueue its job once, beside its ticks; returns the job's id."""
        store = self._store()
        for _ in range(_TRIES):
            entry = await self._required(name)
            made = stored_schedule(entry).schedule()
            headers = {**(made.job.headers or {}), "cron": name}
            job = self._sealer.sealed_job(msgspec.structs.replace(made.job, id=codec.new_id(), headers=headers))
            tick = ScheduleTick(entry, job.level, self._packed(job), None, None)
            if (await store.tick(entry.queue, [tick]))[0]:
                return job.id
        raise StreamworkerError(f"the schedule {name} is being changed by others: try again")

    async def remove(self, name: str, /) -> bool:
        """Delete a schedule; jobs that it enqueued stay. False if there is none of that name."""
        for _ in range(_TRIES):
            entry = await self._found(name)
            if entry is None:
                return False
            gone = ScheduleEntry(entry.queue, name, b"", None)
            if await self._store().put(gone, entry.definition, keep=False):
                return True
        raise StreamworkerError(f"the schedule {name} is being changed by others: try again")

    async def get(self, name: str, /) -> ScheduleState:
        """One of them.

        Raises:
            UsageError: there is none of that name.
        """
        return self._state(await self._required(name))

    async def list(self) -> AsyncIterator[ScheduleState]:
        """All that are kept as data, queue by queue, the next to tick first. One that cannot be read is left out."""
        store = self._store()
        for queue in await store.queues():
            after: int | None = 0
            while after is not None:
                entries, after = await store.page(queue, after)
                for entry in entries:
                    yield self._state(entry)

    def _state(self, entry: ScheduleEntry) -> ScheduleState:
        stored = stored_schedule(entry)
        stored = msgspec.structs.replace(stored, payload=self._opened(stored))
        return ScheduleState(stored, entry.next, entry.last, self.knows(stored.kind, stored.queue))

    def knows(self, kind: str, queue: str) -> bool | None:
        """Whether the app has a handler for a kind; ``None`` where no app is known."""
        if self._handlers is None or not self._handlers.registrations:
            return None
        return self._handlers.handler_of(kind, queue) is not None

    async def _change(self, name: str, change: Callable[[StoredSchedule, float], StoredSchedule]) -> StoredSchedule:
        store = self._store()
        for _ in range(_TRIES):
            entry = await self._required(name)
            now, old = await store.now(entry.queue), stored_schedule(entry)
            new = change(old, now)
            made = new.schedule()
            same = (old.expression, old.tz, old.paused) == (new.expression, new.tz, new.paused)
            following = None if new.paused else made.next(now)
            changed = ScheduleEntry(entry.queue, name, msgspec.json.encode(new), following)
            if await store.put(changed, entry.definition, keep=same):
                return new
        raise StreamworkerError(f"the schedule {name} is being changed by others: try again")

    async def _required(self, name: str) -> ScheduleEntry:
        entry = await self._found(name)
        if entry is None:
            owner = " (the one of that name is code: change the app)" if self._in_code(name) else ""
            raise UsageError(f"there is no schedule {name!r} kept as data{owner}")
        return entry

    async def _found(self, name: str) -> ScheduleEntry | None:
        store = self._store()
        for queue in await store.queues():
            if (entry := await store.find(queue, name)) is not None:
                return entry
        return None

    def _in_code(self, name: str) -> bool:
        return any(each.name == name for each in self._calendar)

    def _check_name(self, name: str) -> None:
        if not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise UsageError(f"name={name[:50]!r} has to be 1 to {_LONGEST_NAME} printable characters")
        if self._in_code(name):
            raise UsageError(f"the schedule {name} is code (app.cron): give this one another name")

    def _sealed(self, stored: StoredSchedule) -> StoredSchedule:
        payload = self._sealer.scheduled_payload(stored.payload, stored.name, stored.kind)
        return msgspec.structs.replace(stored, payload=payload)

    def _opened(self, stored: StoredSchedule) -> msgspec.Raw:
        return self._sealer.shown_payload(stored.payload, "", stored.kind)

    def _packed(self, job: Job) -> bytes:
        return codec.pack(job, max_bytes=self._max_bytes(), key_ttl=1.0).body

    def _check_payload(self, stored: StoredSchedule) -> None:
        known = self._handlers.handler_of(stored.kind, stored.queue) if self._handlers is not None else None
        if known is None:
            return
        try:
            known.decode(self._opened(stored))
        except Exception as error:  # noqa: BLE001 - the user's own hooks run here
            type_ = known.payload
            raise InvalidJob(f"the payload is no {type_.__name__}: {codec.misfit(type_, error)}") from None


class DurableSchedules:
    """A `ScheduleStore` whose changes are in the ledger when they return.

    Args:
        store: where they tick from.
        archive: opens the ledger, the durable record; ``None`` where there is none.
    """

    def __init__(self, store: ScheduleStore, archive: Callable[[], Awaitable[Archive | None]]) -> None:
        self._store, self._archive = store, archive

    def __getattr__(self, name: str) -> Any:
        """Everything else is the store's."""
        return getattr(self._store, name)

    async def put(self, new: ScheduleEntry, before: bytes, *, keep: bool) -> bool:
        """Put; what is in Redis and not in the ledger yet, because PostgreSQL failed in between, a relay adds."""
        archive = await self._archive()
        done = await self._store.put(new, before, keep=keep)
        if done and archive is not None:
            await archive.schedules.keep([await _kept(self._store, new)])
        return done


async def _kept(store: ScheduleStore, entry: ScheduleEntry) -> KeptSchedule:
    if entry.definition:
        return KeptSchedule(entry.queue, entry.name, entry.definition, stored_schedule(entry).changed_at)
    return KeptSchedule(entry.queue, entry.name, None, await store.now(entry.queue))


class ScheduleMirror:
    """Compares the schedules of Redis with the ledger. Those that Redis lost come back, and changes that were made
    where no ledger is known are kept. The later change counts.

    Args:
        store: Redis.
        ledger: PostgreSQL.
        stopping: ends it; call `wake` with it.
    """

    def __init__(self, store: ScheduleStore, ledger: ScheduleLedger, stopping: anyio.Event) -> None:
        self._store, self._ledger = store, ledger
        self._suspects: set[str] = set()
        self._loop = LookLoop(stopping)

    def suspect(self, queue: str) -> None:
        """Redis may have lost what a queue had: compare it now."""
        self._suspects.add(queue)
        self.wake()

    def wake(self) -> None:
        """Look now."""
        self._loop.wake()

    async def run(self) -> None:
        """Compare until stopped; an error is logged and followed by a pause."""
        await self._loop.run(self.step, lambda error: log.error("schedules_not_compared", error=str(error)))

    async def step(self) -> float:
        """Compare the queues that are suspected; and, if it is this relay's turn, those whose numbers differ.

        Returns the seconds until the next look.
        """
        suspects, self._suspects = self._suspects, set()
        try:
            if (look := await self._ledger.look(COMPARE * 0.9, WHOLE)) is not None:
                for queue in {*look.counts, *await self._store.queues()}:
                    if look.whole or await self._store.count(queue) != look.counts.get(queue, 0):
                        suspects.add(queue)
            while suspects:
                await self.compare(next(iter(suspects)))
                suspects.pop()
        finally:
            self._suspects |= suspects
        return COMPARE

    async def compare(self, queue: str) -> None:
        """Compare the schedules of a queue."""
        there: dict[str, ScheduleEntry] = {}
        after: int | None = 0
        while after is not None:
            page, after = await self._store.page(queue, after)
            there |= {entry.name: entry for entry in page}
        known = await self._ledger.of(queue)
        removed = await self._store.removed(queue, [name for name in known if name not in there])
        now = await self._store.now(queue)
        newer = [KeptSchedule(queue, name, None, at) for name, at in removed.items() if known[name].changed_at < at]
        lost = {name: kept for name, kept in known.items() if kept.definition is not None and name not in there}
        for entry in there.values():
            made, kept = await _kept(self._store, entry), known.get(entry.name)
            if kept is None or made.changed_at > kept.changed_at:
                newer.append(made)
            elif kept.definition != entry.definition:
                await self._restore(kept, entry.definition, now)
        restored = [
            name for name, kept in lost.items()
            if removed.get(name, 0.0) <= kept.changed_at and await self._restore(kept, b"", now)
        ]  # fmt: skip
        if newer:
            await self._ledger.keep(newer)
        await self._store.forget_removed(queue, removed)
        if restored:
            log.warning("schedules_lost_by_redis", queue=queue, schedules=len(restored), hint="they are there again")

    async def _restore(self, kept: KeptSchedule, before: bytes, now: float) -> bool:
        entry = ScheduleEntry(kept.queue, kept.name, kept.definition or b"", None)
        if kept.definition is not None:
            try:
                stored = stored_schedule(entry)
                following = None if stored.paused else stored.schedule().next(now)
            except (StreamworkerError, StopIteration) as error:
                log.error("schedule_not_understood", schedule=kept.name, queue=kept.queue, error=str(error))
                return False
            entry = msgspec.structs.replace(entry, next=following)
        return await self._store.put(entry, before, keep=False)


COMPARE: Final = 5.0
"""Seconds between two looks whether Redis and the ledger have as many schedules; one relay of all looks."""
WHOLE: Final = 3600.0
"""Seconds between two comparisons of every schedule."""
_TRIES: Final = 5
"""Times a change is tried while others change the same schedule."""


class ScheduleRow(msgspec.Struct, frozen=True):
    """A schedule as operators see it; moments are RFC 3339, in its own time zone.

    Attributes:
        owner: ``code`` (`Calendar.cron`) or ``data``.
        last: its last tick; ``None`` if there was none.
        next: the next ones; empty while it is paused.
        paused: by whom; empty while it ticks.
        known: the app has a handler for its kind; ``None`` where no app is known.
        by: who changed it last; empty for one in code.
    """

    name: str
    queue: str
    kind: str
    expression: str
    tz: str
    missed: str
    last: str | None
    next: list[str]
    owner: str = "code"
    paused: str = ""
    known: bool | None = None
    by: str = ""

    @property
    def state(self) -> str:
        """What is not as it should be, in words; empty if it ticks."""
        return "; ".join(filter(None, [self.paused and "paused", "unknown kind" if self.known is False else ""]))


def schedule_row(
    schedule: Schedule, last: float | None, now: float, *, known: bool | None, kept: StoredSchedule | None = None
) -> ScheduleRow:
    """The row of a schedule.

    Args:
        schedule: as it ticks.
        last: epoch seconds of its last tick.
        now: epoch seconds.
        known: the app has a handler for its kind.
        kept: what is stored of it, if it is data.
    """
    job, paused = schedule.job, kept is not None and bool(kept.paused)
    upcoming = [] if paused else [at.isoformat() for at in schedule.upcoming(now, _NEXT)]
    told = None if last is None else schedule.moment(last).isoformat()
    made = ScheduleRow(
        schedule.name, job.queue, job.kind, schedule.expression, schedule.zone, schedule.missed, told, upcoming,
        known=known,
    )  # fmt: skip
    return made if kept is None else msgspec.structs.replace(made, owner="data", paused=kept.paused, by=kept.by)


_NEXT: Final = 3
"""Next ticks that are shown."""


class TickClock(Protocol):
    """What knows the last ticks of schedules in code, and the server's clock: an operator."""

    async def ticks(self, queue: str) -> dict[str, float]:
        """Schedule to epoch seconds of its last tick."""

    async def now(self) -> float:
        """The server's time, in epoch seconds."""


async def schedule_rows(clock: TickClock, schedules: Schedules) -> AsyncIterator[ScheduleRow]:
    """All schedules: those in code in the order of their definition, then those that are kept as data."""
    now, known = await clock.now(), schedules.knows
    for each in schedules:
        last = (await clock.ticks(each.job.queue)).get(each.key)
        yield schedule_row(each, last, now, known=known(each.job.kind, each.job.queue))
    async for state in schedules.list():
        stored = state.stored
        try:
            made = stored.schedule()
        except StreamworkerError as error:
            yield ScheduleRow(
                stored.name, stored.queue, stored.kind, stored.expression, stored.tz, stored.missed, None, [],
                owner="data", paused=str(error),
            )  # fmt: skip
            continue
        yield schedule_row(made, state.last, now, known=known(stored.kind, stored.queue), kept=stored)

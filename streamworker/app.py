"""App: the public API. It is composed of its handlers, a connection and a `Producer`, which `wiring` makes."""
# ceiling: the public API, which is looked for in one place; flows have added two methods

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from time import monotonic
from typing import Any, Final, TypeAlias, overload

import msgspec
from redis.asyncio import Redis
from typing_extensions import TypeVar, Unpack

from streamworker import results, wiring
from streamworker.bridge import Mover
from streamworker.broker import Operator, ScheduleStorage, WorkerBroker
from streamworker.context import Context
from streamworker.cron import Calendar, Schedule
from streamworker.cron.stored import Schedules
from streamworker.encryption import PLAIN, Keys, Sealer
from streamworker.errors import UsageError
from streamworker.flow import Flow
from streamworker.handlers import Handlers, check_queue, names_of
from streamworker.job import Enqueued, FlowRecord, FlowStarted, Job
from streamworker.loops import at_once
from streamworker.observe import Observer, Sender
from streamworker.operators import (
    CancelAnswer,
    JobChange,
    JobChanger,
    cancel_flow,
    cancel_job,
    database_of,
    open_audited_archive,
    open_operator,
)  # fmt: skip
from streamworker.operators.audit_trail import audited
from streamworker.payload import AnyPayload, PayloadStore
from streamworker.postgres import Archive, JobRecord
from streamworker.postgres.migrate import Migrator, printed, shipped
from streamworker.postgres.waits import signal_data, signal_in_transaction
from streamworker.producer import JobOptions, Producer, SealingSender, job_of, make_job, refuse_patched
from streamworker.settings import FairWeight, Settings
from streamworker.views.erasure import Erased, Erasure, person
from streamworker.views.job_log import JobLogLine, LogFollower
from streamworker.views.opened import opener_of
from streamworker.wiring import AppConnection
from streamworker.worker.executor import Middleware
from streamworker.worker.host import WorkerResources
from streamworker.worker.relay_process import RelayProcess, Scheduler

S = TypeVar("S", default=Any)
Lifespan: TypeAlias = Callable[[], AbstractAsyncContextManager[S]]


class App(Handlers[S], Calendar):
    """Handlers, and what producing and consuming needs. Opens nothing until entered (``async with app``).

    Args:
        settings: instead of those of the environment, which are read when the app is entered.
        lifespan: makes an async context manager that yields the handlers' services; entered once per worker.
        middleware: ``async def mw(ctx, call_next)``, the first outermost.
        observers: told of every job (`streamworker.observe`), for error trackers, metrics and traces.
        fair_weights: how many starts a tenant gets where others get one (``fair_by``), unless the setting is given.
        store: takes payloads above STREAMWORKER_OFFLOAD_BYTES, instead of PostgreSQL (docs/offload.md).
        encryption: keys that seal and open what jobs leave in Redis and PostgreSQL (docs/encryption.md).
    """

    @overload
    def __init__(
        self: App[None],
        *,
        settings: Settings | None = None,
        middleware: Sequence[Middleware] = (),
        observers: Sequence[Observer] = (),
        fair_weights: Mapping[str, float] | None = None,
        encryption: Keys | None = None,
        store: PayloadStore | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        settings: Settings | None = None,
        lifespan: Lifespan[S],
        middleware: Sequence[Middleware] = (),
        observers: Sequence[Observer] = (),
        fair_weights: Mapping[str, float] | None = None,
        encryption: Keys | None = None,
        store: PayloadStore | None = None,
    ) -> None: ...
    def __init__(
        self,
        *,
        settings: Settings | None = None,
        lifespan: Any = None,
        middleware: Sequence[Middleware] = (),
        observers: Sequence[Observer] = (),
        fair_weights: Mapping[str, float] | None = None,
        encryption: Keys | None = None,
        store: PayloadStore | None = None,
    ) -> None:
        Handlers.__init__(self)
        Calendar.__init__(self)
        self._lifespan: Lifespan[S] | None = lifespan
        self._middleware, self._observers = tuple(middleware), tuple(observers)
        own = {"lifespan": lifespan, "middleware": middleware, "observers": observers, "settings": settings,
               "encryption": encryption, "store": store}  # fmt: skip
        self._own = tuple(name for name, value in own.items() if value)
        self._fair_weights = tuple(FairWeight(*pair) for pair in (fair_weights or {}).items())
        self._connection = AppConnection(settings, self, store)
        self.store: Final = store
        """Takes large payloads; ``None``: the ledger's database does."""
        self.encryption: Final = encryption
        """Seals and opens what its jobs leave; ``None`` without."""
        self.opener: Final = opener_of(encryption, self._kinds_of)
        """Opens what is read of its jobs."""
        self._sealer: Final[Sealer] = encryption or PLAIN
        senders = [each for each in observers if isinstance(each, Sender)]
        self._producer = Producer(self._connection, [*senders, *([SealingSender(encryption)] if encryption else [])])

    async def __aenter__(self) -> App[S]:
        """Open what producing needs; may be entered several times over.

        Raises:
            ConfigurationError: a setting or the server is wrong.
            Unreachable: no server answers.
            UsageError: it is open on another event loop, or gevent or eventlet has patched this process.
        """
        await self._connection.enter(self.resolve(None), None)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it when left as often as entered."""
        await self._connection.leave()

    # -- producing

    def job(self, payload: AnyPayload, /, **options: Unpack[JobOptions]) -> Job:
        """Make a job with options, for `enqueue_many`.

        Args:
            payload: its class names kind and queue.
            options: see `JobOptions`.

        Raises:
            UsageError: an option makes no sense, or two contradict each other.
            InvalidJob: the payload does not fit its own type, or cannot be written as JSON.
        """
        return make_job(payload, **options)

    async def enqueue(
        self,
        payload: AnyPayload | Job,
        /,
        *,
        connection: Any = None,
        **options: Unpack[JobOptions],
    ) -> Enqueued:
        """Enqueue one job.

        Args:
            payload: its class names kind and queue; or a job made with `job`, which has its options.
            connection: a connection or session in a transaction: the job commits or vanishes with the caller's rows.
                One of asyncpg, psycopg's async one, or SQLAlchemy's async one (docs/integrations.md).
            options: see `JobOptions`.

        Raises:
            UsageError: the app is not open, or on another event loop; it is no payload; or an option makes no sense.
            InvalidJob: the payload does not fit its own type, or cannot be written as JSON.
            PublishUncertain: the reply was lost; with ``key`` enqueueing again is safe.
            JobTooLarge: the document exceeds ``STREAMWORKER_MAX_JOB_BYTES``.
            ConfigurationError: the database of ``connection`` has no schema streamworker.
            Unreachable: no server answers.
        """
        return (await self.enqueue_many([job_of(payload, **options)], connection=connection))[0]

    async def enqueue_many(self, jobs: Iterable[AnyPayload | Job], /, *, connection: Any = None) -> list[Enqueued]:
        """Enqueue many jobs, up to a thousand per round trip; answers in order.

        With ``connection`` the app need not be open: Redis is not asked.

        Args:
            jobs: payloads, or jobs made with `job`.
            connection: see `enqueue`.

        Raises:
            UsageError: one of them is no payload and no job; nothing was enqueued.
            InvalidJob: a payload does not fit its own type, or cannot be written as JSON; nothing was enqueued.
            PublishUncertain: a reply was lost; some of the jobs may be queued.
            JobTooLarge: a document exceeds ``STREAMWORKER_MAX_JOB_BYTES``; nothing was enqueued.
        """
        return await self._producer.enqueue_many(jobs, connection)

    def enqueue_blocking(
        self, payload: AnyPayload | Job, /, *, connection: Any = None, **options: Unpack[JobOptions]
    ) -> Enqueued:
        """`enqueue` for sync code: a script, a thread, a sync handler.

        Args:
            payload: its class names kind and queue; or a job made with `job`, which has its options.
            connection: a connection or session that blocks, in a transaction: the job commits or vanishes with the
                caller's rows. One of psycopg, SQLAlchemy or Django (docs/integrations.md).
            options: see `JobOptions`.

        Raises:
            UsageError: called on the event loop of the app, which it would block, or gevent or eventlet has patched
                this process; else what `enqueue` raises. With ``connection`` neither matters: Redis is not asked.
        """
        return self._producer.enqueue_blocking(job_of(payload, **options), connection)

    async def start(self, flow: Flow, /, *, connection: Any, inside: Context[Any] | None = None) -> FlowStarted:
        """Start a flow in your transaction: it commits or vanishes with your rows. The app need not be open.

        Args:
            flow: a graph of jobs; also `chain` and `group`.
            connection: as for `enqueue`.
            inside: the context of a running node, inside its ``ctx.transaction()``, whose connection this is: the nodes
                are added to its flow. They run when it is done, and what comes after it waits for them, too.

        Raises:
            UsageError: the flow is empty, too large, or has a cycle; or ``inside`` is no running node of this
                transaction.
            InvalidJob: a payload does not fit its own type, or cannot be written as JSON.
            JobTooLarge: a document exceeds ``STREAMWORKER_MAX_JOB_BYTES``.
            ConfigurationError: the database of ``connection`` has no schema streamworker.
        """
        where = None if inside is None else (inside.job.queue, inside.job.id)
        return await self._producer.start(flow.graph(), connection, where, blocking=False)

    def start_blocking(self, flow: Flow, /, *, connection: Any, inside: Context[Any] | None = None) -> FlowStarted:
        """`start` for sync code.

        Args:
            flow: a graph of jobs.
            connection: as for `enqueue_blocking`.
            inside: as for `start`; the transaction is one that blocks.
        """
        where = None if inside is None else (inside.job.queue, inside.job.id)
        return at_once(self._producer.start(flow.graph(), connection, where, blocking=True))

    async def find_flow(self, flow: str, /) -> FlowRecord | None:
        """What the ledger remembers of a flow; ``None`` if it knows no such flow.

        Args:
            flow: its id, or its key.

        Raises:
            UsageError: the app is not open, or open on another event loop, or several flows have this key.
            ConfigurationError: there is no database, or it has no schema streamworker.
            Unreachable: PostgreSQL does not answer.
        """
        return await (await self._connection.required_archive()).flows.find(flow)

    async def cancel_flow(self, flow_id: str, /) -> bool:
        """Cancel a flow: what has not begun never runs, what runs is cancelled in its worker; False if it has ended.

        Args:
            flow_id: as `start` returned it.

        Raises:
            UsageError: the app is not open, or open on another event loop.
            ConfigurationError: there is no database, or it has no schema streamworker.
            Unreachable: a server does not answer.
        """
        return await cancel_flow(await self._connection.required_archive(), self._connection.broker(), flow_id)

    # -- jobs that were enqueued

    async def find(self, job_id: str, *, queue: str | None = None) -> JobRecord | None:
        """What the ledger remembers of a job: status, attempts, result; ``None`` if it knows no such job.

        A job that was enqueued straight to Redis is known once it has run, or has been running for a second.

        Args:
            job_id: as `enqueue` returned it.
            queue: its queue; needed only where several queues have a job with this id.

        Raises:
            UsageError: the app is not open, or open on another event loop, or several queues have a job with this id.
            ConfigurationError: there is no database, or it has no schema streamworker.
            Unreachable: PostgreSQL does not answer.
        """
        archive = self.opener.archive(await self._connection.required_archive())
        return await archive.find(job_id, queue)

    async def signal(
        self, job_id: str, name: str, data: Any = None, /, *, queue: str | None = None, connection: Any = None
    ) -> bool:
        """Send a signal to a job, which waits for it with `Context.wait_for`, or will.

        Args:
            job_id: as `enqueue` returned it.
            name: of the signal. Of several with one name, the first counts.
            data: what JSON can say, 256 KiB at most: what the handler is given.
            queue: of the job; needed if the ledger does not know the job yet, or several queues have one with this id.
            connection: in a transaction of yours: the signal counts if that commits. As for `enqueue`; with one, the
                app need not be open.

        Returns:
            False if a signal with this name was sent before, the job has stopped waiting for it, or has ended.

        Raises:
            UsageError: the app is not open, the queue is needed, or the name or the data are none.
            ConfigurationError: there is no database, or it has no schema streamworker.
            Unreachable: PostgreSQL does not answer.
        """
        written = signal_data(data, job_id, self._sealer)
        if connection is not None:
            return await signal_in_transaction(connection, job_id, name, written, queue)
        return await (await self._connection.required_archive()).signal(job_id, name, written, queue)

    def signal_blocking(
        self, job_id: str, name: str, data: Any = None, /, *, queue: str | None = None, connection: Any = None
    ) -> bool:
        """`signal` for sync code: a script, a thread, a sync handler.

        Args:
            job_id: as `enqueue` returned it.
            name: of the signal.
            data: as for `signal`.
            queue: as for `signal`.
            connection: as for `enqueue_blocking`; with one, the app need not be open.

        Raises:
            UsageError: called on the event loop of the app, which it would block; else what `signal` raises.
        """
        written = signal_data(data, job_id, self._sealer)
        if connection is not None:
            return at_once(signal_in_transaction(connection, job_id, name, written, queue, blocking=True))
        return self._producer.signal_blocking(job_id, name, written, queue)

    async def cancel(self, job_id: str, /, *, queue: str | None = None) -> CancelAnswer:
        """Keep a job from running, or end it while it runs.

        A delayed job is deleted. A waiting one never starts: the worker that claims it lets it go. A running one is
        told within a second: ``ctx.cancelled`` is true from then on, a handler that awaits is cancelled, and the job
        ends as cancelled, which is no failure: no retry, no dead letter. A handler that ends regularly all the same,
        without having looked, has done its work.

        Args:
            job_id: as `enqueue` returned it.
            queue: where it is. Needed only if there is no ledger that knows the job, and this app has handlers for
                none or for several queues; or if several queues have a job with this id.

        Returns:
            ``cancelled``: it will not run any more. ``asked``: it waits or runs, or is not known at all; a worker that
            holds it hears of it. ``ended``: the ledger says that it is over, and nothing was done.

        Raises:
            UsageError: the app is not open, or open on another event loop, or the queue of the job is not known.
            Unreachable: a server does not answer.
        """
        broker = self._connection.broker()
        if broker is None:
            raise UsageError("the app is not open: cancel inside `async with app:`")
        archive = await self._connection.archive()
        record = None if archive is None else await archive.find(job_id, queue)
        where = record.queue if record is not None else self._where(queue)
        return await cancel_job(archive, broker, where, job_id)

    async def result(self, job_id: str, /, *, timeout: float | None = None, queue: str | None = None) -> Any:
        """What a job's handler returned, as soon as the job has ended. Waits for an event, and polls nothing.

        With a ledger results are there for as long as it remembers the job. Without one they are kept in Redis for
        ``result_ttl`` seconds, if the handler says so; other jobs can be waited for, too, but leave nothing to return.

        Args:
            job_id: as `enqueue` returned it.
            timeout: seconds to wait at most; ``None`` waits for as long as it takes.
            queue: where the job is; unless given, wherever the ledger says, or any queue that this app has handlers
                for. Needed if several queues have a job with this id.

        Raises:
            JobDead: the job is a dead letter.
            JobCancelled: it was cancelled.
            JobExpired: it expired before it could start.
            ResultNotKept: it is completed, and what its handler returned was not kept, or could not be.
            ResultTimeout: it has not ended in time; it goes on.
            UsageError: the app is not open, or open on another event loop, or the queue of the job is not known.
            Unreachable: a server does not answer.
        """
        broker, archive, queues = await self._seek(job_id, queue, "wait for results")
        end = None if timeout is None else monotonic() + timeout
        async with broker.ended(queues, job_id) as ends:
            hearing = self.opener.waiter(ends, job_id)
            return await results.wait_for(hearing, archive, (queues[0] if len(queues) == 1 else None, job_id), end)

    async def output(
        self, job_id: str, /, *, after: int = 0, queue: str | None = None, follow: bool = True
    ) -> AsyncGenerator[results.OutputItem, None]:
        """What a job's handler emits (``ctx.emit``), from any position to the end of the job, across its attempts.

        The job need not be enqueued yet. An output can be read for an hour after its last chunk.

        Args:
            job_id: as `enqueue` returned it.
            after: the position of the last item that is known; 0 for all there is.
            queue: where the job is, as for `result`.
            follow: wait for more; else it ends with what is there.

        Raises:
            UsageError: as for `result`, or ``after`` is no position.
            Unreachable: a server does not answer.
        """
        results.check_position(after)
        broker, archive, queues = await self._seek(job_id, queue, "read outputs")
        async with broker.output(queues, job_id) as stored:
            reader = self.opener.reader(stored, job_id)
            job = (queues[0] if len(queues) == 1 else None), job_id
            async for item in results.follow(reader, archive, job, after, live=follow):
                yield item

    async def job_log(
        self, job_id: str, /, *, queue: str | None = None, follow: bool = False
    ) -> AsyncGenerator[JobLogLine, None]:
        """What a job's handler logs, run by run, if workers store it (docs/job-logs.md).

        Args:
            job_id: as `enqueue` returned it.
            queue: where the job is, as for `result`.
            follow: wait for more, until the job has ended.

        Raises:
            UsageError: as for `result`.
            NoKey: the log is sealed, and this app has not the key.
            Unreachable: a server does not answer.
        """
        broker, archive, queues = await self._seek(job_id, queue, "read logs")
        async with broker.output(queues, job_id, log=True) as stored:
            reader = self.opener.reader(stored, job_id, "log")
            job = (queues[0] if len(queues) == 1 else None), job_id
            async with aclosing(LogFollower(reader, archive, job).lines(live=follow)) as lines:
                async for line in lines:
                    yield line

    async def _seek(self, job_id: str, queue: str | None, what: str) -> tuple[WorkerBroker, Archive | None, list[str]]:
        """Where a job may be."""
        broker = self._connection.broker()
        if broker is None:
            raise UsageError(f"the app is not open: {what} inside `async with app:`")
        archive = await self._connection.archive()
        archive = None if archive is None else self.opener.archive(archive)
        record = None if archive is None else await archive.find(job_id, queue)
        queues = [record.queue] if record is not None else [check_queue(queue)] if queue is not None else self.queues
        if not queues:
            raise UsageError("the queue of this job is not known here: say queue=")
        return broker, archive, queues

    async def erase(
        self,
        where: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, Any] | None = None,
        queue: str | None = None,
        wait: float = 10.0,
        dry_run: bool = False,
    ) -> Erased:
        """Delete every trace of a person's jobs, in Redis and in the ledger (docs/erasure.md).

        It reads every document of both stores. A job that waits never runs; one that runs is cancelled, and waited for.

        Args:
            where: fields of the payload and their values; ``customer.email`` is a field inside of another.
            headers: headers and their values. All conditions have to hold.
            queue: only this one; all of them otherwise.
            wait: seconds to wait for jobs that run; those that still run are reported.
            dry_run: delete nothing.

        Raises:
            UsageError: the app is not open, or open on another event loop; or no condition is given.
            Unreachable: a server does not answer.
        """
        whose = person(where, headers)
        rules, ledger = self._connection.rules(), await self._connection.archive()
        async with (
            AsyncExitStack() as stack,
            open_operator(rules, self._connection.redis, self.queues) as operator,
        ):
            archive = None if ledger is None else audited(stack, ledger)
            store = self.store or (None if archive is None else archive.payloads(rules.namespace))
            erasure = Erasure(whose, operator, archive, self.opener, queue=queue, store=store)
            return await erasure.run(wait, dry_run=dry_run)

    def _kinds_of(self, kind: str) -> Sequence[str]:
        """All kinds that the handler of a kind answers to: a payload may be sealed under another one of them."""
        found = self._by_kind.get(kind)
        return (kind,) if found is None else (kind, *names_of(found))

    def _where(self, queue: str | None) -> str:
        """The queue of a job that no ledger knows."""
        if queue is not None:
            return check_queue(queue)
        if len(self.queues) == 1:
            return self.queues[0]
        raise UsageError(
            "the queue of this job is not known here: say queue=, or set DATABASE_URL if there is a ledger"
        )

    # -- the registry, as workers see it

    @property
    def schedules(self) -> Schedules:
        """The schedules in code, as a sequence; and what puts, changes and lists those that are kept as data."""
        most, store = lambda: self._connection.rules().max_job_bytes, self._connection.schedule_store
        return Schedules(super().schedules, self, store, most, self._sealer)

    async def change(self, job_id: str, /, *, queue: str | None = None, by: str = "", **changes: Any) -> bool:
        """Change a job that waits; False if it has started or ended, or is not there.

        Args:
            job_id: as `enqueue` returned it.
            queue: where it is; needed only if this app has handlers for none or for several queues.
            by: who changes it, for the log.
            changes: ``delay``, ``run_at`` (epoch seconds), ``level``, ``to_queue``, ``payload``, or ``fields`` of it.

        Raises:
            UsageError: the change makes no sense, or the queue of the job is not known.
            InvalidJob: the payload would not fit the type of the kind's handler.
            StreamworkerError: a relay is taking the job from PostgreSQL to Redis at this moment.
        """
        wanted = {"queue" if name == "to_queue" else name: value for name, value in changes.items()}
        async with self.operator() as operator:
            return await self.changer(operator).change_by_id(self._where(queue), job_id, JobChange(**wanted), by=by)

    def changer(self, operator: Operator, settings: Settings | None = None) -> JobChanger:
        """Changes jobs that wait, checked by the types of this app's handlers."""
        return JobChanger(operator, self if self.registrations else None, self.resolve(settings), sealer=self._sealer)

    def schedules_of(self, storage: ScheduleStorage, settings: Settings) -> Schedules:
        """The same, in another place than this app's connection: an operator's."""
        most = settings.max_job_bytes
        return Schedules(super().schedules, self, lambda: storage.schedules, lambda: most, self._sealer)

    @property
    def handlers(self) -> Handlers[S]:
        """The registry: the app itself."""
        return self

    @property
    def _brought(self) -> Sequence[str]:
        return self._own

    def _check_inclusion(self, group: Handlers[Any]) -> None:
        super()._check_inclusion(group)
        for each in group._self_and_included():
            for made in each._schedules.values() if isinstance(each, Calendar) else ():
                self._check_schedule(made)

    def _calendars(self) -> Iterator[Calendar]:
        return (each for each in self._self_and_included() if isinstance(each, Calendar))

    def _add_schedule(self, made: Schedule) -> None:
        self._refuse_while_serving(f"the schedule {made.name!r}")
        for each in self._self_and_above():
            if isinstance(each, Calendar):
                each._check_schedule(made)
        super()._add_schedule(made)

    @property
    def middleware(self) -> tuple[Middleware, ...]:
        """What wraps every handler, the first outermost."""
        return self._middleware

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Whom workers tell of every job."""
        return self._observers

    @property
    def lifespan(self) -> Lifespan[S] | None:
        """Makes the context manager that yields the services."""
        return self._lifespan

    def resolve(self, settings: Settings | None) -> Settings:
        """``settings``, else those of the app, else those of the environment, read once.

        Raises:
            ConfigurationError: the environment holds a wrong setting.
        """
        found = self._connection.resolve(settings)
        if not self._fair_weights or found.fair_weights:
            return found
        return msgspec.structs.replace(found, fair_weights=self._fair_weights)

    @asynccontextmanager
    async def entered(self, settings: Settings, redis: Redis | str | None) -> AsyncIterator[App[S]]:
        """The app, open where its worker is: handlers may enqueue."""
        await self._connection.enter(settings, redis)
        try:
            yield self
        finally:
            await self._connection.leave()

    # -- what workers, people and programs open

    async def site(
        self, stack: AsyncExitStack, settings: Settings, redis: Redis | str | None, database: Any, worker_id: str
    ) -> WorkerResources:
        """What a worker stands on, closed with ``stack``.

        Args:
            stack: closes what is made here; what the user brought stays the user's.
            settings: the worker's.
            redis: a client, a URL, or ``None`` for ``REDIS_URL``.
            database: an asyncpg pool, a URL, or ``None`` for ``DATABASE_URL``.
            worker_id: the worker's.
        """
        return await wiring.open_worker_resources(
            stack, settings, (redis, database), worker_id, self.queues, self._connection.payload_store
        )

    @asynccontextmanager
    async def archive(self, settings: Settings | None = None) -> AsyncIterator[Archive]:
        """What the ledger remembers, for the command line and the dashboard.

        Raises:
            ConfigurationError: no database is named, or it has no schema streamworker.
            Unreachable: PostgreSQL does not answer.
        """
        refuse_patched()
        async with AsyncExitStack() as stack:
            yield self.opener.archive(await open_audited_archive(stack, self.resolve(settings)))

    @asynccontextmanager
    async def migrator(self, settings: Settings | None = None) -> AsyncIterator[Migrator]:
        """What brings the database's schema up to date, past any connection pooler.

        Raises:
            ConfigurationError: no database is named.
        """
        refuse_patched()
        async with AsyncExitStack() as stack:
            settings = self.resolve(settings)
            yield Migrator(settings.database_direct_url or await database_of(stack, settings))

    @staticmethod
    def schema_sql() -> str:
        """All migrations as SQL."""
        return printed(shipped())

    @asynccontextmanager
    async def operator(
        self, settings: Settings | None = None, redis: Redis | str | None = None
    ) -> AsyncIterator[Operator]:
        """What people do to jobs by hand, for the command line, the dashboard and /metrics."""
        refuse_patched()
        async with open_operator(self.resolve(settings), redis, self.queues) as operator:
            yield self.opener.operator(operator)

    @asynccontextmanager
    async def relay_process(self, settings: Settings | None = None) -> AsyncIterator[RelayProcess | Scheduler]:
        """What ``streamworker relay`` runs: due jobs of all queues, this app's schedules, and with a ledger the relay.

        Raises:
            ConfigurationError: the ledger is on without a database, or the database has no schema streamworker.
            Unreachable: a server does not answer.
        """
        async with AsyncExitStack() as stack:
            yield await wiring.open_relay_process(
                stack, self.resolve(settings), self.schedules, self.encryption, self._connection.payload_store
            )

    @asynccontextmanager
    async def relaying(self, settings: Settings | None = None) -> AsyncIterator[RelayProcess]:
        """A relay, for those who look after its outbox.

        Raises:
            ConfigurationError: no database is named, or it has no schema streamworker.
            Unreachable: a server does not answer.
        """
        async with AsyncExitStack() as stack:
            yield await wiring.open_relay(stack, self.resolve(settings))

    @asynccontextmanager
    async def bridge(
        self, queues: Sequence[str] | None, settings: Settings | None = None, *, known: Sequence[str] = ()
    ) -> AsyncIterator[Mover]:
        """What moves jobs out of lists into streams; ``queues=None`` takes all lists that look like a queue's.

        Args:
            queues: whose.
            settings: other ones than the app's.
            known: queues, though a list of theirs may look like another program's.
        """
        async with AsyncExitStack() as stack:
            yield await wiring.open_bridge(stack, self.resolve(settings), queues, known)

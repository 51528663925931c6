"""App: the registry of handlers and the composition root. The only place that knows modes and concrete brokers."""

# ceiling: it is being taken apart into the parts that it is composed of
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import Any, Final, Literal, Protocol, TypeAlias, overload

import anyio
import msgspec
from redis.asyncio import Redis
from typing_extensions import TypeVar

from streamworker import results
from streamworker.bridge import Mover
from streamworker.broker import Operator, ResultWaiter, WorkerBroker
from streamworker.broker.claim import StreamOptions
from streamworker.broker.dispatcher import RedisDispatcher
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.broker.list_bridge import BridgeOptions, ListBridge
from streamworker.broker.lists import ListBroker
from streamworker.broker.lists_brpop import BrpopBroker
from streamworker.broker.redis.client import Address
from streamworker.broker.stream import StreamBroker
from streamworker.cron import Calendar, Schedule
from streamworker.errors import (
    ConfigurationError,
    JobCancelled,
    JobDead,
    ResultNotKept,
    ResultTimeout,
    UsageError,
)
from streamworker.handlers import Handlers, check_queue
from streamworker.observe import Observer, Sender
from streamworker.operators import broker_options, open_operator, open_servers
from streamworker.postgres import FINAL, Archive, JobRecord
from streamworker.postgres.migrate import Migrator, printed, shipped
from streamworker.producer import Producer, refuse_patched, running_loop
from streamworker.settings import EMBEDDED, Settings
from streamworker.wiring import NothingToRelay, Relaying, Scheduler, open_archive, open_durable, open_relaying
from streamworker.worker.executor import Middleware
from streamworker.worker.host import Relays, WorkerResources


class Archives:
    """Opens the ledger for people and programs that ask. An `App` says where it is."""

    def __init__(self) -> None:
        self._archive: Archive | None = None
        self._looked = False

    def resolve(self, settings: Settings | None) -> Settings:
        """The settings in force."""
        raise NotImplementedError

    def _opened(self) -> tuple[AsyncExitStack | None, Settings]:
        """What is closed with the app, ``None`` while it is not open; and the settings in force.

        Raises:
            UsageError: the app is open on another event loop.
        """
        raise NotImplementedError

    async def _database(self, stack: AsyncExitStack, settings: Settings) -> str:
        """The URL of the database; the embedded pair is started if that is what the settings say."""
        raise NotImplementedError

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
        stack, settings = self._opened()
        if stack is None:
            raise UsageError("the app is not open: find inside `async with app:`")
        if self._archive is None:
            self._keep(stack, await open_archive(stack, await self._database(stack, settings)))
        return None if self._archive is None else await self._archive.find(job_id, queue)

    async def _kept_archive(self) -> Archive | None:
        """The ledger, if the settings name one and it is there; looked for once."""
        stack, settings = self._opened()
        if stack is None:
            raise UsageError("the app is not open: do this inside `async with app:`")
        named = settings.database_url is not None or settings.redis_url == EMBEDDED
        if not self._looked and named and settings.ledger != "off":
            archive = await open_archive(stack, await self._database(stack, settings), required=settings.ledger == "on")
            self._keep(stack, archive)
        return self._archive

    def _keep(self, stack: AsyncExitStack, archive: Archive | None) -> None:
        self._archive, self._looked = archive, True
        stack.callback(self._forget_archive)

    def _forget_archive(self) -> None:
        self._archive, self._looked = None, False

    @asynccontextmanager
    async def archive(self, settings: Settings | None = None) -> AsyncIterator[Archive]:
        """What the ledger remembers, for the command line and the dashboard.

        Raises:
            ConfigurationError: no database is named, or it has no schema streamworker.
            Unreachable: PostgreSQL does not answer.
        """
        async with AsyncExitStack() as stack:
            archive = await open_archive(stack, await self._database(stack, self.resolve(settings)))
            if archive is None:
                raise AssertionError("a ledger that is required is there, or an error")
            yield archive

    @asynccontextmanager
    async def migrator(self, settings: Settings | None = None) -> AsyncIterator[Migrator]:
        """What brings the database's schema up to date, past any connection pooler.

        Raises:
            ConfigurationError: no database is named.
        """
        async with AsyncExitStack() as stack:
            settings = self.resolve(settings)
            yield Migrator(settings.database_direct_url or await self._database(stack, settings))

    @staticmethod
    def schema_sql() -> str:
        """All migrations as SQL."""
        return printed(shipped())


Answer: TypeAlias = Literal["cancelled", "asked", "ended"]
"""What became of a call to `Follower.cancel`."""
LOOK: Final = 10.0
"""Seconds between looks while nothing is heard: what was told while the connection was down is found then."""
NEVER_SENT: Final = "queued"
"""The status of a job that has not left the ledger."""


class Canceller(Protocol):
    """Who can cancel what lies in Redis: a broker, or an operator."""

    async def cancel(self, queue: str, job_id: str) -> bool:
        """See `Broker.cancel`."""


class Follower(Producer, Archives):
    """Follows jobs. An `App` says where they are."""

    def __init__(self) -> None:
        Producer.__init__(self)
        Archives.__init__(self)

    @property
    def queues(self) -> list[str]:
        """The queues this app has handlers for."""
        raise NotImplementedError

    async def cancel(self, job_id: str, /, *, queue: str | None = None) -> Answer:
        """Keep a job from running, or end it while it runs.

        A delayed job is deleted. A waiting one never starts: the worker that comes to it lets it go. A running one is
        told within a second: ``ctx.cancelled`` is true from then on, a handler that awaits is cancelled, and the job
        ends as cancelled, which is no failure: no retry, no dead letter. A handler that ends regularly all the same,
        without having looked, has done its work.

        Args:
            job_id: as `enqueue` returned it.
            queue: where it lies. Needed only if there is no ledger that knows the job, and this app has handlers for
                none or for several queues; or if several queues have a job with this id.

        Returns:
            ``cancelled``: it will not run any more. ``asked``: it waits or runs, or is not known at all; whoever has it
            is told. ``ended``: the ledger says that it is over, and nothing was done.

        Raises:
            UsageError: the app is not open, or open on another event loop, or nobody can tell where the job lies.
            Unreachable: a server does not answer.
        """
        broker = self._outlet()
        if broker is None:
            raise UsageError("the app is not open: cancel inside `async with app:`")
        archive = await self._kept_archive()
        record = None if archive is None else await archive.find(job_id, queue)
        where = record.queue if record is not None else self._where(queue)
        return await cancel(archive, broker, where, job_id)

    async def result(self, job_id: str, /, *, timeout: float | None = None, queue: str | None = None) -> Any:
        """What a job's handler returned, as soon as the job has ended. Waits for an event, and polls nothing.

        With a ledger results are there for as long as it remembers the job. Without one they are kept in Redis for
        ``result_ttl`` seconds, if the handler says so; other jobs can be waited for, too, but leave nothing to return.

        Args:
            job_id: as `enqueue` returned it.
            timeout: seconds to wait at most; ``None`` waits for as long as it takes.
            queue: where the job lies; unless given, wherever the ledger says, or any queue that this app has handlers
                for. Needed if several queues have a job with this id.

        Raises:
            JobDead: the job is a dead letter.
            JobCancelled: somebody cancelled it.
            ResultNotKept: it is completed, and what its handler returned was not kept, or could not be.
            ResultTimeout: it has not ended in time; it goes on.
            UsageError: the app is not open, or open on another event loop, or nobody can tell where the job lies.
            Unreachable: a server does not answer.
        """
        broker = self._outlet()
        if broker is None:
            raise UsageError("the app is not open: wait for results inside `async with app:`")
        archive = await self._kept_archive()
        record = None if archive is None else await archive.find(job_id, queue)
        queues = [record.queue] if record is not None else [check_queue(queue)] if queue is not None else self.queues
        if not queues:
            raise UsageError("nobody here can tell where this job lies: say queue=")
        end = None if timeout is None else monotonic() + timeout
        async with broker.ended(queues, job_id) as hearing:
            return await _await_result(hearing, archive, (queues[0] if len(queues) == 1 else None, job_id), end)

    def _where(self, queue: str | None) -> str:
        """The queue of a job that no ledger knows."""
        if queue is not None:
            return check_queue(queue)
        if len(self.queues) == 1:
            return self.queues[0]
        raise UsageError(
            "nobody here can tell where this job lies: say queue=, or set DATABASE_URL if there is a ledger"
        )


async def _await_result(
    hearing: ResultWaiter, archive: Archive | None, job: tuple[str | None, str], end: float | None
) -> Any:
    """Look, then listen, and look again when there may be something new; ``job`` is its queue, if known, and its id."""
    _, job_id = job
    while True:
        note = await _noted(hearing, archive, *job)
        look_at = monotonic() + LOOK
        while note is None:
            left = min(look_at, end if end is not None else look_at) - monotonic()
            told = await hearing.heard(max(0.0, left))
            if told is None and end is not None and monotonic() >= end:
                raise ResultTimeout(
                    f"the job {job_id} has not ended yet, or longer ago than its result is kept (result_ttl): wait for "
                    "longer, or look at it",
                    job_id,
                )
            if not told:
                break
            note = results.read(told)
            if note is not None and note.status == "completed" and not bytes(note.result):
                # Told by a worker that keeps nothing in Redis: the ledger has it, if there is one.
                note = await _noted(hearing, archive, *job) or note
        if note is not None:
            return _value(note, job_id)


async def _noted(
    hearing: ResultWaiter, archive: Archive | None, queue: str | None, job_id: str
) -> results.JobEnd | None:
    """What is kept of a job's end, in Redis or in the ledger."""
    kept = await hearing.kept()
    note = results.read(kept) if kept is not None else None
    if note is not None and (archive is None or note.status != "completed" or bytes(note.result)):
        return note
    record = None if archive is None else await archive.find(job_id, queue)
    if record is None or record.status not in ("completed", "dead", "cancelled"):
        return note
    lost = record.result is None and record.error is not None
    kept_none = record.status != "completed" or lost
    result = msgspec.Raw() if kept_none else msgspec.Raw(msgspec.json.encode(record.result))
    return results.JobEnd(record.status, result, record.error)


def _value(note: results.JobEnd, job_id: str) -> Any:
    if note.status == "dead":
        why = note.error or "nobody said why"
        raise JobDead(f"the job {job_id} is a dead letter ({why}): look at it, and retry or drop it", job_id, why)
    if note.status == "cancelled":
        raise JobCancelled(f"the job {job_id} was cancelled", job_id)
    if not bytes(note.result):
        why = note.error or "set result_ttl on its handler, or use the ledger"
        raise ResultNotKept(f"the job {job_id} is completed, but has no result: {why}", job_id)
    return msgspec.json.decode(note.result)


async def cancel(archive: Archive | None, canceller: Canceller | None, queue: str, job_id: str) -> Answer:
    """Cancel a job, in the ledger first: whatever happens in Redis afterwards, nobody runs it again.

    Args:
        archive: the ledger, if there is one.
        canceller: for what lies in Redis; ``None`` where nobody said where that is.
        queue: of the job.
        job_id: which.

    Raises:
        UsageError: the job may be running, and nobody said where Redis is.
    """
    record = None if archive is None else await archive.find(job_id, queue)
    if record is not None and (record.status in FINAL or record.status == "dead"):
        return "ended"
    if canceller is None:
        if archive is not None and await archive.cancel(queue, job_id):
            return "cancelled"
        raise UsageError(f"the job {job_id} may be running: set REDIS_URL, so that its worker can be told")
    if archive is None or record is None:
        return "cancelled" if await canceller.cancel(queue, job_id) else "asked"
    final = await archive.cancel(queue, job_id)
    if final and record.status == NEVER_SENT:
        return "cancelled"
    gone = await canceller.cancel(queue, job_id)
    return "cancelled" if final or gone else "asked"


S = TypeVar("S", default=Any)
Lifespan: TypeAlias = Callable[[], AbstractAsyncContextManager[S]]


class App(Handlers[S], Follower, Calendar):
    """Handlers, and what producing and consuming needs. Opens nothing until entered (``async with app``).

    Args:
        settings: instead of those of the environment, which are read when the app is entered.
        lifespan: makes an async context manager that yields the handlers' services; entered once per worker.
        middleware: ``async def mw(ctx, call_next)``, the first outermost.
        observers: told of every job (`streamworker.observe`), for error trackers, metrics and traces.
    """

    @overload
    def __init__(
        self: App[None],
        *,
        settings: Settings | None = None,
        middleware: Sequence[Middleware] = (),
        observers: Sequence[Observer] = (),
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        settings: Settings | None = None,
        lifespan: Lifespan[S],
        middleware: Sequence[Middleware] = (),
        observers: Sequence[Observer] = (),
    ) -> None: ...
    def __init__(
        self,
        *,
        settings: Settings | None = None,
        lifespan: Any = None,
        middleware: Sequence[Middleware] = (),
        observers: Sequence[Observer] = (),
    ) -> None:
        Handlers.__init__(self)
        Follower.__init__(self)
        Calendar.__init__(self)
        self._settings = settings
        self._lifespan: Lifespan[S] | None = lifespan
        self._middleware, self._observers = tuple(middleware), tuple(observers)
        own = {"lifespan": lifespan, "middleware": middleware, "observers": observers, "settings": settings}
        self._own = tuple(name for name, value in own.items() if value)
        self._senders = tuple(each for each in observers if isinstance(each, Sender))
        self._entries = 0
        self._in_force = settings or Settings()
        self._redis: Redis | str | None = None
        self._open_lock = anyio.Lock()
        self._stack: AsyncExitStack | None = None
        self._broker: WorkerBroker | None = None

    async def __aenter__(self) -> App[S]:
        """Open what producing needs; may be entered several times over.

        Raises:
            ConfigurationError: a setting or the server is wrong.
            Unreachable: no server answers.
            UsageError: it is open on another event loop, or gevent or eventlet has patched this process.
        """
        await self._enter(self.resolve(None), None)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it when left as often as entered."""
        self._entries -= 1
        if self._entries == 0 and self._stack is not None:
            stack, self._stack, self._broker = self._stack, None, None
            await stack.aclose()
        self._free_loop()

    async def _enter(self, settings: Settings, redis: Redis | str | None) -> None:
        with self._lock:
            if self._entries:
                self._require_own_loop()
            self._loop = asyncio.get_running_loop()
            self._entries += 1  # from now on it is this loop's, also while it is being opened
        try:
            async with self._open_lock:
                if self._stack is None:
                    async with AsyncExitStack() as stack:
                        address, _ = await self._servers(stack, settings, redis)
                        broker = self._make_broker(settings, address)
                        stack.push_async_callback(broker.close)
                        await broker.open()
                        self._stack, self._broker = stack.pop_all(), broker
                        self._in_force, self._redis = settings, redis
        except BaseException:
            self._entries -= 1
            self._free_loop()
            raise

    def _free_loop(self) -> None:
        with self._lock:
            if not self._entries:
                self._loop = None

    def _require_own_loop(self) -> None:
        """The guard of everything that uses what `_enter` opened: connections belong to the loop that made them.

        Raises:
            UsageError: this is another event loop.
        """
        if running_loop() is not self._loop:
            raise UsageError("this app is open on another event loop: make an App per loop, or call enqueue_blocking()")

    # -- what producing needs

    def _outlet(self) -> WorkerBroker | None:
        if self._broker is not None:
            self._require_own_loop()
        return self._broker

    def _rules(self) -> Settings:
        return self._in_force if self._broker is not None else self.resolve(None)

    def _sibling(self) -> AbstractAsyncContextManager[Producer]:
        settings = self._in_force if self._stack is not None else self.resolve(None)
        sibling: App[Any] = App()  # this app's broker belongs to another loop
        return sibling.entered(settings, self._redis)

    # -- the composition root

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
        if settings is None and self._settings is None:
            self._settings = Settings.load()
        settings = settings or self._settings or Settings()
        # BRPOP is one job at a time: more slots could only wait.
        popping = settings.mode == "list" and settings.list_pop == "brpop"
        return msgspec.structs.replace(settings, concurrency=1) if popping else settings

    @asynccontextmanager
    async def entered(self, settings: Settings, redis: Redis | str | None) -> AsyncIterator[App[S]]:
        """The app, open where its worker is: handlers may enqueue."""
        await self._enter(settings, redis)
        try:
            yield self
        finally:
            await self.__aexit__()

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
        address, default = await self._servers(stack, settings, redis)
        broker = self._make_broker(settings, address)
        stack.push_async_callback(broker.close)
        client: Any = redis
        if client is None or isinstance(client, str):
            client = address.for_handlers(settings.concurrency)
            stack.push_async_callback(client.aclose)
        url, brought = (database, None) if isinstance(database, str) else (default, database)
        queues = [spec.name for spec in settings.queues] or self.queues
        database, ledger = await open_durable(stack, settings, url, brought, worker_id, queues)
        if ledger is None:
            return WorkerResources(broker, client, database, None, NothingToRelay())
        relay: Relays = NothingToRelay()
        dispatcher = self._make_dispatcher(settings, address.renamed(worker_id))
        if settings.relay == "on":
            relay = await open_relaying(stack, settings, dispatcher, url, brought, queues=queues)
        else:
            stack.push_async_callback(dispatcher.close)
        return WorkerResources(broker, client, database, ledger, relay, dispatcher)

    @asynccontextmanager
    async def operator(
        self, settings: Settings | None = None, redis: Redis | str | None = None
    ) -> AsyncIterator[Operator]:
        """What people do to jobs by hand, for the command line, the dashboard and /metrics."""
        refuse_patched()
        async with open_operator(self.resolve(settings), redis, self.queues) as operator:
            yield operator

    @asynccontextmanager
    async def relay_process(self, settings: Settings | None = None) -> AsyncIterator[Relaying | Scheduler]:
        """What ``streamworker relay`` runs: due jobs of all queues, this app's schedules, and with a ledger the relay.

        Raises:
            ConfigurationError: the ledger is on without a database, or the database has no schema streamworker.
            Unreachable: a server does not answer.
        """
        async with AsyncExitStack() as stack:
            settings = self.resolve(settings)
            address, url = await self._servers(stack, settings, None)
            if url is None and settings.ledger == "on":
                raise ConfigurationError("STREAMWORKER_LEDGER is 'on' but there is no PostgreSQL: set DATABASE_URL")
            dispatcher = self._make_dispatcher(settings, address)
            scheduler = Scheduler(dispatcher, self.schedules, settings)
            if url is None or settings.ledger == "off":
                stack.push_async_callback(dispatcher.close)
                await dispatcher.open()
                yield scheduler
            else:
                await dispatcher.open()
                yield await open_relaying(stack, settings, dispatcher, url, None, scheduler=scheduler)

    @asynccontextmanager
    async def relaying(self, settings: Settings | None = None) -> AsyncIterator[Relaying]:
        """A relay, for those who look after its outbox.

        Raises:
            ConfigurationError: no database is named, or it has no schema streamworker.
            Unreachable: a server does not answer.
        """
        async with AsyncExitStack() as stack:
            settings = self.resolve(settings)
            address, url = await self._servers(stack, settings, None)
            url = url or settings.require_database_url()
            dispatcher = self._make_dispatcher(settings, address)
            await dispatcher.open()
            yield await open_relaying(stack, settings, dispatcher, url, None)

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
            settings = self.resolve(settings)
            address, _ = await self._servers(stack, settings, None)
            chosen = tuple(queues) if queues is not None else None
            options = BridgeOptions(
                queues=chosen, known=frozenset(known), namespace=settings.namespace, lease=settings.lease
            )
            bridge = ListBridge(address, options)
            stack.push_async_callback(bridge.close)
            await bridge.open()
            yield bridge

    async def _servers(
        self, stack: AsyncExitStack, settings: Settings, redis: Redis | str | None
    ) -> tuple[Address, str | None]:
        """(where Redis is, URL of the database); the embedded pair is started if that is what the settings say."""
        refuse_patched()
        return await open_servers(stack, settings, redis)

    def _opened(self) -> tuple[AsyncExitStack | None, Settings]:
        if self._stack is not None:
            self._require_own_loop()
        return self._stack, self._in_force

    async def _database(self, stack: AsyncExitStack, settings: Settings) -> str:
        url = settings.database_url
        if url is None and settings.redis_url == EMBEDDED:
            _, url = await self._servers(stack, settings, None)
        return url or settings.require_database_url()

    def _make_broker(self, settings: Settings, address: Address) -> WorkerBroker:
        options = self._options(settings)
        if settings.mode == "stream":
            return StreamBroker(address, options)
        return BrpopBroker(address, options) if settings.list_pop == "brpop" else ListBroker(address, options)

    def _make_dispatcher(self, settings: Settings, address: Address) -> RedisDispatcher:
        keys = ListKeys if settings.mode == "list" else QueueKeys
        namespace = settings.namespace
        return RedisDispatcher(address, lambda queue: keys(queue, namespace), group=settings.group, namespace=namespace)

    def _options(self, settings: Settings) -> StreamOptions:
        return broker_options(settings, self.queues)

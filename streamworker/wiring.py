"""Composition root: settings to broker, operator, relay, ledger and bridge. The only place that knows modes, concrete
brokers and PostgreSQL. `AppConnection` is what an app has open.
"""

# ceiling: the composition root, which is read in one piece

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Final, Literal, cast

import anyio
import asyncpg
import msgspec
from redis.asyncio import Redis

from streamworker.broker import Finding, ScheduleStore, WorkerBroker
from streamworker.broker.dispatcher import RedisDispatcher
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.broker.list_bridge import BridgeOptions, ListBridge
from streamworker.broker.lists import ListBroker
from streamworker.broker.lists_brpop import BrpopBroker
from streamworker.broker.operator import ListOperator, StreamOperator
from streamworker.broker.partitions import Partitions
from streamworker.broker.redis.client import RedisAddress
from streamworker.broker.stream import StreamBroker
from streamworker.cron import Schedule
from streamworker.cron.stored import DurableSchedules
from streamworker.encryption import Keys
from streamworker.errors import ConfigurationError, StreamworkerError, Unreachable, UsageError
from streamworker.handlers import Handlers
from streamworker.job import Enqueued, FlowGraph, FlowStarted, Job
from streamworker.operators import broker_options, database_of, open_servers, require_archive
from streamworker.payload import PayloadStore, SweptStore
from streamworker.postgres import Archive, Ledger, enqueue, flow_graph
from streamworker.postgres.adapters import connection_of
from streamworker.postgres.archive import SCHEMA_LOOK, PostgresArchive, open_archive, schema_is_there
from streamworker.postgres.ledger import PostgresLedger
from streamworker.postgres.memory import Memory, MemoryLedger
from streamworker.postgres.outbox import PostgresOutbox, listen
from streamworker.postgres.payloads import PostgresStore, needed, referring
from streamworker.postgres.pool import (
    CONNECTIONS,
    RELAY_CONNECTIONS,
    Database,
    NamedPool,
    Pressure,
    borrowed_database,
    connect,
    count_sessions,
    open_database,
    require_same_database,
)
from streamworker.postgres.sqlstate import understood
from streamworker.producer import refuse_patched, running_loop
from streamworker.relay.payload_sweeper import PayloadSweeper
from streamworker.relay.relay import Listener
from streamworker.settings import EMBEDDED, Settings
from streamworker.telemetry.logs import get_logger
from streamworker.worker.host import Relays, WorkerResources
from streamworker.worker.relay_process import NothingToRelay, RelayDispatcher, RelayProcess, Scheduler
from streamworker.worker.stored_payloads import PayloadReaper

log = get_logger("streamworker.ledger")


def memory_ledger(memory: Memory) -> Ledger:
    """The ledger of a handler under test, which has steps, waits and parents alone."""
    return cast("Ledger", MemoryLedger(memory))


async def open_relaying(
    stack: AsyncExitStack,
    settings: Settings,
    dispatcher: RelayDispatcher,
    url: str | None,
    pool: Any,
    *,
    queues: Sequence[str] = (),
    scheduler: Scheduler | None = None,
    store: PayloadStore | None = None,
    alone: bool = False,
    redis: Redis | str | None = None,
) -> RelayProcess:
    """A relay, closed with ``stack``, the dispatcher too.

    Args:
        stack: closes what is made here.
        settings: lease, and the way past a pooler.
        dispatcher: where jobs go.
        url: of the database, if there is one.
        pool: the user's, where there is none.
        queues: those that this process serves.
        scheduler: runs beside it, if there is one.
        store: of the app, if it has one of its own.
        alone: no worker of this process deletes the stored payloads of jobs that have ended.
        redis: where Redis is, if not where the settings say.

    Raises:
        ConfigurationError: the database has no schema streamworker.
        Unreachable: PostgreSQL does not answer.
    """
    stack.push_async_callback(dispatcher.close)
    if url is not None:
        database = await open_database(url, name="relay", connections=RELAY_CONNECTIONS)
        stack.callback(database.close)
    else:
        database = await borrowed_database(pool)
    outbox = PostgresOutbox(database)
    if not await outbox.is_there():
        raise ConfigurationError("the schema streamworker is not there: run `streamworker migrate up`")
    listener = listener_for(url, settings.database_direct_url, pooled=database.pooled)
    own = PostgresStore(database.fetch, settings.namespace)
    stores = [own, store] if isinstance(store, SweptStore) else [own]
    documents = StoredDocuments(settings, redis, lambda: referring(database.fetch))
    return RelayProcess(
        outbox, dispatcher, listener=listener, lease=settings.lease, queues=queues, scheduler=scheduler,
        sweepers=[PayloadSweeper(each, documents) for each in stores],
        reaper=PayloadReaper(store or own, dispatcher.payloads, partial(needed, database.fetch), every=FOUND)
        if alone else None,
    )  # fmt: skip


FOUND: Final = 5.0
"""Seconds between two looks of a relay for stored payloads of jobs that have ended: it does not know of new queues."""


def listener_for(url: str | None, direct: str | None, *, pooled: bool) -> Listener | None:
    """What listens for commits; ``None`` if the only way leads through a pooler."""
    way = direct or (None if pooled else url)
    return None if way is None else partial(listen, way)


RELEASE: Final = 1.0
"""Seconds that connections which handlers hold still are waited for, once no handler runs any more."""

# The key of a job is (id, queue_name).
_TRIED: Final = 100
"""Most connections that `check` opens."""


async def open_durable(
    stack: AsyncExitStack, settings: Settings, url: str | None, database: Any, worker_id: str, queues: Sequence[str]
) -> tuple[Any, PostgresLedger | None]:
    """(the handlers' database, the ledger), closed with ``stack``; what the user brought stays the user's.

    Args:
        stack: closes what is made here.
        settings: `ledger` decides.
        url: of the database, if there is one.
        database: what the user brought for the handlers, if anything.
        worker_id: whose runs are recorded.
        queues: what the worker works on.

    Raises:
        ConfigurationError: the ledger is wanted and cannot be had.
        Unreachable: PostgreSQL does not answer.
    """
    brought = database if isinstance(database, asyncpg.Pool) else None
    pressure = Pressure()
    ledger = await _ledger_database(stack, settings, url, brought, pressure)
    pool = brought
    if database is None and url is not None:
        database = pool = await _handlers_pool(stack, settings, url, "ctx.database", pressure, ledger)
    if ledger is None:
        return database, None
    if url is not None and brought is None:
        # A pool of its own: a handler may take a connection of ctx.database inside its transaction.
        pool = await _handlers_pool(stack, settings, url, "ctx.transaction()", pressure, ledger)
    if pool is None:
        return database, None
    if brought is not None:
        await require_same_database(ledger, brought)
    made = PostgresLedger(ledger, pool, worker_id, audit=settings.audit_retention)
    await made.open(queues)
    return database, made


def most_connections(settings: Settings) -> int:
    """Connections to PostgreSQL that one worker opens at most: of handlers, the ledger, the relay and its listener."""
    handlers = settings.database_connections
    if settings.ledger == "off":
        return handlers
    return 2 * handlers + CONNECTIONS + (RELAY_CONNECTIONS + 1 if settings.relay == "on" else 0)


async def examine(settings: Settings, url: str) -> list[Finding]:
    """What `streamworker check` says of PostgreSQL: asked as a worker asks it, with as many connections.

    Args:
        settings: a worker's.
        url: of the database.
    """
    most = most_connections(settings)
    try:
        database = await open_database(url, name="check", connections=1)
        try:
            with understood("looking for the schema streamworker"):
                there = (await database.fetch(SCHEMA_LOOK))[0]
        finally:
            database.close()  # before the sessions are counted: it would hold one of them
        sessions = await count_sessions(url, min(most, _TRIED))
        if settings.database_direct_url is not None:
            (await connect(settings.database_direct_url, "check")).terminate()
    except StreamworkerError as error:
        return [Finding("error", "postgresql", str(error))]
    found = [_of_sessions(most, sessions, pooled=database.pooled)]
    if database.pooled and settings.ledger != "off" and settings.relay == "on" and settings.database_direct_url is None:
        hint = (
            "there is no LISTEN behind a pooler: the relay looks twice a second. Past it leads "
            "STREAMWORKER_DATABASE_DIRECT_URL"
        )
        found.append(Finding("ok", "postgresql", hint))
    if there["encoding"] != "UTF8":
        sentence = f"the database is encoded in {there['encoding']}, which cannot hold all that jobs may say: use UTF8"
        found.append(Finding("warning", "postgresql", sentence))
    if settings.ledger == "off" or there["all"]:
        return found
    what = "of an older release" if there["any"] else "not there"
    severity: Literal["error", "warning"] = "error" if settings.ledger == "on" or there["any"] else "warning"
    sentence = f"the schema streamworker is {what}: there is no ledger until `streamworker migrate up` was run"
    return [*found, Finding(severity, "ledger", sentence)]


async def examine_pair(settings: Settings, url: str, *, working: bool) -> list[Finding]:
    """What `streamworker check` says of a ledger whose queues are those of another Redis.

    Args:
        settings: a worker's.
        url: of the database.
        working: workers live on this Redis, which would have noted a failover by now.
    """
    try:
        async with AsyncExitStack() as stack:
            address, _ = await open_checked_servers(stack, settings)
            database = await open_database(url, name="check", connections=1)
            stack.callback(database.close)
            outbox, dispatcher = PostgresOutbox(database), make_dispatcher(settings, address)
            stack.push_async_callback(dispatcher.close)
            known = {queue.name: queue.server for queue in await outbox.queues() if queue.server}
            pulses = await dispatcher.pulses(list(known))
    except StreamworkerError as error:
        return [Finding("warning", "ledger", f"whether it is the ledger of this Redis could not be looked up: {error}")]
    others = sorted(pulse.queue for pulse in pulses if pulse.server and pulse.server != known[pulse.queue])
    if not others:
        return []
    what = f"the ledger's queues {', '.join(others[:5])} were last used with another Redis than this one"
    if working:
        return [Finding("error", "ledger", f"{what}: one schema is for one Redis, give this one a database of its own")]
    sentence = (
        f"{what}: right after a failover or a restart that is as it should be, else give this one a database of its own"
    )
    return [Finding("warning", "ledger", sentence)]


def _of_sessions(most: int, sessions: int, *, pooled: bool) -> Finding:
    through = "through a pooler" if pooled else "directly"
    wanted = min(most, _TRIED)
    if sessions >= wanted:
        return Finding(
            "ok", "postgresql", f"it answers {through}; a worker opens up to {most} connections, and {wanted} are there"
        )
    whose = "the pooler, which pools by session," if pooled else "PostgreSQL"
    cure = "make its pool (default_pool_size) larger" if pooled else "raise max_connections"
    return Finding(
        "warning",
        "postgresql",
        f"{whose} gives {sessions} of the {most} connections that one worker may open: {cure}, or lower "
        "STREAMWORKER_DATABASE_CONNECTIONS",
    )


async def _handlers_pool(
    stack: AsyncExitStack, settings: Settings, url: str, what: str, pressure: Pressure, ledger: Database | None
) -> NamedPool:
    pooled = ledger.pooled if ledger is not None else None
    pool = NamedPool(url, what=what, size=settings.database_connections, pressure=pressure, pooled=pooled)
    await pool
    stack.push_async_callback(_close, pool)
    return pool


async def _close(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    """Close the handlers' pool, though a connection of it was never released: no handler runs any more."""
    held = pool.get_size() - pool.get_idle_size()
    with anyio.move_on_after(RELEASE) as scope:
        await pool.close()
    if scope.cancelled_caught:
        pool.terminate()
        log.warning(
            "connections_not_released",
            connections=held,
            hint="a handler acquires from ctx.database and never releases: use `async with ctx.database.acquire()`",
        )


async def _ledger_database(
    stack: AsyncExitStack, settings: Settings, url: str | None, brought: Any, pressure: Pressure
) -> Database | None:
    if settings.ledger == "off" or (url is None and brought is None):
        if settings.ledger == "on":
            raise ConfigurationError("STREAMWORKER_LEDGER is 'on' but there is no PostgreSQL: set DATABASE_URL")
        return None
    database = await (open_database(url, pressure=pressure) if url is not None else borrowed_database(brought))
    stack.callback(database.close)
    if await schema_is_there(database, required=settings.ledger == "on"):
        return database
    log.warning("ledger_off", reason="the schema streamworker is not there: `streamworker migrate up` makes it")
    return None


async def open_checked_servers(
    stack: AsyncExitStack, settings: Settings, redis: Redis | str | None = None
) -> tuple[RedisAddress, str | None]:
    """(where Redis is, URL of the database), see `operators.open_servers`.

    Raises:
        UsageError: gevent or eventlet has patched this process.
    """
    refuse_patched()
    return await open_servers(stack, settings, redis)


def fit_mode(settings: Settings) -> Settings:
    """The settings as their mode can have them: BRPOP is one job at a time, and more concurrency could only wait."""
    popping = settings.mode == "list" and settings.list_pop == "brpop"
    return msgspec.structs.replace(settings, concurrency=1) if popping else settings


def make_broker(settings: Settings, address: RedisAddress, queues: Sequence[str]) -> StreamBroker | ListBroker:
    """The broker of the mode that the settings name.

    Args:
        settings: name mode, group, lease and the queues, if not all.
        address: where Redis is.
        queues: those of the app's handlers.
    """
    options = broker_options(settings, queues)
    if settings.mode == "stream":
        return StreamBroker(address, options)
    return BrpopBroker(address, options) if settings.list_pop == "brpop" else ListBroker(address, options)


def make_dispatcher(settings: Settings, address: RedisAddress) -> RedisDispatcher:
    """What moves the ledger's jobs onto Redis, in the mode that the settings name."""
    keys, namespace = settings.by_mode(QueueKeys, ListKeys), settings.namespace
    parts, group = Partitions(settings.partitions), settings.group
    return RedisDispatcher(address, lambda queue: keys(queue, namespace), group=group, namespace=namespace, parts=parts)


async def open_worker_resources(
    stack: AsyncExitStack,
    settings: Settings,
    brought: tuple[Any, Any],
    worker_id: str,
    queues: Sequence[str],
    store: PayloadStore | None = None,
) -> WorkerResources:
    """What a worker stands on, closed with ``stack``; what the user brought stays the user's.

    Args:
        stack: closes what is made here.
        settings: the worker's.
        brought: (a Redis client, a URL or ``None`` for ``REDIS_URL``; an asyncpg pool, a URL or ``None`` for
            ``DATABASE_URL``).
        worker_id: the worker's.
        queues: those of the app's handlers.
        store: of the app, if it has one of its own.
    """
    redis, database = brought
    address, default = await open_checked_servers(stack, settings, redis)
    broker = make_broker(settings, address, queues)
    stack.push_async_callback(broker.close)
    client: Any = redis
    if client is None or isinstance(client, str):
        client = address.for_handlers(settings.concurrency)
        stack.push_async_callback(client.aclose)
    url, pool = (database, None) if isinstance(database, str) else (default, database)
    queues = [spec.name for spec in settings.queues] or queues
    database, ledger = await open_durable(stack, settings, url, pool, worker_id, queues)
    if ledger is None:
        return WorkerResources(broker, client, database, None, NothingToRelay(), store=store)
    relay: Relays = NothingToRelay()
    dispatcher = make_dispatcher(settings, address.renamed(worker_id))
    if settings.relay == "on":
        relay = await open_relaying(stack, settings, dispatcher, url, pool, queues=queues, store=store, redis=redis)
    else:
        stack.push_async_callback(dispatcher.close)
    store = store or ledger.payloads(settings.namespace)
    return WorkerResources(broker, client, database, ledger, relay, dispatcher, store)


async def open_relay_process(
    stack: AsyncExitStack,
    settings: Settings,
    schedules: Sequence[Schedule],
    encryption: Keys | None,
    store: PayloadStore | None = None,
) -> RelayProcess | Scheduler:
    """What ``streamworker relay`` runs, closed with ``stack``; see `App.relay_process`."""
    address, url = await open_checked_servers(stack, settings)
    if url is None and settings.ledger == "on":
        raise ConfigurationError("STREAMWORKER_LEDGER is 'on' but there is no PostgreSQL: set DATABASE_URL")
    dispatcher = make_dispatcher(settings, address)
    scheduler = Scheduler(dispatcher, schedules, settings, encryption)
    if url is None or settings.ledger == "off":
        stack.push_async_callback(dispatcher.close)
        await dispatcher.open()
        return scheduler
    await dispatcher.open()
    return await open_relaying(stack, settings, dispatcher, url, None, scheduler=scheduler, store=store, alone=True)


async def open_relay(stack: AsyncExitStack, settings: Settings) -> RelayProcess:
    """A relay, for those who look after its outbox, closed with ``stack``; see `App.relaying`."""
    address, url = await open_checked_servers(stack, settings)
    url = url or settings.require_database_url()
    dispatcher = make_dispatcher(settings, address)
    await dispatcher.open()
    return await open_relaying(stack, settings, dispatcher, url, None)


async def open_bridge(
    stack: AsyncExitStack, settings: Settings, queues: Sequence[str] | None, known: Sequence[str]
) -> ListBridge:
    """What moves jobs out of lists into streams, closed with ``stack``; see `App.bridge`."""
    address, _ = await open_checked_servers(stack, settings)
    chosen = tuple(queues) if queues is not None else None
    options = BridgeOptions(queues=chosen, known=frozenset(known), namespace=settings.namespace, lease=settings.lease)
    bridge = ListBridge(address, options)
    stack.push_async_callback(bridge.close)
    await bridge.open()
    return bridge


async def find_archive(stack: AsyncExitStack, settings: Settings) -> PostgresArchive | None:
    """What people ask the ledger, closed with ``stack``; ``None`` where the settings name none or it is not there.

    Raises:
        ConfigurationError: STREAMWORKER_LEDGER is ``on``, and the schema is not there.
    """
    named = settings.database_url is not None or settings.redis_url == EMBEDDED
    if not named or settings.ledger == "off":
        return None
    return await open_archive(stack, await database_of(stack, settings), required=settings.ledger == "on")


async def add_in_transaction(
    connection: Any, jobs: Sequence[Job], settings: Settings, *, blocking: bool
) -> list[Enqueued]:
    """Add jobs to the caller's transaction; without suspending if the caller blocks."""
    other = "await app.enqueue(..., connection=...)" if blocking else "call app.enqueue_blocking(..., connection=...)"
    made = await connection_of(connection, blocking=blocking, instead=other)
    return await enqueue.enqueue(made, jobs, max_bytes=settings.max_job_bytes, key_ttl=settings.key_ttl)


class StoredDocuments:
    """All documents of jobs that may still run: in Redis, in both modes, and in the ledger.

    Args:
        settings: where Redis is, and the namespace.
        redis: a client or a URL, instead of the settings' URL.
        ledger: reads those of the ledger.
    """

    def __init__(
        self, settings: Settings, redis: Redis | str | None, ledger: Callable[[], Awaitable[Sequence[bytes]]]
    ) -> None:
        self._settings = settings
        self._redis = redis
        self._ledger = ledger

    async def bodies(self) -> AsyncIterator[bytes]:
        """`JobDocuments.bodies` of `relay.payload_sweeper`."""
        for body in await self._ledger():
            yield body
        async with AsyncExitStack() as stack:
            address, _ = await open_servers(stack, self._settings, self._redis)
            for kind in (StreamOperator, ListOperator):
                try:
                    operator = kind(address, broker_options(self._settings, ()))
                    stack.push_async_callback(operator.close)
                    await operator.open()
                except ConfigurationError:
                    if kind is StreamOperator or self._settings.mode == "list":
                        raise
                    continue  # a cluster, which has no lists
                for home in await operator.homes():
                    async for stored in operator.documents(home):
                        yield stored.body
        for body in await self._ledger():  # what was on its way to Redis before
            yield body


class AppConnection:
    """What an app has open while it is entered: its broker, and its ledger from the first question on.

    Connections belong to the event loop that made them: on any other loop every method that uses one refuses.

    Args:
        settings: the app's; those of the environment unless given.
        handlers: tell which queues there are.
        store: takes large payloads, instead of the ledger's database.
    """

    def __init__(self, settings: Settings | None, handlers: Handlers[Any], store: PayloadStore | None = None) -> None:
        self.payload_store: Final = store
        """Takes large payloads; ``None``: the ledger's database does."""
        self.settings = settings
        """Those of the app; ``None`` until those of the environment are read."""
        self._handlers = handlers
        self._in_force = settings or Settings()
        self.redis: Redis | str | None = None
        """Where Redis is, if not where the settings say."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._entries = 0
        self._lock = threading.Lock()
        self._opening = anyio.Lock()
        self._stack: AsyncExitStack | None = None
        self._broker: WorkerBroker | None = None
        self._archive: Archive | None = None
        self._looked = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop it is open on; ``None`` while it is not open."""
        return self._loop

    def resolve(self, settings: Settings | None) -> Settings:
        """``settings``, else those of the app, else those of the environment, read once.

        Raises:
            ConfigurationError: the environment holds a wrong setting.
        """
        if settings is None and self.settings is None:
            self.settings = Settings.load()
        return fit_mode(settings or self.settings or Settings())

    def rules(self) -> Settings:
        """The settings in force, or that would be."""
        return self._in_force if self._broker is not None else self.resolve(None)

    async def enter(self, settings: Settings, redis: Redis | str | None) -> None:
        """Open the broker, once however often it is entered.

        Raises:
            UsageError: it is open on another event loop.
        """
        with self._lock:
            if self._entries:
                self._require_own_loop()
            self._loop = asyncio.get_running_loop()
            self._entries += 1  # from now on it is this loop's, also while it is being opened
        try:
            async with self._opening:
                if self._stack is None:
                    async with AsyncExitStack() as stack:
                        address, _ = await open_checked_servers(stack, settings, redis)
                        broker = make_broker(settings, address, self._handlers.queues)
                        stack.push_async_callback(broker.close)
                        await broker.open()
                        self._stack, self._broker = stack.pop_all(), broker
                        self._in_force, self.redis = settings, redis
        except BaseException:
            self._entries -= 1
            self._free_loop()
            raise

    async def leave(self) -> None:
        """Close everything when left as often as entered."""
        self._entries -= 1
        if self._entries == 0 and self._stack is not None:
            stack, self._stack, self._broker = self._stack, None, None
            await stack.aclose()
        self._free_loop()

    def _free_loop(self) -> None:
        with self._lock:
            if not self._entries:
                self._loop = None

    def _require_own_loop(self) -> None:
        if running_loop() is not self._loop:
            raise UsageError("this app is open on another event loop: make an App per loop, or call enqueue_blocking()")

    def broker(self) -> WorkerBroker | None:
        """The app's broker; ``None`` while it is not open.

        Raises:
            UsageError: it is open on another event loop.
        """
        if self._broker is not None:
            self._require_own_loop()
        return self._broker

    def schedule_store(self) -> ScheduleStore:
        """Where schedules are kept as data.

        Raises:
            UsageError: the app is not open, or on another event loop.
        """
        broker = self.broker()
        if broker is None:
            raise UsageError("the app is not open: change schedules inside `async with app:`")
        return cast("ScheduleStore", DurableSchedules(broker.schedules, self.archive))

    async def add(self, connection: Any, jobs: Sequence[Job], settings: Settings, *, blocking: bool) -> list[Enqueued]:
        """Add jobs to the caller's PostgreSQL transaction."""
        return await add_in_transaction(connection, jobs, settings, blocking=blocking)

    async def signal(self, job_id: str, name: str, data: str | None, queue: str | None) -> bool:
        """Send a signal to a job; see `Archive.signal`."""
        return await (await self.required_archive()).signal(job_id, name, data, queue)

    async def find_waiting(self, job: Job, settings: Settings) -> Enqueued | None:
        """The answer for a job whose deduplication key belongs to one that waits in the ledger, if there is one."""
        try:
            archive = await self.archive()
            return (
                None if archive is None else await archive.find_waiting(job, settings.max_job_bytes, settings.key_ttl)
            )
        except Unreachable as error:  # what waits there is not sent to Redis while this job has the key
            log.warning("ledger_keys_unseen", queue=job.queue, job_id=job.id, error=str(error))
            return None

    async def store(self, connection: Any, *, blocking: bool) -> PayloadStore:
        """Where payloads go that are too large for a document; with ``connection`` in the caller's transaction."""
        if self.payload_store is not None:
            if blocking:
                raise UsageError("the store of this app cannot be called from sync code: await app.enqueue(...) there")
            return self.payload_store
        namespace = self.rules().namespace
        if connection is None:
            return (await self.required_archive()).payloads(namespace)
        made = await connection_of(connection, blocking=blocking, instead="give it to the other kind of enqueue")
        return PostgresStore(made.fetch, namespace, foreign=True)

    async def start(
        self, connection: Any, graph: FlowGraph, inside: tuple[str, str] | None, *, blocking: bool
    ) -> FlowStarted:
        """Write a flow in the caller's PostgreSQL transaction; without suspending if the caller blocks."""
        other = "await app.start(..., connection=...)" if blocking else "call app.start_blocking(..., connection=...)"
        made = await connection_of(connection, blocking=blocking, instead=other)
        return await flow_graph.start(made, graph, max_bytes=self.rules().max_job_bytes, inside=inside)

    @asynccontextmanager
    async def elsewhere(self) -> AsyncIterator[AppConnection]:
        """The same servers, opened on another event loop."""
        settings = self._in_force if self._stack is not None else self.resolve(None)
        other = AppConnection(settings, Handlers(), self.payload_store)
        await other.enter(settings, self.redis)
        try:
            yield other
        finally:
            await other.leave()

    async def archive(self) -> Archive | None:
        """The ledger, if the settings name one and it is there; looked for once.

        Raises:
            UsageError: the app is not open, or open on another event loop.
        """
        stack, settings = self._opened("do this")
        async with self._opening:  # one of many callers connects
            if not self._looked:
                self._keep(stack, await find_archive(stack, settings))
        return self._archive

    async def required_archive(self) -> Archive:
        """The ledger.

        Raises:
            UsageError: the app is not open, or open on another event loop.
            ConfigurationError: there is no database, or it has no schema streamworker.
        """
        stack, settings = self._opened("find")
        async with self._opening:
            archive = self._archive
            if archive is None:
                archive = await require_archive(stack, settings)
                self._keep(stack, archive)
        return archive

    def _opened(self, what: str) -> tuple[AsyncExitStack, Settings]:
        if self._stack is None:
            raise UsageError(f"the app is not open: {what} inside `async with app:`")
        self._require_own_loop()
        return self._stack, self._in_force

    def _keep(self, stack: AsyncExitStack, archive: Archive | None) -> None:
        self._archive, self._looked = archive, True
        stack.callback(self._forget_archive)

    def _forget_archive(self) -> None:
        self._archive, self._looked = None, False

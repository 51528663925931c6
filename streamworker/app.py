"""App: the registry of handlers and the composition root. The only place that knows modes and concrete brokers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeAlias, overload

import anyio
import anyio.to_thread
import msgspec
from redis.asyncio import Redis
from typing_extensions import TypeVar

from streamworker import embedded
from streamworker.archives import LedgerKeys
from streamworker.blocking import refuse_patched, running_loop
from streamworker.bridging import Mover
from streamworker.broker import Broker, Operator
from streamworker.broker.bridge import BridgeOptions, ListBridge
from streamworker.broker.client import Address
from streamworker.broker.dispatch import RedisDispatcher
from streamworker.broker.keys import ListKeys, QueueKeys
from streamworker.broker.list_operate import ListOperator
from streamworker.broker.lists import ListBroker
from streamworker.broker.operate import StreamOperator
from streamworker.broker.popping import PoppingBroker
from streamworker.broker.stream import StreamBroker, StreamOptions
from streamworker.cron import Calendar, Schedule
from streamworker.durable import open_durable
from streamworker.errors import ConfigurationError, UsageError
from streamworker.execute import Middleware
from streamworker.following import Follower
from streamworker.handlers import Handlers
from streamworker.observe import Observer, Sender
from streamworker.policy import alone_from
from streamworker.producing import Producer
from streamworker.relaying import NothingToRelay, Relaying, Scheduler, open_relaying
from streamworker.settings import EMBEDDED, Settings
from streamworker.workplace import Relays, Site

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
        self._door = anyio.Lock()
        self._stack: AsyncExitStack | None = None
        self._broker: Broker | None = None

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
            async with self._door:
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

    def _outlet(self) -> Broker | None:
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
    ) -> Site:
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
            return Site(broker, client, database, None, NothingToRelay())
        relay: Relays = NothingToRelay()
        dispatcher = self._make_dispatcher(settings, address.renamed(worker_id))
        if settings.relay == "on":
            relay = await open_relaying(stack, settings, dispatcher, url, brought, queues=queues)
        else:
            stack.push_async_callback(dispatcher.close)
        return Site(broker, client, database, ledger, relay, dispatcher)

    @asynccontextmanager
    async def operator(
        self, settings: Settings | None = None, redis: Redis | str | None = None
    ) -> AsyncIterator[Operator]:
        """What people do to jobs by hand, for the command line, the dashboard and /metrics."""
        async with AsyncExitStack() as stack:
            settings = self.resolve(settings)
            address, url = await self._servers(stack, settings, redis)
            operator = self._make_operator(settings, address, LedgerKeys(stack, settings, url))
            stack.push_async_callback(operator.close)
            await operator.open()
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
        database = settings.database_url
        if redis is not None and not isinstance(redis, str):
            return Address.of(redis), database
        url = (Settings(redis_url=redis) if redis else settings).require_redis_url()
        if url == EMBEDDED:
            servers = await anyio.to_thread.run_sync(embedded.acquire, settings.state_dir)
            stack.callback(servers.close)
            url, database = servers.redis_url, database or servers.database_url
        return Address(url), database

    def _opened(self) -> tuple[AsyncExitStack | None, Settings]:
        if self._stack is not None:
            self._require_own_loop()
        return self._stack, self._in_force

    async def _database(self, stack: AsyncExitStack, settings: Settings) -> str:
        url = settings.database_url
        if url is None and settings.redis_url == EMBEDDED:
            _, url = await self._servers(stack, settings, None)
        return url or settings.require_database_url()

    def _make_broker(self, settings: Settings, address: Address) -> Broker:
        options = self._options(settings)
        if settings.mode == "stream":
            return StreamBroker(address, options)
        return PoppingBroker(address, options) if settings.list_pop == "brpop" else ListBroker(address, options)

    def _make_dispatcher(self, settings: Settings, address: Address) -> RedisDispatcher:
        keys = ListKeys if settings.mode == "list" else QueueKeys
        namespace = settings.namespace
        return RedisDispatcher(address, lambda queue: keys(queue, namespace), group=settings.group, namespace=namespace)

    def _make_operator(self, settings: Settings, address: Address, freed: LedgerKeys) -> StreamOperator | ListOperator:
        kind = StreamOperator if settings.mode == "stream" else ListOperator
        return kind(address, self._options(settings), freed)

    def _options(self, settings: Settings) -> StreamOptions:
        queues = [(spec.name, spec.cap) for spec in settings.queues] or [(name, None) for name in self.queues]
        return StreamOptions(
            queues=tuple(queues),
            group=settings.group,
            namespace=settings.namespace,
            lease=settings.lease,
            weighted=settings.priority == "weighted",
            alone_from=alone_from(settings.max_deliveries),
            slots=settings.concurrency,
        )

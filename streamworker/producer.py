"""Producer: makes jobs of payloads, checks options, publishes; for sync code on an event loop of its own."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, nullcontext, suppress
from datetime import UTC, datetime
from types import NoneType
from typing import Any, Final, Generic, Protocol, TypedDict

import anyio
import msgspec
from anyio.from_thread import BlockingPortal
from typing_extensions import TypeVar, Unpack

from streamworker import codec
from streamworker.broker import Broker, ServerClock
from streamworker.codec import reserved_in
from streamworker.encryption import Keys
from streamworker.errors import LONGEST_WAIT, InvalidJob, JobTooLarge, UsageError
from streamworker.handlers import check_queue
from streamworker.job import UNTIL, Enqueued, FlowGraph, FlowStarted, Job, Until
from streamworker.loops import at_once
from streamworker.observe import LINKED, MOST_LINKS, Sender
from streamworker.payload import (
    MOST_STORED,
    ROOTS,
    AnyPayload,
    PayloadStore,
    fit_of,
    infinity_in,
    is_payload_class,
    line_keys,
    reference_to,
    stored_in,
)
from streamworker.settings import Settings


class ProducerBroker(Broker, ServerClock, Protocol):
    """The roles of a broker that a producer calls."""


class Outlet(Protocol):
    """Where a producer's jobs go: an app's connection to Redis, or a transaction of the caller's."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop it is open on; ``None`` while it is not open."""

    def rules(self) -> Settings:
        """The settings in force, or that would be."""

    def broker(self) -> ProducerBroker | None:
        """Publishes; ``None`` while the app is not open.

        Raises:
            UsageError: the app is open on another event loop.
        """

    async def add(self, connection: Any, jobs: Sequence[Job], settings: Settings, *, blocking: bool) -> list[Enqueued]:
        """Add jobs to the caller's transaction; a caller that blocks calls it with `loops.at_once`."""

    async def find_waiting(self, job: Job, settings: Settings) -> Enqueued | None:
        """The answer for a job whose deduplication key belongs to one that waits in the ledger, if there is one."""

    async def store(self, connection: Any, *, blocking: bool) -> PayloadStore:
        """Where payloads go that are too large for a document; with ``connection`` in the caller's transaction.

        Raises:
            ConfigurationError: there is none.
        """

    async def start(
        self, connection: Any, graph: FlowGraph, inside: tuple[str, str] | None, *, blocking: bool
    ) -> FlowStarted:
        """Write a flow in the caller's transaction; a caller that blocks calls it with `loops.at_once`."""

    async def signal(self, job_id: str, name: str, data: str | None, queue: str | None) -> bool:
        """Send a signal to a job; see `Archive.signal`."""

    def elsewhere(self) -> AbstractAsyncContextManager[Outlet]:
        """The same servers, opened on another event loop."""


class Producer:
    """Makes jobs of payloads and sends them.

    Args:
        outlet: where they go.
        senders: observers that stand around every enqueue.
    """

    def __init__(self, outlet: Outlet, senders: Sequence[Sender] = ()) -> None:
        self._outlet = outlet
        self._senders = tuple(senders)
        self._background: BackgroundLoop[Outlet] | None = None
        self._lock = threading.Lock()

    async def enqueue_many(self, jobs: Iterable[AnyPayload | Job], connection: Any = None) -> list[Enqueued]:
        """Make jobs of payloads and publish them, as `App.enqueue_many` says."""
        if isinstance(jobs, (*ROOTS, Job)) or not isinstance(jobs, Iterable):
            raise UsageError(f"enqueue_many() takes a list: enqueue_many([...]), not one {type(jobs).__name__}")
        if isinstance(jobs, Sequence):
            now = datetime.now(UTC)
            made = [job if type(job) is Job else plain_job(job, now) for job in jobs]
        else:  # a generator may take its time
            made = [job if isinstance(job, Job) else make_job(job) for job in jobs]
        if not self._senders or not made:
            return await self._send(made, connection)
        with ExitStack() as stack:
            return await self._send(self._seen_off(stack, made), connection)

    def _seen_off(self, stack: ExitStack, jobs: Sequence[Job]) -> Sequence[Job]:
        for sender in self._senders:
            jobs = stack.enter_context(sender.sending(jobs))
        return jobs

    async def _send(self, made: Sequence[Job], connection: Any) -> list[Enqueued]:
        if connection is not None:
            return await self._add(made, connection, blocking=False)
        settings = self._outlet.rules()
        broker = self._outlet.broker()
        if broker is None:
            raise UsageError("the app is not open: enqueue inside `async with app:`")
        if settings.offload_bytes is not None:
            sent = await self._stored(made, None, settings.offload_bytes, blocking=False)
            if sent is not made:
                return await self._forget_unused(made, sent, await self._publish(sent, settings, broker))
        return await self._publish(made, settings, broker)

    async def _publish(self, made: Sequence[Job], settings: Settings, broker: ProducerBroker) -> list[Enqueued]:
        if any(job.expires_in is not None for job in made):
            made = await _dated(made, broker)
        answers: dict[int, Enqueued] = {}
        if any(job.key is not None for job in made):
            for index, job in enumerate(made):
                if job.key is not None and (answer := await self._outlet.find_waiting(job, settings)) is not None:
                    answers[index] = answer
            made = [job for index, job in enumerate(made) if index not in answers]
        packed = [codec.pack(job, max_bytes=settings.max_job_bytes, key_ttl=settings.key_ttl) for job in made]
        published = iter(await broker.publish(packed) if packed else [])
        if not answers:
            return list(published)
        return [answers.get(index) or next(published) for index in range(len(packed) + len(answers))]

    async def _add(self, jobs: Sequence[Job], connection: Any, *, blocking: bool) -> list[Enqueued]:
        settings = self._outlet.rules()
        if settings.offload_bytes is not None:
            jobs = await self._stored(jobs, connection, settings.offload_bytes, blocking=blocking)
        return await self._outlet.add(connection, jobs, settings, blocking=blocking)

    async def _stored(self, jobs: Sequence[Job], connection: Any, most: int, *, blocking: bool) -> Sequence[Job]:
        """The jobs, with references in place of payloads above the limit, which are in the store then."""
        large = [
            index for index, job in enumerate(jobs)
            if memoryview(job.payload).nbytes > most and stored_in(job.payload) is None
        ]  # fmt: skip
        if not large:
            return jobs
        store, made = await self._outlet.store(connection, blocking=blocking), list(jobs)
        for index in large:
            job = jobs[index]
            data = bytes(job.payload)
            if len(data) > MOST_STORED:
                raise JobTooLarge(f"the payload of {job.kind!r} has {len(data)} bytes and {MOST_STORED} are allowed")
            name = codec.new_id()
            await store.put(name, data)
            made[index] = msgspec.structs.replace(job, payload=reference_to(name, data))
        return made

    async def _forget_unused(self, made: Sequence[Job], sent: Sequence[Job], answers: list[Enqueued]) -> list[Enqueued]:
        """Delete payloads that were stored for jobs in whose place earlier ones stay; none that a caller refers to."""
        unused = [
            stored_in(job.payload) for before, job, answer in zip(made, sent, answers, strict=True)
            if job is not before and not answer.new and not answer.replaced
        ]  # fmt: skip
        if names := [found.id for found in unused if found is not None]:
            with suppress(Exception):  # the relay's sweep finds them
                await (await self._outlet.store(None, blocking=False)).delete(names)
        return answers

    async def start(
        self, graph: FlowGraph, connection: Any, inside: tuple[str, str] | None, *, blocking: bool
    ) -> FlowStarted:
        """Write a flow in the caller's transaction, as `App.start` says."""
        with ExitStack() as stack:
            most = self._outlet.rules().offload_bytes
            if self._senders or most is not None:
                sent: Sequence[Job] = [node.job for node in graph.nodes if node.job is not None]
                before = graph.jobs_before(MOST_LINKS) if len(sent) <= LINKED else []
                for sender in self._senders:
                    sent = stack.enter_context(sender.sending_flow(sent, before))
                if most is not None:
                    sent = await self._stored(sent, connection, most, blocking=blocking)
                jobs = iter(sent)
                nodes = [
                    node if node.job is None else msgspec.structs.replace(node, job=next(jobs)) for node in graph.nodes
                ]
                graph = msgspec.structs.replace(graph, nodes=nodes)
            return await self._outlet.start(connection, graph, inside, blocking=blocking)

    def enqueue_blocking(self, job: Job, connection: Any = None) -> Enqueued:
        """Publish one job from sync code, on a loop of the producer's own; or add it to the caller's transaction."""
        if connection is not None:
            with ExitStack() as stack:
                sent = self._seen_off(stack, [job])
                return at_once(self._add(sent, connection, blocking=True))[0]
        background = self._beside("enqueue")
        with ExitStack() as stack:  # here, where the caller's context is; the other loop has no senders
            sent = self._seen_off(stack, [job])
            return background.call(lambda outlet: Producer(outlet).enqueue_many(sent))[0]

    def signal_blocking(self, job_id: str, name: str, data: str | None, queue: str | None) -> bool:
        """Send a signal from sync code, on a loop of the producer's own."""
        return self._beside("signal").call(lambda outlet: outlet.signal(job_id, name, data, queue))

    def _beside(self, what: str) -> BackgroundLoop[Outlet]:
        """The loop of its own, for a caller that may block."""
        refuse_patched()
        refuse_on_loop(f"{what}_blocking() would block this event loop: await {what}() instead", self._outlet.loop)
        with self._lock:
            if self._background is None or not self._background.alive:
                self._background = BackgroundLoop(self._outlet.elsewhere)
            return self._background


class SealingSender(Sender):
    """Seals the payloads of jobs that are sent. It stands behind all other senders, which see them as they are.

    Args:
        keys: seal them.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def sending(self, jobs: Sequence[Job]) -> AbstractContextManager[Sequence[Job]]:
        """Around an enqueue."""
        return nullcontext([self._keys.sealed_job(job) for job in jobs])


async def _dated(jobs: Sequence[Job], clock: ServerClock) -> list[Job]:
    """The jobs with an ``expires_at`` in place of ``expires_in``, counted by the clock that judges it."""
    now = {queue: await clock.clock(queue) for queue in {job.queue for job in jobs if job.expires_in is not None}}
    dated = []
    for job in jobs:
        if job.expires_in is None:
            dated.append(job)
        else:
            moment = datetime.fromtimestamp(now[job.queue] + job.expires_in, UTC)
            dated.append(msgspec.structs.replace(job, expires_in=None, expires_at=moment))
    return dated


# What checkers know and callers without one do not: said here, before it breaks somewhere else.
_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "queue": (str, NoneType),
    "delay": (float, int, NoneType),
    "run_at": (datetime, NoneType),
    "expires_in": (float, int, NoneType),
    "expires_at": (datetime, NoneType),
    "key": (str, NoneType),
    "key_ttl": (float, int, NoneType),
    "unique": (str, NoneType),
    "replace": (bool,),
    "debounce": (float, int, NoneType),
    "debounce_max": (float, int, NoneType),
    "headers": (dict, NoneType),
}


_WANTED: Final = "enqueue an instance of a class like `class Send(Payload, kind='mail.send', queue='mail')`"


class JobOptions(TypedDict, total=False):
    """The options of `App.job`, `App.enqueue` and `App.enqueue_blocking`.

    Attributes:
        queue: another queue than the payload's class names.
        priority: ``high``, ``normal`` (the default), ``low``, or a number: up to 50 high, up to 150 normal, else low.
        delay: seconds to wait from the moment of enqueueing.
        run_at: not before this moment; without a time zone it is UTC.
        expires_in: seconds from the moment of enqueueing; from then on the job never starts, and ends as expired.
        expires_at: the same as a moment; without a time zone it is UTC.
        key: deduplication key: while it is remembered, enqueueing again gives the earlier job's id.
        key_ttl: seconds the key is remembered; ``STREAMWORKER_KEY_TTL`` unless given. With ``unique``, seconds after
            which it is free even if the job never ended, counted from when that is due; seven days unless given.
        unique: ``done`` holds the key until the job has ended, ``started`` until it starts.
        replace: a job with that key that has not started is replaced: delayed it is rewritten, ready it is cancelled.
        debounce: seconds to wait first, anew with each job that replaces it.
        debounce_max: most seconds of that, from the first one.
        headers: travel with the job; anything JSON can hold.
    """

    queue: str | None
    priority: str | int
    delay: float | None
    run_at: datetime | None
    expires_in: float | None
    expires_at: datetime | None
    key: str | None
    key_ttl: float | None
    unique: Until | None
    replace: bool
    debounce: float | None
    debounce_max: float | None
    headers: dict[str, Any] | None


def make_job(payload: AnyPayload, **options: Unpack[JobOptions]) -> Job:
    """A job with a fresh id.

    Args:
        payload: its class names kind and queue.
        options: see `JobOptions`.

    Raises:
        UsageError: it is no payload, an option makes no sense, or two contradict each other.
        InvalidJob: the payload does not fit its own type, or cannot be written as JSON.
    """
    if not options:
        return plain_job(payload, datetime.now(UTC))
    type_ = _class_of(payload)
    _check_types(options)
    run_at, expires_at = _in_zone(options.get("run_at")), _in_zone(options.get("expires_at"))
    key, ttl, debounce = options.get("key"), options.get("key_ttl"), options.get("debounce")
    _check_times(options, run_at, expires_at)
    _check_seconds("key_ttl", ttl)
    if key is not None and (not key or not _is_text(key)):
        raise UsageError(f"key={key!r} cannot be a key: leave it out, or give it some text")
    _check_held(options)
    _check_headers(options.get("headers"))
    try:
        level = codec.level_of(options.get("priority"))
    except ValueError as error:
        raise UsageError(str(error)) from None
    queue = options.get("queue")
    order, fair = (None, None) if type_.__lines__ is None else line_keys(payload, type_.__lines__)
    return Job(
        id=codec.new_id(),
        queue=type_.__queue__ if queue is None else check_queue(queue),
        kind=type_.__kind__,
        payload=codec.encode_payload(payload),
        level=level,
        created_at=datetime.now(UTC),
        run_at=run_at,
        delay=debounce if debounce is not None else options.get("delay"),
        expires_at=expires_at,
        expires_in=options.get("expires_in"),
        key=key,
        key_ttl=ttl,
        unique=options.get("unique") or ("started" if options.get("replace") or debounce is not None else None),
        replace=bool(options.get("replace")) or debounce is not None,
        debounce=debounce,
        debounce_max=options.get("debounce_max"),
        headers=options.get("headers"),
        order_key=order,
        fair_key=fair,
    )


def plain_job(payload: Any, created_at: datetime) -> Job:
    """A job without options, for `enqueue_many`.

    Args:
        payload: its class names kind and queue.
        created_at: the moment, in UTC; one for all jobs of a list, since reading the clock takes a quarter of the time.

    Raises:
        UsageError: it is no payload.
        InvalidJob: the payload does not fit its own type, or cannot be written as JSON.
    """
    type_ = _class_of(payload)
    if type_.__lines__ is not None:
        return make_job(payload, queue=type_.__queue__)
    return Job(
        id=codec.new_id(),
        queue=type_.__queue__,
        kind=type_.__kind__,
        payload=codec.encode_payload(payload),
        created_at=created_at,
    )


def _class_of(payload: Any) -> Any:
    type_: Any = type(payload)
    # `issubclass` asks the metaclass: a class whose payloads were encoded before need not be asked again.
    if getattr(type_, "__fit__", None) is None:
        if not is_payload_class(type_):
            raise UsageError(_no_payload(payload))
        fit_of(type_)
    return type_


def job_of(given: AnyPayload | Job, **options: Unpack[JobOptions]) -> Job:
    """A job out of a payload and options; or a job that was made before, which brings its own.

    Raises:
        UsageError: a job, and options; else what `make_job` raises.
    """
    if not isinstance(given, Job):
        return make_job(given, **options)
    for name, value in options.items():
        if value not in (None, False) and (name, value) != ("priority", "normal"):
            raise UsageError(f"{name}={value!r} comes too late for a job that was made before: give it to app.job()")
    return given


def _check_types(options: JobOptions) -> None:
    if unknown := options.keys() - JobOptions.__annotations__.keys():
        raise TypeError(f"there is no option {min(unknown)!r} of a job")
    for name, kinds in _KINDS.items():
        if name in options and not isinstance(options.get(name), kinds):
            raise UsageError(f"{name}={options.get(name)!r} must be {kinds[0].__name__} or None")


def _no_payload(given: Any) -> str:
    if isinstance(given, Job):
        return "this is a job already: give it to enqueue() or enqueue_many() as it is"
    if isinstance(given, type):
        if is_payload_class(given):
            return f"{given.__name__} is a class: enqueue an instance of it, {given.__name__}(...)"
        return f"the class {given.__name__} is no payload: {_WANTED}"
    what = type(given).__name__
    article = "an" if what[:1].lower() in "aeiou" else "a"
    return f"{article} {what} is no payload: {_WANTED}"


def _check_held(options: JobOptions) -> None:
    """Refuse options of a key that is held which make no sense without others."""
    unique, debounce, most = options.get("unique"), options.get("debounce"), options.get("debounce_max")
    _check_seconds("debounce", debounce)
    _check_seconds("debounce_max", most)
    if unique is not None and unique not in UNTIL:
        raise UsageError(f"unique={unique!r} must be 'done', 'started' or None")
    if options.get("key") is None and (unique is not None or options.get("replace") or debounce is not None):
        raise UsageError("unique, replace and debounce are about the jobs of one key: give key=, too")
    if debounce is not None and (options.get("delay") is not None or options.get("run_at") is not None):
        raise UsageError("debounce says when the job runs: leave delay and run_at out")
    if most is not None and (debounce is None or most < debounce):
        raise UsageError(f"debounce_max={most!r} needs a debounce that is not longer")


def _in_zone(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if isinstance(moment, datetime) and moment.tzinfo is None else moment


def _check_times(options: JobOptions, run_at: datetime | None, expires_at: datetime | None) -> None:
    """Refuse a time that is said twice, and an expiry that comes before the job may run."""
    delay, expires_in = options.get("delay"), options.get("expires_in")
    _check_seconds("delay", delay)
    _check_seconds("expires_in", expires_in)
    if delay is not None and run_at is not None:
        raise UsageError("delay and run_at say the same thing twice: give one of them")
    if expires_in is not None and expires_at is not None:
        raise UsageError("expires_in and expires_at say the same thing twice: give one of them")
    if expires_in is not None and delay is not None and expires_in <= delay:
        raise UsageError(f"expires_in={expires_in!r} ends before delay={delay!r}: no run would ever start")
    if expires_at is not None and run_at is not None and expires_at <= run_at:
        raise UsageError(f"expires_at={expires_at} is not after run_at={run_at}: no run would ever start")


def _check_headers(headers: dict[str, Any] | None) -> None:
    if not headers:
        return
    if (name := reserved_in(headers)) is not None:
        raise UsageError(f"the header {name!r} has a name that streamworker keeps for itself: rename it")
    if (place := infinity_in(headers)) is not None:
        raise InvalidJob(f"the header {place.removeprefix('.')} is NaN or an infinity, which JSON lacks")


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: lone surrogates cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_seconds(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= LONGEST_WAIT:
        raise UsageError(f"{name}={value!r} must be seconds from 0 up to 100 years")


T = TypeVar("T")
R = TypeVar("R")


def refuse_on_loop(sentence: str, own: asyncio.AbstractEventLoop | None) -> None:
    """Refuse to block an event loop on which there is a better way.

    Args:
        sentence: what that is.
        own: the loop on which it is; ``None``: any.

    Raises:
        UsageError: ``sentence``, if this thread runs that loop.
    """
    loop = running_loop()
    if loop is not None and (own is None or loop is own):
        raise UsageError(sentence)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that this thread runs; a forked child runs none, though its parent did."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def refuse_patched() -> None:
    """Refuse a process whose threads, sockets or selectors gevent or eventlet have replaced.

    There every thread would be a green one of a single real thread: an event loop in one of them counts as running in
    all, and a lease thread would stand still with the handler that it has to outlive.

    Raises:
        UsageError: they have.
    """
    for name, module, asks, parts in _PATCHERS:
        patcher = sys.modules.get(module)
        patched = getattr(patcher, asks, None)
        if patched is not None and any(patched(part) for part in parts):
            raise UsageError(
                f"{name} has patched this process, and asyncio cannot work in it: enqueue from another process, or add "
                "jobs with a Redis client of yours (XADD, as docs/design.md says)"
            )


_PATCHERS: Final = (
    ("gevent", "gevent.monkey", "is_module_patched", ("socket", "threading", "select")),
    ("eventlet", "eventlet.patcher", "is_monkey_patched", ("socket", "thread", "select")),
)


class BackgroundLoop(Generic[T]):
    """Keeps ``resource`` open on a loop of its own and calls functions with it.

    The thread is a daemon: a script that enqueues and ends must not wait for it. Threads are not inherited by a fork; a
    child process makes its own.

    Args:
        resource: makes the async context manager whose value functions are called with.
    """

    def __init__(self, resource: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._resource = resource
        self._ready = threading.Event()
        self._portal: BlockingPortal | None = None
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="streamworker-blocking", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """The loop still runs in this process."""
        return self._thread.is_alive()

    def call(self, function: Callable[[T], Awaitable[R]]) -> R:
        """Await ``function(resource)`` on the loop; raises what it raises, or what opening the resource raised."""
        self._ready.wait()
        if self._portal is None or self._error is not None:
            raise self._error or RuntimeError("the background loop has ended")

        async def on_loop() -> Any:
            return await function(self._value)  # type: ignore[arg-type]  # set before the portal is

        result: R = self._portal.call(on_loop)
        return result

    def _run(self) -> None:
        try:
            anyio.run(self._main)
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whose call is the one that failed
            self._error = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        async with self._resource() as value, BlockingPortal() as portal:
            self._value, self._portal = value, portal
            self._ready.set()
            await portal.sleep_until_stopped()

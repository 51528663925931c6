"""Handlers: the registry of handlers by kind, with their payload types and options."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Final, Generic, Literal, Protocol, get_args, get_origin, get_type_hints, overload
from weakref import WeakSet

import msgspec
from typing_extensions import TypeVar

from streamworker.context import Context, ProcessContext
from streamworker.errors import ConfigurationError, UsageError
from streamworker.limits import Quota, quota
from streamworker.payload import AnyPayload, Payload, check_queue, decoder_of, fields_of, is_payload_class, place_of
from streamworker.policy import Backoff, Limits


class Registration(msgspec.Struct, frozen=True, eq=False):
    """One handler: its kind, its function, and the options of its jobs. Another one is never equal to it."""

    kind: str
    queue: str
    payload: type[AnyPayload]
    function: Callable[..., Any]
    decode: Callable[[msgspec.Raw], Any]
    limits: Limits
    is_async: bool
    wants_context: bool
    quota: Quota | None = None
    together: BatchOptions | None = None
    process: bool = False
    """Its jobs run in processes of their own, see `worker.calls`."""
    special: bool = False
    """Its jobs pass the stages of `Admission`: the kind has a limit or a batch."""

    @property
    def name(self) -> str:
        """The function's dotted name, for people."""
        target = inspect.unwrap(self.function)
        return f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', repr(target))}"


def registered(
    function: Callable[..., Any],
    scope: Mapping[str, Any],
    *,
    limits: Limits,
    quota: Quota | None = None,
    together: BatchOptions | None = None,
    process: bool = False,
) -> Registration:
    """The registration of a function.

    Args:
        function: the handler.
        scope: names that are visible where it was decorated.
        limits: attempts, timeout and backoff of its jobs.
        quota: the limit of its kind in the whole fleet.
        together: its batches, if it is called for several jobs at once.
        process: whether it runs in processes of their own.

    Raises:
        ConfigurationError: it cannot be a handler.
    """
    name = getattr(function, "__qualname__", repr(function))
    parameters = _parameters(function, name)
    payload, annotation = _payload(name, _annotation(function, parameters[0], scope), together)
    target = _underlying(function)
    if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise ConfigurationError(f"{name} yields: calling it runs nothing, so it cannot be a handler")
    if quota is not None and quota.limit_by and quota.limit_by not in fields_of(payload):
        raise ConfigurationError(f"the handler {name} is limited by {quota.limit_by!r}, no field of its payload")
    is_async = inspect.iscoroutinefunction(_outermost(function))
    wants_context = len(parameters) == 2 and _is_context(parameters[1])
    if process:
        _check_process(name, function, payload, is_async=is_async, together=together)
    if together is not None:
        function, wants_context = batch_handler(function, is_async=is_async, wants_contexts=wants_context), True
    return Registration(
        kind=payload.__kind__,
        queue=payload.__queue__,
        payload=payload,
        function=function,
        decode=decoder_of(annotation),
        limits=limits,
        is_async=is_async,
        wants_context=wants_context,
        quota=quota,
        together=together,
        process=process,
        special=quota is not None or together is not None,
    )


def _check_process(
    name: str, function: Callable[..., Any], payload: type[AnyPayload], *, is_async: bool, together: BatchOptions | None
) -> None:
    """Refuse handlers that cannot run in a process.

    Raises:
        ConfigurationError: it is async, takes batches, or another process cannot import it or its payload.
    """
    if is_async or together is not None:
        what = "is async: write def, without async" if is_async else "takes batches"
        raise ConfigurationError(f"the handler {name} has process=True and {what}")
    for each in (function, payload):
        where = getattr(each, "__qualname__", "<locals>")
        if "<" in where:
            raise ConfigurationError(
                f"the handler {name} has process=True, and its process imports it: define {where} in a module"
            )


def _payload(name: str, annotation: Any, together: BatchOptions | None) -> tuple[type[AnyPayload], Any]:
    """The payload's class by the first parameter's annotation, and the type to decode: ``Box[int]`` of a ``Box``."""
    if together is not None:
        if get_origin(annotation) is not list:
            raise ConfigurationError(
                f"the first parameter of {name}, which has batch=, must be a list of its Payload class"
            )
        (annotation,) = get_args(annotation)
    cls = get_origin(annotation) or annotation
    if not is_payload_class(cls):
        raise ConfigurationError(f"the first parameter of {name} must be annotated with its Payload class")
    return cls, annotation


def _parameters(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    """One or two: the payload, and perhaps the context."""
    parameters = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if not 1 <= len(parameters) <= 2:
        raise ConfigurationError(
            f"the handler {name} must take a payload, and may take a context: (payload) or (payload, ctx)"
        )
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in inspect.signature(function).parameters.values()):
        raise ConfigurationError(f"the handler {name} has a keyword-only parameter that nobody can give: add a default")
    return parameters


def _outermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that is called: inside partials and callable objects, but outside of decorators."""
    target: Any = function
    while isinstance(target, partial):
        target = target.func
    return target if inspect.isroutine(target) else type(target).__call__


def _is_context(parameter: inspect.Parameter) -> bool:
    """A second parameter takes the context unless it has a default and is annotated as something else."""
    return parameter.default is parameter.empty or "Context" in str(parameter.annotation)


def _underlying(function: Callable[..., Any]) -> Callable[..., Any]:
    """The plain function behind decorators, partials, bound methods and callable objects: it knows how it is called."""
    target: Any = inspect.unwrap(function)
    while isinstance(target, partial):
        target = inspect.unwrap(target.func)
    if not inspect.isroutine(target):
        target = inspect.unwrap(type(target).__call__)
    return getattr(target, "__func__", target)  # type: ignore[no-any-return]


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter, scope: Mapping[str, Any]) -> Any:
    """The parameter's annotation, evaluated alone: the context's may be importable for type checkers only."""
    annotation = parameter.annotation
    if not isinstance(annotation, str):
        return annotation
    holder = type("_", (), {"__annotations__": {"payload": annotation}})
    module = getattr(_underlying(function), "__globals__", {})
    try:
        return get_type_hints(holder, globalns=module, localns=dict(scope))["payload"]
    except Exception as error:  # noqa: BLE001 - evaluating a user's annotation may raise anything
        target = _underlying(function)
        name = getattr(target, "__qualname__", repr(target))
        raise ConfigurationError(
            f"{place_of(target)}: the annotation {annotation!r} of a handler's payload cannot be resolved: import it "
            f"at run time for {name}, not for type checkers alone ({error})"
        ) from None


__all__ = ["BatchDecorator", "Decorator", "Handlers", "Payload", "Registration", "check_queue"]

QUOTA: Final = ("concurrency", "rate", "burst", "limit_by")
BATCH: Final = ("batch", "linger")

P = TypeVar("P", bound=AnyPayload)
S = TypeVar("S", default=Any)
R = TypeVar("R")


class Decorator(Generic[S]):
    """What ``@handler(...)`` returns; the decorated function stays callable as it was."""

    def __init__(self, register: Callable[[Callable[..., Any]], None]) -> None:
        self._register = register

    @overload
    def __call__(self, function: Callable[[P, Context[S]], R], /) -> Callable[[P, Context[S]], R]: ...
    @overload
    def __call__(self, function: Callable[[P], R], /) -> Callable[[P], R]: ...
    def __call__(self, function: Any, /) -> Any:
        """Register ``function`` and return it unchanged."""
        self._register(function)
        return function


class ProcessDecorator:
    """What ``@handler(process=True)`` returns; the decorated function stays callable as it was."""

    def __init__(self, register: Callable[[Callable[..., Any]], None]) -> None:
        self._register = register

    @overload
    def __call__(self, function: Callable[[P, ProcessContext], R], /) -> Callable[[P, ProcessContext], R]: ...
    @overload
    def __call__(self, function: Callable[[P], R], /) -> Callable[[P], R]: ...
    def __call__(self, function: Any, /) -> Any:
        """Register ``function`` and return it unchanged."""
        self._register(function)
        return function


class BatchDecorator(Generic[S]):
    """What ``@handler(batch=...)`` returns; the decorated function stays callable as it was."""

    def __init__(self, register: Callable[[Callable[..., Any]], None]) -> None:
        self._register = register

    @overload
    def __call__(
        self, function: Callable[[list[P], list[Context[S]]], R], /
    ) -> Callable[[list[P], list[Context[S]]], R]: ...
    @overload
    def __call__(self, function: Callable[[list[P]], R], /) -> Callable[[list[P]], R]: ...
    def __call__(self, function: Any, /) -> Any:
        """Register ``function`` and return it unchanged."""
        self._register(function)
        return function


class Handlers(Generic[S]):
    """A group of handlers, registered by the kind of their payload.

    ``S`` is the type of ``ctx.services``. Groups of several files come together with `include`.
    """

    def __init__(self) -> None:
        self._members: list[Registration | Handlers[Any]] = []
        self._by_kind: dict[str, Registration] = {}
        self._by_queue: dict[str, list[Registration]] = {}
        # Weak: a group of a module outlives the apps that tests make of it.
        self._included_by: WeakSet[Handlers[Any]] = WeakSet()
        self._workers = 0

    @overload
    def handler(self, function: Callable[[P, Context[S]], R], /) -> Callable[[P, Context[S]], R]: ...
    @overload
    def handler(self, function: Callable[[P], R], /) -> Callable[[P], R]: ...
    @overload
    def handler(
        self,
        /,
        *,
        max_attempts: int = 20,
        timeout: float | None = 300,
        backoff: Backoff = Backoff(),
        concurrency: int | None = None,
        rate: str | None = None,
        burst: int | None = None,
        limit_by: str | None = None,
        result_ttl: float | None = None,
        progress_runs: int = 0,
    ) -> Decorator[S]: ...
    @overload
    def handler(
        self,
        /,
        *,
        process: Literal[True],
        max_attempts: int = 20,
        timeout: float | None = 300,
        backoff: Backoff = Backoff(),
        concurrency: int | None = None,
        rate: str | None = None,
        burst: int | None = None,
        limit_by: str | None = None,
        result_ttl: float | None = None,
    ) -> ProcessDecorator: ...
    @overload
    def handler(
        self,
        /,
        *,
        batch: int,
        linger: float = 0.05,
        max_attempts: int = 20,
        timeout: float | None = 300,
        backoff: Backoff = Backoff(),
        concurrency: int | None = None,
        rate: str | None = None,
        burst: int | None = None,
        limit_by: str | None = None,
        result_ttl: float | None = None,
        progress_runs: int = 0,
    ) -> BatchDecorator[S]: ...
    def handler(self, function: Any = None, /, **options: Any) -> Any:
        """Register a handler; usable with and without parentheses.

        The first parameter's annotation is the payload type; a second parameter takes the `Context`. Functions that
        are not ``async`` run in threads, their clock starts there.

        Args:
            max_attempts: failed attempts after which a job is dead; 20 unless given.
            timeout: seconds one run may take, 300 unless given; ``None`` for no limit must be written out.
            backoff: waits between attempts; ``Backoff(base=1, cap=300, jitter=0.25)`` unless given.
            concurrency: most jobs of this kind that run at once in the whole fleet.
            rate: how many may start in a time in the whole fleet: ``"100/s"``, ``"600/min"``, ``"5/10s"``.
            burst: starts that may come at once; a tenth of a second's worth of ``rate``, at least 1, unless given.
            limit_by: a field of the payload: each of its values has limits of its own.
            result_ttl: seconds for which `App.result` finds in Redis how a job ended; not kept there unless given.
            progress_runs: attempts start anew after a run that recorded a step or a cursor (docs/steps.md), until the
                job has had so many runs; never unless given.
            process: run in a process of its own, for code that computes: it is killed at its timeout and when its job
                is cancelled. The function is not ``async``, and both it and its payload type are defined in a module;
                a second parameter takes a `ProcessContext`.
            batch: most jobs of one call. The function then takes a ``list`` of payloads, and may take a list of their
                contexts; it returns ``None`` when all went well, or a list as long with exceptions for some.
            linger: seconds the first job of a batch waits for others; 0.05 unless given.

        Raises:
            ConfigurationError: the function cannot be a handler, or its kind has one.
        """
        try:
            limited = quota(**{name: options.pop(name) for name in QUOTA if name in options})
            together = batch_options(**{name: options.pop(name) for name in BATCH if name in options})
            process = bool(options.pop("process", False))
            limits = Limits(**options)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"the handler's options are wrong: {error}") from None
        scope = sys._getframe(1).f_locals  # payload types defined inside functions are visible only there

        def register(target: Callable[..., Any]) -> None:
            self._add(registered(target, scope, limits=limits, quota=limited, together=together, process=process))

        if process:
            return ProcessDecorator(register)
        decorator = Decorator[S](register) if together is None else BatchDecorator[S](register)
        return decorator if function is None else decorator(function)

    def include(self, *groups: Handlers[S]) -> None:
        """Take over all handlers of other groups, also those that are registered there later.

        Of an `App` its schedules come along, too. One with a lifespan, middleware, observers or settings of its own is
        refused: those belong to the app that includes it.

        Raises:
            ConfigurationError: a kind has two handlers, a group includes itself, or an app has what cannot come along.
            UsageError: it is no group.
        """
        for group in groups:
            if not isinstance(group, Handlers):
                raise UsageError(f"include() takes Handlers or an App, not {type(group).__name__}")
            self._refuse_while_serving("a group of handlers")
            above = self._self_and_above()
            if group in above:
                raise ConfigurationError("a group of handlers cannot include itself, directly or through another one")
            for each in above:
                each._check_inclusion(group)
            self._members.append(group)
            group._included_by.add(self)
            for each in above:
                for registration in group.registrations:
                    each._index(registration)

    def _check_inclusion(self, group: Handlers[Any]) -> None:
        """Refuse a group that this one, or one that includes it, cannot take over whole.

        Raises:
            ConfigurationError: it is.
        """
        for each in group._self_and_included():
            if each._brought:
                raise ConfigurationError(
                    f"include() cannot take along the {' and '.join(each._brought)} of an App: give them to the App "
                    "that includes it, and collect handlers in Handlers()"
                )
        for registration in group.registrations:
            self._check(registration)
        mine = set(self._self_and_included())
        if any(each in mine for each in group._self_and_included()):
            raise ConfigurationError("a group of handlers is included twice: include it once")

    @property
    def _brought(self) -> Sequence[str]:
        """What a group has besides handlers that cannot be included elsewhere, in words. Only apps have any."""
        return ()

    def handler_of(self, kind: str | None, queue: str) -> Registration | None:
        """The handler of a kind; without a kind, that of a queue with exactly one handler."""
        if kind:
            return self._by_kind.get(kind)
        only = self._by_queue.get(queue, ())
        return only[0] if len(only) == 1 else None

    @property
    def registrations(self) -> list[Registration]:
        """All handlers, in the order they were registered; those of a group where it was included."""
        found: list[Registration] = []
        for member in self._members:
            found += member.registrations if isinstance(member, Handlers) else [member]
        return found

    @property
    def queues(self) -> list[str]:
        """The queues of all handlers, in the order of `registrations`."""
        return list(dict.fromkeys(registration.queue for registration in self.registrations))

    @contextmanager
    def serving(self) -> Iterator[None]:
        """While a worker runs, nothing can be added: its queues, limits and batches are fixed when it starts."""
        self._workers += 1
        try:
            yield
        finally:
            self._workers -= 1

    def _refuse_while_serving(self, what: str) -> None:
        """Refuse what comes too late for a worker that runs.

        Raises:
            ConfigurationError: one does.
        """
        if any(each._workers for each in self._self_and_above()):
            raise ConfigurationError(
                f"{what} comes after a worker of its app has started, which would not know it: register it before, "
                "where the app is made"
            )

    def _self_and_included(self) -> Iterator[Handlers[Any]]:
        """This group and all that it includes, in order."""
        yield self
        for member in self._members:
            if isinstance(member, Handlers):
                yield from member._self_and_included()

    def _self_and_above(self) -> list[Handlers[Any]]:
        """This group and all that include it, each once."""
        found: list[Handlers[Any]] = [self]
        for each in found:  # grows
            found += [above for above in each._included_by if above not in found]
        return found

    def _add(self, registration: Registration) -> None:
        self._refuse_while_serving(f"the handler {registration.name}")
        above = self._self_and_above()
        for each in above:
            each._check(registration)
        self._members.append(registration)
        for each in above:
            each._index(registration)

    def _check(self, registration: Registration) -> None:
        for name in names_of(registration):
            taken = self._by_kind.get(name)
            if taken is not None:
                again = taken is registration
                raise ConfigurationError(
                    f"the kind {name!r} has two handlers, {taken.name} and {registration.name}: "
                    f"{'its group is included twice, include it once' if again else 'remove one or rename the kind'}"
                )

    def _index(self, registration: Registration) -> None:
        for name in names_of(registration):
            self._by_kind[name] = registration
        self._by_queue.setdefault(registration.queue, []).append(registration)


def names_of(registration: Registration) -> tuple[str, ...]:
    """All kinds that a handler answers to."""
    return (registration.kind, *registration.payload.__aliases__)


_MOST = 10_000
_LONGEST = 60.0


class BatchOptions(msgspec.Struct, frozen=True):
    """The batches of a kind.

    Attributes:
        batch: most jobs of one call.
        linger: seconds the first one waits for others.
    """

    batch: int
    linger: float


def batch_options(batch: int | None = None, linger: float | None = None) -> BatchOptions | None:
    """The batches that a handler's options describe; ``None`` without ``batch=``.

    Args:
        batch: most jobs of one call.
        linger: seconds the first one waits for others; 0.05 unless given.

    Raises:
        ValueError: the options are wrong.
    """
    if batch is None:
        if linger is not None:
            raise ValueError("linger says nothing without batch=")
        return None
    if isinstance(batch, bool) or not 1 <= batch <= _MOST:
        raise ValueError(f"batch={batch!r} must be from 1 to {_MOST}")
    if linger is not None and not 0 <= linger <= _LONGEST:
        raise ValueError(f"linger={linger!r} must be seconds from 0 to {_LONGEST:g}")
    return BatchOptions(batch, 0.05 if linger is None else linger)


class Batch(Protocol):
    """The jobs of one call, in place of the payload."""

    def begin(self, context: Any) -> tuple[list[Any], list[Any]]:
        """Start the clock of every job; returns (payloads, contexts)."""

    def end(self, value: Any) -> None:
        """Take what the function returned.

        Raises:
            TypeError: it is not one outcome for each job.
        """


def batch_handler(function: Callable[..., Any], *, is_async: bool, wants_contexts: bool) -> Callable[..., Any]:
    """A function of a batch that calls a function of lists.

    Args:
        function: takes a list of payloads, and perhaps a list of contexts.
        is_async: it is awaited.
        wants_contexts: it takes both.
    """

    def arguments(batch: Batch, context: Any) -> tuple[list[Any], ...]:
        payloads, contexts = batch.begin(context)
        return (payloads, contexts) if wants_contexts else (payloads,)

    if is_async:

        @wraps(function)
        async def call(batch: Batch, context: Any) -> None:
            batch.end(await function(*arguments(batch, context)))

    else:

        @wraps(function)
        def call(batch: Batch, context: Any) -> Any:
            value = function(*arguments(batch, context))
            if inspect.isawaitable(value):
                return _awaited(batch, value)  # a function around an async one
            batch.end(value)
            return None

    return call


async def _awaited(batch: Batch, value: Awaitable[Any]) -> None:
    batch.end(await value)

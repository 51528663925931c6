"""Payload types and the registry that leads from a kind to its handler, its type and its policy."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Final, Generic, get_type_hints, overload

import msgspec
from typing_extensions import TypeVar, dataclass_transform

from streamworker import codec
from streamworker.context import Context
from streamworker.errors import ConfigurationError
from streamworker.limits import Quota, quota
from streamworker.policy import Backoff, Limits
from streamworker.setting_rules import QUEUE_NAME

QUOTA: Final = ("concurrency", "rate", "burst", "limit_by")
KIND_NAME: Final = re.compile(r"[^\s\x00-\x1f\x7f]{1,200}")

P = TypeVar("P", bound="Payload")
S = TypeVar("S", default=Any)
R = TypeVar("R")


def check_queue(name: str) -> str:
    """``name``, if it is a queue name.

    Raises:
        ConfigurationError: it is not.
    """
    if not QUEUE_NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} is no queue name: use 1 to 100 of A-Z a-z 0-9 . _ : - and do not end in :high or :low"
        )
    return name


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class _PayloadMeta(msgspec.StructMeta):
    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        /,
        *,
        kind: str | None = None,
        queue: str | None = None,
        aliases: tuple[str, ...] = (),
        **options: Any,
    ) -> Any:
        root = bases == (msgspec.Struct,)
        if not root:
            if kind is None or queue is None:
                raise TypeError(f"{name} needs a kind and a queue: class {name}(Payload, kind='...', queue='...')")
            if hasattr(aliases, "lower"):  # one string would be taken letter by letter
                raise TypeError(f"{name}: aliases={aliases!r} must be a tuple of kinds")
            for each in (kind, *aliases):
                if not KIND_NAME.fullmatch(each):
                    raise TypeError(f"{name}: {each!r} is no kind: use 1 to 200 characters without white space")
            check_queue(queue)
        cls: Any = super().__new__(mcls, name, bases, namespace, frozen=True, **options)
        cls.__kind__, cls.__queue__, cls.__aliases__ = kind, queue, tuple(aliases)
        return cls


class Payload(msgspec.Struct, metaclass=_PayloadMeta):
    """The typed data of a job, a frozen msgspec struct.

    Class keywords: ``kind`` (the stable name that picks the handler), ``queue``, and ``aliases``, older kinds that this
    type still answers to. The JSON holds the fields and nothing else; fields added later need defaults.
    """

    __kind__: ClassVar[str]
    __queue__: ClassVar[str]
    __aliases__: ClassVar[tuple[str, ...]]


class Registration(msgspec.Struct, frozen=True):
    """One handler: what it is called for, how it is called, and what it grants its jobs."""

    kind: str
    queue: str
    payload: type[Payload]
    function: Callable[..., Any]
    decode: Callable[[msgspec.Raw], Any]
    limits: Limits
    is_async: bool
    wants_context: bool
    quota: Quota | None = None
    special: bool = False
    """It does not simply run: it is limited, or gathered."""

    @property
    def name(self) -> str:
        """The function's dotted name, for people."""
        target = inspect.unwrap(self.function)
        return f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', repr(target))}"


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


class Handlers(Generic[S]):
    """A group of handlers, registered by the kind of their payload.

    ``S`` is the type of ``ctx.services``. Groups of several files come together with `include`.
    """

    def __init__(self) -> None:
        self._by_kind: dict[str, Registration] = {}
        self._by_queue: dict[str, list[Registration]] = {}

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
    ) -> Decorator[S]: ...
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

        Raises:
            ConfigurationError: the function cannot be a handler, or its kind has one.
        """
        try:
            limited = quota(**{name: options.pop(name) for name in QUOTA if name in options})
            limits = Limits(**options)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"the handler's options are wrong: {error}") from None
        scope = sys._getframe(1).f_locals  # payload types defined inside functions are visible only there
        decorator = Decorator[S](lambda target: self._add(_registration(target, limits, limited, scope)))
        return decorator if function is None else decorator(function)

    def include(self, *groups: Handlers[S]) -> None:
        """Take over all handlers of other groups.

        Raises:
            ConfigurationError: a kind has two handlers.
        """
        for group in groups:
            for registration in group.registrations:
                self._add(registration)

    def handler_of(self, kind: str | None, queue: str) -> Registration | None:
        """The handler of a kind; without a kind, that of a queue with exactly one handler."""
        if kind:
            return self._by_kind.get(kind)
        only = self._by_queue.get(queue, ())
        return only[0] if len(only) == 1 else None

    @property
    def registrations(self) -> list[Registration]:
        """All handlers, in the order they were registered."""
        return list(dict.fromkeys(self._by_kind.values()))

    @property
    def queues(self) -> list[str]:
        """The queues of all handlers, in the order they were registered."""
        return list(self._by_queue)

    def _add(self, registration: Registration) -> None:
        names = (registration.kind, *registration.payload.__aliases__)
        for name in names:
            taken = self._by_kind.get(name)
            if taken is not None:
                raise ConfigurationError(
                    f"the kind {name!r} has two handlers, {taken.name} and {registration.name}: "
                    "remove one or rename the kind"
                )
        for name in names:
            self._by_kind[name] = registration
        self._by_queue.setdefault(registration.queue, []).append(registration)


def _registration(
    function: Callable[..., Any], limits: Limits, limited: Quota | None, scope: Mapping[str, Any]
) -> Registration:
    name = getattr(function, "__qualname__", repr(function))
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
    payload = _annotation(function, parameters[0], scope)
    if not (isinstance(payload, type) and issubclass(payload, Payload)) or payload is Payload:
        raise ConfigurationError(f"the first parameter of {name} must be annotated with its Payload class")
    target = _underlying(function)
    if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise ConfigurationError(f"{name} yields: calling it runs nothing, so it cannot be a handler")
    if limited is not None and limited.limit_by and limited.limit_by not in payload.__struct_fields__:
        raise ConfigurationError(f"the handler {name} is limited by {limited.limit_by!r}, no field of its payload")
    return Registration(
        kind=payload.__kind__,
        queue=payload.__queue__,
        payload=payload,
        function=function,
        decode=codec.payload_decoder(payload),
        limits=limits,
        is_async=inspect.iscoroutinefunction(_outermost(function)),
        wants_context=len(parameters) == 2 and _is_context(parameters[1]),
        quota=limited,
        special=limited is not None,
    )


def _outermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is really called: decorators stay, partials and callable objects are seen through."""
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
        raise ConfigurationError(
            f"the annotation {annotation!r} of a handler's payload cannot be resolved: import it at run time ({error})"
        ) from None

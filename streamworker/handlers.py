"""The registry that leads from a kind to its handler, its type and its policy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final, Generic, overload

from typing_extensions import TypeVar

from streamworker.context import Context
from streamworker.errors import ConfigurationError
from streamworker.gathering import gathering
from streamworker.limits import quota
from streamworker.payload import Payload, check_queue
from streamworker.policy import Backoff, Limits
from streamworker.registration import Registration, registered

__all__ = ["Decorator", "GatheringDecorator", "Handlers", "Payload", "Registration", "check_queue"]

QUOTA: Final = ("concurrency", "rate", "burst", "limit_by")
GATHERING: Final = ("batch", "linger")

P = TypeVar("P", bound=Payload)
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


class GatheringDecorator(Generic[S]):
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
    ) -> GatheringDecorator[S]: ...
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
            batch: most jobs of one call. The function then takes a ``list`` of payloads, and may take a list of their
                contexts; it returns ``None`` when all went well, or a list as long with exceptions for some.
            linger: seconds the first job of a batch waits for others; 0.05 unless given.

        Raises:
            ConfigurationError: the function cannot be a handler, or its kind has one.
        """
        try:
            limited = quota(**{name: options.pop(name) for name in QUOTA if name in options})
            together = gathering(**{name: options.pop(name) for name in GATHERING if name in options})
            limits = Limits(**options)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"the handler's options are wrong: {error}") from None
        scope = sys._getframe(1).f_locals  # payload types defined inside functions are visible only there

        def register(target: Callable[..., Any]) -> None:
            self._add(registered(target, scope, limits=limits, quota=limited, together=together))

        decorator = Decorator[S](register) if together is None else GatheringDecorator[S](register)
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

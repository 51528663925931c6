"""The registry that leads from a kind to its handler, its type and its policy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Generic, overload
from weakref import WeakSet

from typing_extensions import TypeVar

from streamworker.context import Context
from streamworker.errors import ConfigurationError, UsageError
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
        """What a group has besides handlers that cannot be included elsewhere, in words. Only apps have such."""
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
        """While a worker runs, nothing can be added: it has looked which queues, limits and batches there are."""
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

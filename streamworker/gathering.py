"""Handlers that are called for several jobs at once: how those are gathered, and how such a call is made."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, Protocol

import msgspec

_MOST = 10_000
_LONGEST = 60.0


class Gathering(msgspec.Struct, frozen=True):
    """How jobs of one kind are gathered.

    Attributes:
        batch: most jobs of one call.
        linger: seconds the first one waits for others.
    """

    batch: int
    linger: float


def gathering(batch: int | None = None, linger: float | None = None) -> Gathering | None:
    """What a handler's options come to; ``None`` without any.

    Args:
        batch: most jobs of one call.
        linger: seconds the first one waits for others; 0.05 unless given.

    Raises:
        ValueError: they are none.
    """
    if batch is None:
        if linger is not None:
            raise ValueError("linger says nothing without batch=")
        return None
    if isinstance(batch, bool) or not 1 <= batch <= _MOST:
        raise ValueError(f"batch={batch!r} must be from 1 to {_MOST}")
    if linger is not None and not 0 <= linger <= _LONGEST:
        raise ValueError(f"linger={linger!r} must be seconds from 0 to {_LONGEST:g}")
    return Gathering(batch, 0.05 if linger is None else linger)


class Batch(Protocol):
    """The jobs of one call; it stands in for the payload."""

    def begin(self, context: Any) -> tuple[list[Any], list[Any]]:
        """(payloads, contexts) of the jobs, whose clock starts."""

    def end(self, value: Any) -> None:
        """Take what the function returned.

        Raises:
            TypeError: that says not what became of each job.
        """


def gathered(function: Callable[..., Any], *, is_async: bool, wants_contexts: bool) -> Callable[..., Any]:
    """A handler of batches that calls a function of lists.

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

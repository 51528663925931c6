"""What a function is as a handler: which payload it takes, how it is called, and what it grants its jobs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from streamworker.errors import ConfigurationError
from streamworker.gathering import Gathering, gathered
from streamworker.limits import Quota
from streamworker.payload import Payload, decoder_of, place_of
from streamworker.policy import Limits


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
    together: Gathering | None = None
    special: bool = False
    """It does not simply run: it is limited, or called for several jobs at once."""

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
    together: Gathering | None = None,
) -> Registration:
    """What a function is registered as.

    Args:
        function: the handler.
        scope: names that are visible where it was decorated.
        limits: what it grants its jobs.
        quota: what its kind may do in the whole fleet.
        together: how jobs are gathered, if it is called for several at once.

    Raises:
        ConfigurationError: it cannot be a handler.
    """
    name = getattr(function, "__qualname__", repr(function))
    parameters = _parameters(function, name)
    payload, annotation = _payload(name, _annotation(function, parameters[0], scope), together)
    target = _underlying(function)
    if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise ConfigurationError(f"{name} yields: calling it runs nothing, so it cannot be a handler")
    if quota is not None and quota.limit_by and quota.limit_by not in payload.__struct_fields__:
        raise ConfigurationError(f"the handler {name} is limited by {quota.limit_by!r}, no field of its payload")
    is_async = inspect.iscoroutinefunction(_outermost(function))
    wants_context = len(parameters) == 2 and _is_context(parameters[1])
    if together is not None:
        function, wants_context = gathered(function, is_async=is_async, wants_contexts=wants_context), True
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
        special=quota is not None or together is not None,
    )


def _payload(name: str, annotation: Any, together: Gathering | None) -> tuple[type[Payload], Any]:
    """The payload's class by the annotation of the first parameter, and what is decoded: ``Box[int]`` of a ``Box``."""
    if together is not None:
        if get_origin(annotation) is not list:
            raise ConfigurationError(
                f"the first parameter of {name}, which has batch=, must be a list of its Payload class"
            )
        (annotation,) = get_args(annotation)
    cls = get_origin(annotation) or annotation
    if not (isinstance(cls, type) and issubclass(cls, Payload)) or cls is Payload:
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
        target = _underlying(function)
        name = getattr(target, "__qualname__", repr(target))
        raise ConfigurationError(
            f"{place_of(target)}: the annotation {annotation!r} of a handler's payload cannot be resolved: import it "
            f"at run time for {name}, not for type checkers alone ({error})"
        ) from None

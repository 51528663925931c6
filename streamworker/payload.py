"""Payload types: the typed data of jobs, which names their kind and their queue."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import (
    Any,
    ClassVar,
    Final,
    Literal,
    NamedTuple,
    Protocol,
    TypeAlias,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import msgspec
from msgspec import inspect as kinds
from typing_extensions import dataclass_transform

from streamworker.errors import ConfigurationError, UsageError
from streamworker.settings.rules import QUEUE_NAME

KIND_NAME: Final = re.compile(r"[^\s\x00-\x1f\x7f]{1,200}")


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


class Fit(NamedTuple):
    """The checks of a payload's JSON text at enqueue.

    Attributes:
        decode: the type's own decoder: what it refuses, every worker would.
        finite: no field of it can hold a float, so that none can hold NaN or an infinity, which JSON writes as null.
        compares: a payload that equals what its JSON text is decoded to has lost none.
        encode: writes a payload as JSON text.
    """

    decode: Callable[[msgspec.Raw], Any]
    finite: bool
    compares: bool
    encode: Callable[[Any], bytes] = msgspec.json.encode


def _check_names(head: str, kind: str | None, queue: str | None, aliases: tuple[str, ...]) -> None:
    """Refuse a payload class without a kind or a queue, or with names that are none.

    Args:
        head: of its statement, for the sentence: ``Send(Payload``.
        kind: the class keyword.
        queue: the class keyword.
        aliases: the class keyword.
    """
    name = head.partition("(")[0]
    if kind is None or queue is None:
        raise TypeError(f"{name} needs a kind and a queue: class {head}, kind='...', queue='...')")
    if hasattr(aliases, "lower"):  # a string would be split into letters
        raise TypeError(f"{name}: aliases={aliases!r} must be a tuple of kinds")
    for each in (kind, *aliases):
        if not KIND_NAME.fullmatch(each):
            raise TypeError(f"{name}: {each!r} is no kind: use 1 to 200 characters without white space")
    check_queue(queue)


MOST_KEY_BYTES: Final = 200
"""Most bytes of an order key, and of a fairness key."""


def _name_lines(cls: Any, order_by: str | None, fair_by: str | None, on_dead: str) -> None:
    """Keep the class keywords about lines."""
    cls.__lines__ = None if order_by is None and fair_by is None else (order_by, fair_by)
    cls.__halts__ = on_dead == "halt"
    if on_dead not in ("continue", "halt") or (on_dead == "halt" and order_by is None):
        raise TypeError(f"{cls.__name__}: on_dead={on_dead!r} must be 'continue', or 'halt' beside order_by")


def _check_lines(cls: Any) -> None:
    for option, field in zip(("order_by", "fair_by"), cls.__lines__ or (), strict=False):
        if field is not None and field not in fields_of(cls):
            raise TypeError(f"{cls.__name__}: {option}={field!r} names no field of it")


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
        order_by: str | None = None,
        fair_by: str | None = None,
        on_dead: Literal["continue", "halt"] = "continue",
        **options: Any,
    ) -> Any:
        root = bases == (msgspec.Struct,)
        if not root:
            _check_names(f"{name}(Payload", kind, queue, aliases)
            if "<locals>" in namespace.get("__qualname__", ""):
                _resolve(namespace, sys._getframe(1))
        cls: Any = super().__new__(mcls, name, bases, namespace, frozen=True, **options)
        cls.__kind__, cls.__queue__, cls.__aliases__ = kind, queue, tuple(aliases)
        cls.__fit__ = None
        _name_lines(cls, order_by, fair_by, on_dead)
        _check_lines(cls)
        return cls


class Payload(msgspec.Struct, metaclass=_PayloadMeta):
    """The typed data of a job, a frozen msgspec struct.

    Class keywords: ``kind`` (the stable name that picks the handler), ``queue``, and ``aliases``, older kinds that this
    type still answers to. The JSON holds the fields and nothing else; fields added later need defaults.

    ``order_by`` names a field: of the jobs with one value at most one runs at a time, in the order in which they were
    enqueued. A dead one lets the next one start (``on_dead="continue"``), or holds the others until an operator replays
    or deletes it (``on_dead="halt"``). ``fair_by`` names a field whose values are tenants: each gets its share of the
    starts.
    """

    __kind__: ClassVar[str]
    __queue__: ClassVar[str]
    __aliases__: ClassVar[tuple[str, ...]]
    __fit__: ClassVar[Fit | None]
    __lines__: ClassVar[tuple[str | None, str | None] | None]
    __halts__: ClassVar[bool]


def line_keys(payload: Any, lines: tuple[str | None, str | None]) -> tuple[str | None, str | None]:
    """(order key, fairness key) of a payload; ``None`` where its field is ``None`` or empty.

    Raises:
        UsageError: a value has more than `MOST_KEY_BYTES` bytes.
    """
    order_by, fair_by = lines
    return _key_in(payload, order_by), _key_in(payload, fair_by)


def _key_in(payload: Any, field: str | None) -> str | None:
    value = getattr(payload, field) if field is not None else None
    if value is None or value == "":
        return None
    plain = value if isinstance(value, str) else msgspec.to_builtins(value)
    text = plain if isinstance(plain, str) else msgspec.json.encode(plain).decode()
    if len(text.encode(errors="replace")) > MOST_KEY_BYTES:
        where = f"{type(payload).__name__}.{field}"
        raise UsageError(f"{where} has more than {MOST_KEY_BYTES} bytes and cannot be a key: give a shorter one")
    return text


class PayloadBase:
    """Base of payload types that are no msgspec structs; those of `streamworker.integrations` derive from it.

    Class keywords: those of `Payload`.
    """

    __kind__: ClassVar[str]
    __queue__: ClassVar[str]
    __aliases__: ClassVar[tuple[str, ...]]
    __fit__: ClassVar[Fit | None]
    __lines__: ClassVar[tuple[str | None, str | None] | None]
    __halts__: ClassVar[bool]

    def __init_subclass__(
        cls,
        *,
        kind: str | None = None,
        queue: str | None = None,
        aliases: tuple[str, ...] = (),
        order_by: str | None = None,
        fair_by: str | None = None,
        on_dead: Literal["continue", "halt"] = "continue",
        **options: Any,
    ) -> None:
        """Check and keep the names, as `Payload` does."""
        super().__init_subclass__(**options)
        if PayloadBase in cls.__bases__:  # of an integration: users derive from that
            return
        _check_names(f"{cls.__name__}({cls.__bases__[0].__name__}", kind, queue, aliases)
        cls.__kind__, cls.__queue__, cls.__aliases__ = kind or "", queue or "", tuple(aliases)
        cls.__fit__ = None
        _name_lines(cls, order_by, fair_by, on_dead)

    @classmethod
    def payload_fields(cls) -> Collection[str]:
        """The names of its fields.

        Raises:
            ConfigurationError: the class cannot be a payload.
        """
        return ()

    @classmethod
    def payload_fit(cls) -> Fit:
        """How it is written, read and checked.

        Raises:
            ConfigurationError: the class cannot be a payload.
        """
        return _struct_fit(cls)

    def payload_builtins(self) -> Any:
        """Its fields in dicts and lists, in which NaN and infinities are looked for."""
        return msgspec.to_builtins(self)


AnyPayload: TypeAlias = Payload | PayloadBase
"""What jobs are made of."""
ROOTS: Final = (Payload, PayloadBase)


def is_payload_class(cls: Any) -> bool:
    """Whether jobs can be made of its instances: it has a kind and a queue."""
    return isinstance(cls, type) and issubclass(cls, ROOTS) and bool(getattr(cls, "__kind__", None))


def fields_of(cls: type[AnyPayload]) -> Collection[str]:
    """The names of a payload class's fields."""
    return cls.payload_fields() if issubclass(cls, PayloadBase) else cls.__struct_fields__


def fit_of(type_: type[AnyPayload]) -> Fit:
    """The checks of a payload class, made at the first call.

    Raises:
        ConfigurationError: the class cannot be decoded.
    """
    fit = type_.__fit__
    if fit is None:
        if issubclass(type_, PayloadBase):
            fit = type_.payload_fit()
            _check_lines(type_)  # its fields were not known when the class was made
        else:
            fit = _struct_fit(type_)
        type_.__fit__ = fit
    return fit


def _struct_fit(type_: Any) -> Fit:
    """The checks of a type that msgspec knows."""
    decode, parts = _msgspec_decoder(type_), list(_parts(kinds.type_info(type_)))
    return Fit(decode, not any(map(_may_hold_floats, parts)), all(map(_compares, parts)))


def decoder_of(type_: Any) -> Callable[[msgspec.Raw], Any]:
    """A decoder of payloads of one type; it raises `msgspec.ValidationError` with the path of what is wrong.

    Args:
        type_: a payload's class, or a generic one with its arguments.

    Raises:
        ConfigurationError: the type cannot be decoded; the sentence names class, field, file and line.
    """
    if isinstance(type_, type) and issubclass(type_, PayloadBase):
        return fit_of(type_).decode
    return _msgspec_decoder(type_)


def _msgspec_decoder(type_: Any) -> Callable[[msgspec.Raw], Any]:
    try:
        return msgspec.json.Decoder(type_).decode
    except Exception as error:  # noqa: BLE001 - evaluating a user's annotations may raise anything
        found = next(_unresolved(type_, set()), None)
        if found is not None:
            raise ConfigurationError(found) from None
        cls = get_origin(type_) or type_
        raise ConfigurationError(f"{place_of(cls)}: the payload {cls.__name__} cannot be decoded: {error}") from None


def place_of(thing: Any, field: str | None = None) -> str:
    """``file:line`` of a user's class or function, or of a class's field; its module where there is no source."""
    try:
        lines, start = inspect.getsourcelines(thing)
        file = inspect.getsourcefile(thing)
    except (OSError, TypeError):
        return str(getattr(thing, "__module__", "?"))
    offset = 0
    if field is not None:
        pattern = re.compile(rf"\s*{re.escape(field)}\s*:")
        offset = next((number for number, line in enumerate(lines) if pattern.match(line)), 0)
    return f"{file}:{start + offset}"


def _resolve(namespace: dict[str, Any], frame: Any) -> None:
    """Evaluate annotations of a class inside a function while the function's names are in scope."""
    for name, annotation in namespace.get("__annotations__", {}).items():
        holder = type("_", (), {"__annotations__": {name: annotation}})
        try:
            hints = get_type_hints(holder, frame.f_globals, {**frame.f_locals, **namespace}, include_extras=True)
        except Exception:  # noqa: BLE001, S112 - it may name what is defined later; `decoder_of` says what is wrong
            continue
        namespace["__annotations__"][name] = hints[name]


def _unresolved(type_: Any, seen: set[Any]) -> Iterator[str]:
    """A sentence for each field of a class, or of classes it is made of, whose annotation cannot be evaluated."""
    cls = get_origin(type_) or type_
    for argument in get_args(type_):
        yield from _unresolved(argument, seen)
    if not isinstance(cls, type) or cls in seen or cls.__module__ in ("builtins", "msgspec"):
        return
    seen.add(cls)
    for base in reversed(cls.__mro__):
        for field, annotation in vars(base).get("__annotations__", {}).items():
            holder = type("_", (), {"__annotations__": {field: annotation}})
            module = getattr(sys.modules.get(base.__module__), "__dict__", {})
            try:
                hint = get_type_hints(holder, module, dict(vars(base)), include_extras=True)[field]
            except Exception as error:  # noqa: BLE001 - a user's annotation may raise anything
                yield (
                    f"{place_of(base, field)}: the type {annotation!r} of {base.__name__}.{field} cannot be resolved: "
                    f"import it at run time, not for type checkers alone ({error})"
                )
                continue
            yield from _unresolved(hint, seen)


def _parts(info: Any) -> Iterator[Any]:
    """All types that a type is made of, as `msgspec.inspect` describes them; itself included."""
    waiting, seen = [info], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, tuple):
            waiting += each
        elif isinstance(each, msgspec.Struct) and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [getattr(each, name) for name in each.__struct_fields__]


def _may_hold_floats(part: Any) -> bool:
    return isinstance(part, _ANY | kinds.FloatType)


def _compares(part: Any) -> bool:
    """Whether values of a type that are equal hold the same floats: users may have written ``__eq__`` themselves."""
    if isinstance(part, kinds.StructType):
        return bool(part.cls.__eq__ is msgspec.Struct.__eq__)
    return not isinstance(part, _ANY | kinds.DataclassType)


_ANY: Final = kinds.AnyType | kinds.CustomType


def infinity_in(value: Any) -> str | None:
    """Where something that was written as JSON holds NaN or an infinity: ``.field[0]``; ``None`` if it holds none."""
    try:
        value = value.payload_builtins() if isinstance(value, PayloadBase) else msgspec.to_builtins(value)
    except Exception:  # noqa: BLE001 - it holds JSON as it is, or an object of a user's
        value = msgspec.structs.asdict(value) if isinstance(value, msgspec.Struct) else value
    return next(_infinities(value, ""), None)


def _infinities(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _infinities(each, f"{path}.{name}")
    elif isinstance(value, list | tuple | set | frozenset):
        for number, each in enumerate(value):
            yield from _infinities(each, f"{path}[{number}]")


# -- payloads that are kept in a store
STORED: Final = "streamworker_stored"
"""The one field of a payload in whose place a store has the data."""
_STORED: Final = STORED.encode()
MOST_STORED: Final = 64 * 1_048_576
"""Bytes of the largest payload that is put into a store."""


class StoredPayload(msgspec.Struct, frozen=True):
    """Reference to a payload in a store: what the document has in its place.

    Attributes:
        id: of the data in the store.
        sha256: of the data, as 64 hexadecimal digits.
        size: bytes of the data.
    """

    id: str
    sha256: str
    size: int

    def trouble_with(self, data: bytes) -> str | None:
        """Why this is not the data; ``None`` if it is."""
        if len(data) != self.size:
            return f"the store has {len(data)} bytes and the job says {self.size}"
        if sha256(data).hexdigest() != self.sha256:
            return "the store has other data than the job says: its SHA-256 differs"
        return None


class PayloadStore(Protocol):
    """Keeps payloads that are too large for a document: `App(store=...)` (docs/offload.md).

    What cannot be done now raises an exception, and is done again later: a store that is away loses no job.
    """

    async def put(self, id: str, data: bytes, /) -> None:  # noqa: A002
        """Store data under a new id."""

    async def get(self, id: str, /) -> bytes | None:  # noqa: A002
        """The data; ``None`` only if the store is there, and has no such data any more."""

    async def delete(self, ids: Sequence[str], /) -> None:
        """Delete data; ids that are not there are no error."""


@runtime_checkable
class SweptStore(PayloadStore, Protocol):
    """A `PayloadStore` in which the relay finds what no job refers to."""

    async def idle(self, seconds: float, /) -> list[str]:
        """Ids of some data that for so long was neither written, read nor kept."""

    async def keep(self, ids: Sequence[str], /) -> None:
        """These are in use: they are not idle from now on."""


class _Reference(msgspec.Struct):
    streamworker_stored: StoredPayload


_reference: Final = msgspec.json.Decoder(_Reference).decode


def reference_to(id: str, data: bytes) -> msgspec.Raw:  # noqa: A002
    """The payload that stands for data in a store."""
    return msgspec.Raw(msgspec.json.encode(_Reference(StoredPayload(id, sha256(data).hexdigest(), len(data)))))


def stored_in(payload: msgspec.Raw | bytes | None) -> StoredPayload | None:
    """The reference that a payload is; ``None`` for one that is the data itself."""
    if payload is None or _STORED not in bytes(memoryview(payload)[:40]):
        return None
    try:
        return _reference(payload).streamworker_stored
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def refuse_stored(payload: msgspec.Raw) -> msgspec.Raw:
    """The payload, whose fields are to be changed.

    Raises:
        UsageError: its data is in a store.
    """
    if stored_in(payload) is not None:
        raise UsageError("its payload is in a store: give the whole payload, not fields of it")
    return payload

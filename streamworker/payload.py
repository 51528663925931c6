"""Payload types: the typed data of jobs, which names their kind and their queue."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Final

import msgspec
from typing_extensions import dataclass_transform

from streamworker.errors import ConfigurationError
from streamworker.setting_rules import QUEUE_NAME

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

"""Every key in Redis, from the properties of `streamworker.broker.keys`."""

from __future__ import annotations

import inspect
from typing import Final

from streamworker.broker.keys import ListKeys, QueueKeys, worker_key
from streamworker.job import LEVELS
from tools.reference.tables import code, table

_TYPES: Final = {
    "Sorted set": "zset",
    "Hash": "hash",
    "Stream": "stream",
    "Set": "set",
    "List": "list",
    "String": "string",
}
_LIMIT: Final = ("zset", "zset", "string")
_NOT_KEYS: Final = {"name", "base", "places", "streams", "lists", "types"}


def page() -> str:
    """The page."""
    stream, lists = QueueKeys("Q"), ListKeys("Q")
    rows = [
        [code(stream.stream(level)), "stream", f"Ready jobs, level {level}: one entry with the field `job`."]
        for level in LEVELS
    ]
    rows += _properties(QueueKeys, stream)
    rows.append(
        [code(stream.key("K")), "string", _doc(QueueKeys.key) + " → the id of the job, while it is remembered."]
    )
    rows += [[code(key), kind, _doc(QueueKeys.limit)] for key, kind in zip(stream.limit("NAME"), _LIMIT, strict=True)]
    only = [[code(lists.ready(level)), "list", f"{_doc(ListKeys.ready)} ({level})"] for level in LEVELS]
    only.append([code(lists.claimed("ID")), "list", _doc(ListKeys.claimed)])
    only += [row for row in _properties(ListKeys, lists) if row not in rows]
    worker = [
        code(worker_key("", "ID")),
        "hash",
        _doc(worker_key) + "; it ends by itself, soon after the worker.",
    ]
    head = ["key", "type", "what"]
    return f"""# Keys in Redis

Made from `streamworker.broker.keys`; `Q` is a queue, `ID` a worker, `K` a deduplication key of yours. The braces are literal:
all keys of a queue share a slot of a Redis Cluster. `STREAMWORKER_NAMESPACE` goes before every key, as it is, but not before
the lists that legacy producers push to. The keys are part of what is pinned: [versions](../policy.md).

## Both modes

{table(head, [*rows, worker])}
In stream mode ready jobs lie in the streams, and the consumer group of the workers (`STREAMWORKER_GROUP`) knows who holds what.
`XLEN` of a stream is what waits plus what runs, because done means deleted.

## List mode alone

{table(head, only)}
What happens to them, step by step: [scripts](scripts.md), and the [design](../design.md#5-keys).
"""


def _properties(cls: type[QueueKeys], made: QueueKeys) -> list[list[str]]:
    rows = []
    for name, member in inspect.getmembers(cls, lambda each: isinstance(each, property)):
        if name not in _NOT_KEYS:
            key = getattr(made, name)
            rows.append([code(key), made.types.get(key) or _said(_doc(member)), _doc(member)])
    return rows


def _said(doc: str) -> str:
    """The type of a key by the first words about it.

    Raises:
        LookupError: they do not say.
    """
    return next(kind for words, kind in _TYPES.items() if doc.startswith(words))


def _doc(member: object) -> str:
    return " ".join((inspect.getdoc(member) or "").split()).rstrip(".")

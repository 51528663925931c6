"""Dead letters in groups: those of a queue and kind that failed alike, but for ids, numbers and quoted text.

The groups of a queue are found by one walk over its dead letters, without their documents, a thousand a call. Who looks
again and again (the dashboard, /metrics) reads only those that came since; when some have left, entry ids are compared.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from hashlib import sha1
from typing import Final, Protocol

import anyio
import msgspec

from streamworker.encryption import hidden
from streamworker.job import ERROR_BYTES, DeadError
from streamworker.redact import redact

MOST: Final = 1000
"""Most groups of a queue; the jobs of all further ones are one group."""
NEW: Final = 3600.0
"""Seconds for which a group counts as new."""
LONGEST: Final = 200
"""Characters of a group's message."""
OTHERS: Final = "(further errors)"

_SHAPES: Final = [
    (re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+"), "<url>"),
    (re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b"), "<address>"),
    (re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|`[^`]*`"), "<text>"),
    (re.compile(r"\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b"), "<id>"),
    (re.compile(r"\b0x[0-9a-fA-F]+\b"), "<address>"),
    (re.compile(r"\b(?=[0-9a-fA-F]*[0-9])(?=[0-9a-fA-F]*[a-fA-F])[0-9a-fA-F]{8,}\b"), "<id>"),
    (re.compile(r"\b(?=[0-9]*[A-Za-z])[0-9A-Za-z]*[0-9]{4,}[0-9A-Za-z]*\b"), "<id>"),
    (re.compile(r"[0-9]+(?:[.,:][0-9]+)*"), "<n>"),
]
_TYPED: Final = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:: |$)")
_TYPE: Final = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*")


def normalised(error: str, reason: str) -> str:
    """The type of an error and its message, without what differs from job to job.

    Args:
        error: the traceback of a dead letter, or what stands in its place.
        reason: its reason, where there is no error.
    """
    error = hidden(error)
    lines = [line.strip() for line in error.strip().splitlines() if line.strip() and not line.startswith((" ", "\t"))]
    last = next((line for line in reversed(lines) if _TYPED.match(line)), (lines[-1:] or [reason])[0])
    head, separator, message = last.partition(":")
    if not separator or not _TYPE.fullmatch(head):
        head, message = "", last
    for shape, word in _SHAPES:
        message = shape.sub(word, message)
    text = f"{head}: {message.strip()}" if head else message.strip()
    return " ".join(redact(text).split())[:LONGEST] or "(no error)"


def group_of(queue: str, kind: str, error: str, reason: str) -> str:
    """The id of the group of a dead letter."""
    # No more of it than `DeadReader.errors` reads.
    last = error.encode(errors="backslashreplace")[-ERROR_BYTES:].decode(errors="backslashreplace")
    return _digest(queue, kind, normalised(last, reason))


def _digest(queue: str, kind: str, text: str) -> str:
    return sha1(f"{queue}\0{kind}\0{text}".encode(errors="replace"), usedforsecurity=False).hexdigest()[:12]


class DeadGroup(msgspec.Struct):
    """Dead letters that failed alike.

    Attributes:
        group: its id.
        queue: whose dead letters.
        kind: of the jobs; empty where they have none.
        error: the type of the error and its message, without what differs from job to job.
        count: how many there are.
        first_s: epoch seconds at which the first one died.
        last_s: and the last one.
        sample: entry id of the last one.
        traceback: the end of its traceback.
        muted: by whom it was muted, and when; empty if it is not.
    """

    group: str
    queue: str
    kind: str
    error: str
    count: int
    first_s: float
    last_s: float
    sample: str
    traceback: str
    muted: str = ""

    def is_new(self, now: float) -> bool:
        """Whether its first letter died lately, and it is not muted (epoch seconds)."""
        return not self.muted and now - self.first_s < NEW


class DeadReader(Protocol):
    """What reads dead letters: an operator."""

    async def errors(self, queue: str, after: str = "", *, ids: bool = False) -> list[DeadError]:
        """Some dead letters, oldest first; empty behind the last."""

    async def muted(self, queue: str) -> dict[str, str]:
        """Muted groups."""


class _QueueIndex:
    """The dead letters of a queue, by group."""

    def __init__(self, queue: str) -> None:
        self._queue = queue
        self.groups: dict[str, DeadGroup] = {}
        self._of: dict[str, str] = {}  # entry id to group
        self.after = ""

    def __len__(self) -> int:
        return len(self._of)

    def add(self, letters: Iterable[DeadError]) -> None:
        for letter in letters:
            text, at = normalised(letter.error, letter.reason), _seconds(letter.handle)
            group = _digest(self._queue, letter.kind, text)
            if group not in self.groups and len(self.groups) >= MOST:
                text, group = OTHERS, _digest(self._queue, "", OTHERS)
            known = self.groups.get(group)
            if known is None:
                kind = "" if text == OTHERS else letter.kind
                known = self.groups[group] = DeadGroup(group, self._queue, kind, text, 0, at, at, letter.handle, "")
            known.count += 1
            known.last_s, known.sample = at, letter.handle
            known.traceback = redact(hidden(letter.error) or letter.reason)
            self._of[letter.handle] = group
            self.after = letter.handle

    def keep(self, there: set[str]) -> None:
        """Forget the letters that have left."""
        for handle in [each for each in self._of if each not in there]:
            group = self.groups[self._of.pop(handle)]
            group.count -= 1
            if not group.count:
                del self.groups[group.group]


class DeadGroups:
    """The groups of dead letters of some queues, as far as they were read; one update at a time.

    Args:
        reader: reads them.
    """

    def __init__(self, reader: DeadReader) -> None:
        self.reader: Final = reader
        self._queues: dict[str, _QueueIndex] = {}
        self._updating = anyio.Lock()

    async def update(self, queue: str, dead: int, budget: float = 60.0) -> bool:
        """Read what came since, and forget what has left; whether all was read.

        Args:
            queue: whose.
            dead: how many dead letters it has.
            budget: seconds after which the rest is left for the next time.
        """
        async with self._updating:
            return await self._read(queue, dead, budget)

    async def _read(self, queue: str, dead: int, budget: float) -> bool:
        if not dead:
            self._queues.pop(queue, None)
            return True
        index, deadline = self._queues.setdefault(queue, _QueueIndex(queue)), time.monotonic() + budget
        while letters := await self.reader.errors(queue, index.after):
            index.add(letters)
            if time.monotonic() > deadline:
                return False
        if len(index) > dead:
            there: set[str] = set()
            after = ""
            while page := await self.reader.errors(queue, after, ids=True):
                there |= {letter.handle for letter in page}
                after = page[-1].handle
            index.keep(there)
        muted = await self.reader.muted(queue)
        for group in index.groups.values():
            group.muted = muted.get(group.group, "")
        return True

    def of(self, queues: Sequence[str] | None = None) -> list[DeadGroup]:
        """The groups of some queues (``None``: of all), the one that failed last first."""
        found = [
            group
            for queue, index in self._queues.items()
            if queues is None or queue in queues
            for group in index.groups.values()
        ]
        return sorted(found, key=lambda group: (bool(group.muted), -group.last_s))


def _seconds(handle: str) -> float:
    at = handle.partition("-")[0]
    return int(at) / 1000 if at.isdigit() else 0.0

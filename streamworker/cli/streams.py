"""Standard output, which may go away: `| head` has seen enough, a disk is full.

A listing ends there (`write` raises). A command that changes things finishes its work all the same (`Report`).
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from streamworker.errors import StreamworkerError
from streamworker.redact import clean_block, cut_lines, redact

LONGEST: Final = 64_000
"""Characters that are said at once: a traceback has many."""


class Unread(Exception):
    """Standard output has no reader any more; later writes are dropped."""


def ensure() -> None:
    """Open what of the standard streams is closed (`>&-`): sockets would get their numbers, and our words.

    What a stream's encoding does not have is spelled out from now on.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            # It stays open until the process ends, and Python does not warn of that: as with its own streams.
            setattr(sys, name, open(null, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding (ISO-8859-1, ASCII) cannot show every character: it is spelled out.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def writing() -> Iterator[None]:
    """Around whatever writes to standard output.

    Raises:
        Unread: its reader is gone.
        StreamworkerError: it takes nothing for another reason.
    """
    try:
        yield
    except BrokenPipeError:
        _nowhere()
        raise Unread from None
    except OSError as error:
        _nowhere()
        raise StreamworkerError(f"standard output cannot be written: {error.strerror or error}") from error


def write(text: str) -> None:
    """Write; raises as `writing` does."""
    with writing():
        sys.stdout.write(text)


def flush() -> None:
    """Write what is still held back; raises as `writing` does."""
    with writing():
        sys.stdout.flush()


class Report:
    """What a command says about changes it makes: it makes all of them, whether or not there is a reader."""

    def __init__(self) -> None:
        self._trouble: StreamworkerError | None = None

    def write(self, text: str) -> None:
        """Write if that is still possible."""
        with self._tolerant():
            write(text)

    def flush(self) -> None:
        """Write what is still held back, if that is still possible."""
        with self._tolerant():
            flush()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except Unread:
            pass
        except StreamworkerError as error:
            self._trouble = error

    def end(self) -> None:
        """End the report: all changes are made and reported.

        Raises:
            StreamworkerError: not all could be written.
        """
        self.flush()
        if self._trouble is not None:
            raise StreamworkerError(f"{self._trouble}; the work was done, but not all of it could be told")


def _nowhere() -> None:
    """What is still held back goes nowhere, or Python would complain once more when it closes the stream."""
    null = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):
        os.dup2(null, sys.stdout.fileno())
    os.close(null)


def say(sentence: str) -> None:
    """One sentence on standard error, passwords hidden and controls spelled out."""
    # Not through the logs: they may not be configured yet, or be JSON for machines.
    with suppress(OSError, ValueError):  # standard error is closed; the exit code says it too
        print(f"streamworker: {clean_block(redact(cut_lines(sentence, LONGEST)))}", file=sys.stderr, flush=True)

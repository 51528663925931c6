"""What happened, as append-only files beside the system under test: one line is one write(2) with O_APPEND.

``enqueued`` by the producers, ``runs`` by the handlers, ``faults`` by the nemesis. Times are of the monotonic clock, which
all processes of one machine share, and of the wall clock for people.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamworker import Context


class Log:
    """One append-only file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def add(self, **fields: Any) -> None:
        line = json.dumps({**fields, "mono": time.monotonic(), "wall": time.time()}) + "\n"
        os.write(self._fd, line.encode())

    def close(self) -> None:
        os.close(self._fd)


def read(path: Path) -> list[dict[str, Any]]:
    """All lines. One that is just being written is read without its end, and counts next time."""
    return (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )


class Journal:
    """What handlers write."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._log = Log(directory / "runs") if directory is not None else None

    @classmethod
    def from_environment(cls) -> Journal:
        directory = os.environ.get("CRASH_DIR")
        return cls(Path(directory) if directory else None)

    @property
    def active(self) -> bool:
        return self._log is not None

    def has_gate(self, name: str) -> bool:
        return self._directory is not None and (self._directory / f"gate-{name}").exists()

    def open_gate(self, name: str) -> None:
        if self._directory is not None:
            (self._directory / f"gate-{name}").touch()

    @contextmanager
    def run(self, ctx: Context, **more: Any) -> Iterator[None]:
        """``started`` and how it ended: ``finished`` (the effect), ``cancelled``, or the name of the error."""
        facts = {
            "job": ctx.job.id, "worker": ctx.worker_id, "delivery": ctx.delivery, "attempt": ctx.attempt,
            "hop": ctx.job.hop, "place": ctx._claim.place, "entry": ctx._claim.entry.decode(), "count": ctx._claim.count,
            "threaded": threading.current_thread() is not threading.main_thread(),
            **more,
        }  # fmt: skip
        self._write("started", facts)
        try:
            yield
        except asyncio.CancelledError:
            self._write("cancelled", facts)
            raise
        except BaseException as error:
            self._write(type(error).__name__, facts)
            raise
        self._write("finished", facts)

    def _write(self, what: str, facts: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.add(what=what, **facts)

"""Valkey and PostgreSQL without installing either: what ``REDIS_URL=embedded`` means.

``acquire`` gives a program the addresses of a pair of servers that live under one state directory. Programs share them:
the first one starts a detached supervisor with both servers, each one holds a shared file lock while it lives, and the
servers stop a second after the last lock is gone, whether it was released or its holder was killed. The data stays.

Meant for development, demos and tests. Nothing here imports a client library or the server wheels.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from streamworker.embedded.binaries import find_binaries
from streamworker.embedded.layout import (
    FAILED,
    STARTING,
    Layout,
    Lock,
    Record,
    default_state_dir,
    open_layout,
    read_record,
)
from streamworker.embedded.users import await_servers, is_supervised, join_users
from streamworker.errors import ConfigurationError

__all__ = ["Description", "Servers", "acquire", "default_state_dir", "describe"]


class Servers:
    """The addresses of running servers, and the promise that they run until ``close()`` or the end of this process.

    A context manager. Children that this process forks or spawns have no share in the promise: they call ``acquire``
    themselves, or end before their parent does.
    """

    __slots__ = ("_lock", "database_url", "redis_url")

    def __init__(self, record: Record, lock: Lock) -> None:
        self.redis_url = record.redis_url
        self.database_url = record.database_url
        self._lock = lock

    def close(self) -> None:
        """Let go; the servers stop soon if no other program uses them. Never waits, harmless when repeated."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Description(NamedTuple):
    """What runs under a state directory, fit to be shown: the password is masked."""

    state: str  # stopped, starting (or starting again), ready, failed
    directory: Path
    log: Path
    supervisor_pid: int | None = None
    redis_pid: int | None = None
    postgres_pid: int | None = None
    redis_url: str | None = None
    database_url: str | None = None
    error: str = ""


def acquire(state_dir: Path, *, timeout: float = 30) -> Servers:
    """Use the embedded servers of a state directory, starting them if they do not run.

    Blocks: milliseconds if they run, about a second the first time.

    Args:
        state_dir: where the data lives; made if missing. Everything goes to its subdirectory ``embedded``.
        timeout: seconds to wait at most, also for an earlier pair that is stopping.

    Returns:
        Servers that answered a moment ago, used until ``close()``.

    Raises:
        ConfigurationError: the extra is not installed, the platform has no servers, or the directory cannot be used.
        Unreachable: the servers did not start, or not in time; the message names the log.
    """
    binaries = find_binaries()
    deadline = time.monotonic() + timeout
    try:
        layout = open_layout(Path(state_dir))
        users = join_users(layout, deadline)
        try:
            return Servers(await_servers(layout, binaries, deadline), users)
        except BaseException:
            users.close()
            raise
    except OSError as error:
        raise _unusable(state_dir, error) from error


def describe(state_dir: Path) -> Description:
    """Look at what runs under a state directory. Starts nothing, creates nothing, is no user.

    Args:
        state_dir: as given to ``acquire``.

    Raises:
        ConfigurationError: the directory cannot be read.
    """
    layout = Layout(Path(state_dir).resolve() / "embedded")
    try:
        supervised = is_supervised(layout)
        record = read_record(layout.record)
    except OSError as error:
        raise _unusable(state_dir, error) from error
    if record is not None and record.state == FAILED:
        return Description(FAILED, layout.root, layout.log, error=record.error)
    if not supervised:
        return Description("stopped", layout.root, layout.log)
    if record is None:
        return Description(STARTING, layout.root, layout.log)
    return Description(
        record.state,
        layout.root,
        layout.log,
        record.supervisor_pid,
        record.redis_pid,
        record.postgres_pid,
        record.masked_redis_url,
        record.database_url,
    )


def _unusable(state_dir: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"The state directory {state_dir} cannot be used ({error}): set STREAMWORKER_STATE_DIR to another one."
    )

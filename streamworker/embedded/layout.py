"""The files of the embedded pair, all in one private directory below the state directory."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from streamworker.errors import ConfigurationError

LOG_LIMIT = 1 << 20  # bytes after which a start moves a log aside, once


class Layout(NamedTuple):
    """Names inside ``STATE_DIR/embedded``, which is 0700 and ours alone."""

    root: Path

    @property
    def users_lock(self) -> Path:
        """Held shared by every user; the supervisor stops when it can have it exclusively."""
        return self.root / "users.lock"

    @property
    def supervisor_lock(self) -> Path:
        """Held exclusively by the one supervisor, from before it is spawned until it is dead."""
        return self.root / "supervisor.lock"

    @property
    def record(self) -> Path:
        """What runs, as the supervisor last published it."""
        return self.root / "servers.json"

    @property
    def log(self) -> Path:
        return self.root / "supervisor.log"

    @property
    def valkey(self) -> Path:
        return self.root / "valkey"

    @property
    def postgres(self) -> Path:
        return self.root / "postgres"


def open_layout(state_dir: Path) -> Layout:
    """Make the private directory, or check that the one that is there is safe to use.

    Raises:
        ConfigurationError: another user owns the directory.
        OSError: it cannot be made.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Canonical: an orphaned server is recognised by this very path on its command line.
    state_dir = state_dir.resolve()
    me = os.geteuid()
    owner = state_dir.stat().st_uid
    in_public = state_dir.parent.stat().st_mode & stat.S_IWOTH
    # The owner of a directory can swap what is in it. Root may use another user's (a bind mount), but not one
    # that anybody could have planted in /tmp.
    if owner not in {me, 0} and (me != 0 or in_public):
        raise _foreign(state_dir, owner)
    root = state_dir / "embedded"
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != me:
        raise _foreign(root, found.st_uid)
    return Layout(root)


def default_state_dir(env: Mapping[str, str]) -> Path:
    """Where STATE_DIR points unless it is set. Creates nothing.

    Args:
        env: the environment, for ``XDG_STATE_HOME`` and ``HOME``.

    Returns:
        ``$XDG_STATE_HOME/streamworker``, else ``~/.local/state/streamworker``, else, if neither can be written,
        a directory named by the user's number below the temporary directory.
    """
    homes = [Path(env.get("XDG_STATE_HOME", "")), Path(env.get("HOME", "")) / ".local" / "state"]
    for home in homes:
        if home.is_absolute() and _can_make(home / "streamworker"):  # XDG: a relative path is to be ignored
            return home / "streamworker"
    user = os.getuid() if hasattr(os, "getuid") else "user"  # this much works on Windows, so that the error is ours
    return Path(tempfile.gettempdir()) / f"streamworker-{user}"


def private_file(path: Path, text: str) -> None:
    """Write a file readable by us alone, whole or not at all."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    new.replace(path)


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[int]:
    """The file descriptor of a log that is appended to; an overgrown one is moved to ``.1`` first."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_LIMIT:
            path.replace(path.with_suffix(".log.1"))
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield log
    finally:
        os.close(log)


def last_line(path: Path) -> str:
    """The last line of a log that says anything, for an error message; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _can_make(path: Path) -> bool:
    """Whether the directory exists and is ours to write, or could be made."""
    while not path.exists():
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _foreign(path: Path, owner: int) -> ConfigurationError:
    return ConfigurationError(
        f"{path} belongs to user number {owner}, not to {os.geteuid()}: set STREAMWORKER_STATE_DIR to a directory "
        "of your own, or run as its owner."
    )


STARTING = "starting"  # also while a server that died is being started again
READY = "ready"
FAILED = "failed"

DATABASE = "streamworker"
PG_USER = "postgres"
PG_PORT = 5432  # names the socket file; nothing listens on TCP


class Record(NamedTuple):
    """One published state of the pair. The file is private, so it may hold the password."""

    state: str
    supervisor_pid: int
    redis_pid: int | None = None
    postgres_pid: int | None = None
    redis_port: int = 0
    redis_password: str = ""
    socket_dir: str = ""
    error: str = ""

    @property
    def redis_url(self) -> str:
        return f"redis://:{self.redis_password}@127.0.0.1:{self.redis_port}/0"

    @property
    def masked_redis_url(self) -> str:
        return self._replace(redis_password="***").redis_url  # noqa: S106 - a mask

    @property
    def database_url(self) -> str:
        # The port is written out because clients would otherwise take PGPORT from the user's environment.
        return f"postgresql://{PG_USER}@/{DATABASE}?host={quote(self.socket_dir)}&port={PG_PORT}"

    def write(self, path: Path) -> None:
        private_file(path, json.dumps(self._asdict()))


def read_record(path: Path) -> Record | None:
    """The published state; None if there is none, or one of another release that we cannot read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        fields: dict[str, Any] = json.loads(path.read_bytes())
        return Record(**fields)
    return None


if sys.platform != "win32":  # there `acquire` refuses in one sentence, which needs this module to be importable
    import fcntl


class Lock:
    """An ``flock`` on a file of its own description.

    ``flock`` and not ``fcntl`` locks: those are dropped when any descriptor of the file is closed by the process, and
    cannot be handed to a child. The kernel releases an ``flock`` when the last descriptor of the description is gone,
    so copies must not leak: ``O_CLOEXEC`` keeps it from programs that are executed, and ``_drop_inherited`` from
    children that are only forked.
    """

    __slots__ = ("_path", "fd")

    def __init__(self, path: Path, fd: int | None = None) -> None:
        """Open the file, or adopt a descriptor that was handed over with its lock."""
        self._path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) if fd is None else fd
        os.set_inheritable(self.fd, False)
        _open.add(self)

    def try_shared(self) -> bool:
        """Take the lock together with others; False if another process holds it alone."""
        return self._try(fcntl.LOCK_SH)

    def try_exclusive(self) -> bool:
        """Take the lock alone; False if anybody holds it."""
        return self._try(fcntl.LOCK_EX)

    def unlock(self) -> None:
        """Let go but keep the file open."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def is_current(self) -> bool:
        """False once the file was deleted or replaced: others then lock another one, and this lock means nothing."""
        try:
            return os.path.samestat(os.fstat(self.fd), self._path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Let go for good. Harmless when repeated."""
        _open.discard(self)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _try(self, how: int) -> bool:
        try:
            fcntl.flock(self.fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


# Strong references on purpose: a user that forgets to close keeps the servers until its process ends.
_open: set[Lock] = set()


def _drop_inherited() -> None:
    """In a forked child: close the copies. Closing one copy leaves the parent's lock alone, unlocking would not."""
    for lock in tuple(_open):
        with contextlib.suppress(OSError):
            lock.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_drop_inherited)

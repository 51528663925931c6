"""The files of the embedded pair, all in one private directory below the state directory."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

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
        ConfigurationError: somebody else owns the directory.
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
    """Where STATE_DIR points when nobody set it. Creates nothing.

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


def open_log(path: Path) -> int:
    """Open a log for appending and return its file descriptor; an overgrown one is moved to ``.1`` first."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_LIMIT:
            path.replace(path.with_suffix(".log.1"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


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

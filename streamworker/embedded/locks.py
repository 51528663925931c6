"""File locks that die with their holder, however it dies."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

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
        """Take the lock together with others; False if somebody holds it alone."""
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

"""The process behind the embedded servers: starts them, keeps them running, stops them after the last user.

Its command line says everything, and it answers in one file (``record``). It never learns who its users are: they
hold a shared lock, and the moment it can have that lock exclusively there are none. It then keeps the lock until it is
dead, so that a user who arrives meanwhile waits, finds no supervisor, and starts another.

``acquire`` runs this file by its path under ``python -I -S``: isolated, so that neither the user's working directory
nor PYTHONPATH can slip modules of theirs under our imports, and without site-packages, which is faster. The package is
then found through a stub that points beside this file: the very code the user runs, without all that ``streamworker``
imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    stub = types.ModuleType("streamworker")
    stub.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["streamworker"] = stub

from streamworker.embedded.binaries import Binaries
from streamworker.embedded.layout import FAILED, READY, STARTING, Layout, Lock, Record
from streamworker.embedded.process import STOP_TIMEOUT, Child, StartFailed, say
from streamworker.embedded.servers import Postgres, Valkey

BUSY = 0.005  # seconds between looks while a server starts
IDLE = 0.2  # and while all is well


class ServerSupervisor:
    """One run of the pair.

    Args:
        layout: where everything is.
        binaries: the servers' programs.
        linger: seconds to wait for another user after the last one left; commands in a row then share one start.
    """

    def __init__(self, layout: Layout, binaries: Binaries, linger: float) -> None:
        self._layout = layout
        self._valkey = Valkey(layout, binaries.valkey)
        self._postgres = Postgres(layout, binaries)
        self._children: Sequence[Child] = (self._valkey, self._postgres)
        self._users = Lock(layout.users_lock)
        self._linger = linger
        self._alone_since: float | None = None
        self._published: Record | None = None
        self._asked_to_stop = 0

    def run(self) -> int:
        """Serve until the servers have no user; returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        failed = False
        try:
            self._valkey.prepare()
            self._valkey.tick()  # it starts while initdb works
            self._postgres.prepare()
            while not self._should_stop():
                for child in self._children:
                    child.tick()
                self._publish()
                time.sleep(min(IDLE, self._linger) if self._ready else BUSY)
        except (StartFailed, OSError) as error:
            say(f"giving up: {error}")
            failed = True
            self._record(FAILED, str(error)).write(self._layout.record)
        finally:
            self._stop(keep_record=failed)
        return int(failed)

    @property
    def _ready(self) -> bool:
        return all(child.ready for child in self._children)

    def _ask_to_stop(self, *_: object) -> None:
        self._asked_to_stop += 1

    def _should_stop(self) -> bool:
        """Decide, and hold the users' lock from then on if it is their absence that decides.

        The first SIGTERM only ends the lingering: a service manager sends it to a worker and to us alike, and the
        worker still needs its servers to drain. The second one stops them regardless.
        """
        if self._asked_to_stop > 1 or not self._users.is_current():
            return True
        if not self._users.try_exclusive():
            self._alone_since = None
            return False
        if self._alone_since is None:
            self._alone_since = time.monotonic()
        if self._asked_to_stop or time.monotonic() - self._alone_since >= self._linger:
            return True
        self._users.unlock()
        return False

    def _record(self, state: str, error: str = "") -> Record:
        return Record(
            state,
            os.getpid(),
            self._valkey.pid,
            self._postgres.pid,
            self._valkey.port,
            self._valkey.password,
            str(self._postgres.socket_dir),
            error,
        )

    def _publish(self) -> None:
        record = self._record(READY if self._ready else STARTING)
        if record != self._published:
            record.write(self._layout.record)
            self._published = record

    def _stop(self, *, keep_record: bool) -> None:
        current = self._users.is_current()
        say("stopping" if current else "the state directory is gone, stopping at once")
        if current and not keep_record:
            with contextlib.suppress(FileNotFoundError):
                self._layout.record.unlink()
        for child in self._children:
            # If our directory was deleted there is nothing to save, and there may be a successor in its place
            # already, whose socket and pid file a clean stop would delete.
            child.signal(child.stop_signal if current else signal.SIGKILL)
        deadline = time.monotonic() + STOP_TIMEOUT
        for child in self._children:
            child.wait(deadline)
        say("stopped")


def main(arguments: Sequence[str]) -> int:
    """Detach and supervise.

    Args:
        arguments: the private directory, the descriptor of the supervisor's lock, the linger time in seconds,
            and the programs of Valkey and PostgreSQL.
    """
    root, lock, linger, valkey, postgres = arguments
    # A second fork: init reaps us, the user who happened to start us need not.
    if os.fork():
        os._exit(0)
    os.umask(0o077)
    # What the user ignores or blocks is not for the servers to inherit.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    layout = Layout(Path(root))
    Lock(layout.supervisor_lock, int(lock))  # held until we are dead
    say(f"supervisor {os.getpid()} starts on {root}")
    return ServerSupervisor(layout, Binaries(Path(valkey), Path(postgres)), float(linger)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

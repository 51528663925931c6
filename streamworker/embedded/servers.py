"""The two servers: PostgreSQL, over a Unix socket in a private directory, and Valkey, which serves as our Redis."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from streamworker.embedded.binaries import Binaries
from streamworker.embedded.layout import DATABASE, PG_PORT, PG_USER, Layout, last_line, open_log, private_file
from streamworker.embedded.process import Child, Launcher, StartFailed, choose_launcher, evict, is_ours, say
from streamworker.embedded.users import NO_SUCH_DATABASE, OK, postgres_answers, redis_answers

# sockaddr_un.sun_path holds 108 bytes on Linux and 104 on macOS, terminator included; the lock file's name is longer
# but has no such limit.
_SOCKET_LIMIT = 107 if sys.platform == "linux" else 103
_SOCKET = f".s.PGSQL.{PG_PORT}"


class Postgres(Child):
    """One cluster with a database named streamworker, trust inside, nothing to connect to from outside."""

    name = "PostgreSQL"
    stop_signal = signal.SIGINT  # fast shutdown: ends sessions, loses nothing

    def __init__(self, layout: Layout, binaries: Binaries) -> None:
        super().__init__(layout.root / "postgres.log")
        self._binaries = binaries
        self._home = layout.postgres
        self._data = layout.postgres / "data"
        self._socket_note = layout.root / "socket-dir"
        self._near_sockets = layout.root / "run"
        self._launcher = Launcher()
        self.socket_dir = self._near_sockets

    def prepare(self) -> None:
        self._home.mkdir(mode=0o700, exist_ok=True)
        evict(self._data / "postmaster.pid", self._data, self.stop_signal)
        for leftover in self._home.glob("new-*"):
            _remove(leftover)
        self._launcher = choose_launcher(self._binaries.postgres, self._home)
        if self._data.exists():
            self._own(self._data)
        else:
            self._initdb()
        self.socket_dir = self._make_socket_dir()
        self._own(self.socket_dir)
        for name in (_SOCKET, f"{_SOCKET}.lock"):  # no server listens there any more
            with contextlib.suppress(FileNotFoundError):
                (self.socket_dir / name).unlink()

    def spawn(self) -> subprocess.Popen[bytes]:
        self._disown_stale_pid()
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_dir),
            "unix_socket_permissions": "0700",
            "port": str(PG_PORT),
            "max_connections": "200",  # several workers with two pools each, a dashboard, the tests of a project
            "cluster_name": "streamworker",
        }
        command = [str(self._binaries.postgres), "-D", str(self._data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with open_log(self.log) as log:
            return self._launcher.popen(command, "INT", log, self._home)

    def answers(self) -> bool:
        answer = postgres_answers(self.socket_dir, DATABASE)
        if answer == NO_SUCH_DATABASE:  # the first start, or it was dropped
            answer = postgres_answers(self.socket_dir, "postgres", f"CREATE DATABASE {DATABASE}", timeout=30)
        return answer == OK

    def _initdb(self) -> None:
        """Make the cluster under another name and rename it when it is whole: a half one would fail for ever."""
        new = Path(tempfile.mkdtemp(prefix="new-", dir=self._home))
        self._own(new)
        command = [str(self._binaries.initdb), "-D", str(new), "-A", "trust", "-U", PG_USER, "-E", "UTF8"]
        # The built-in provider sorts alike on every system. --no-sync saves the time of 900 fsyncs: a machine that
        # crashes in the first seconds of an empty database loses an empty database.
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--no-sync"]
        # mmap: shared memory in the data directory, not in /dev/shm, where a killed server would leave its own behind
        # and containers give 64 MB at most. Only parallel queries could notice the difference.
        command += ["--no-instructions", "-c", "dynamic_shared_memory_type=mmap"]
        with open_log(self.log) as log:
            status = self._launcher.popen(command, "TERM", log, self._home).wait()
        if status != 0:
            _remove(new)
            raise StartFailed(f"initdb ended with status {status}: {last_line(self.log)} (log: {self.log})")
        new.rename(self._data)
        say("made a new PostgreSQL cluster")

    def _disown_stale_pid(self) -> None:
        """Let a restart survive that the number in postmaster.pid belongs to another program of ours by now.

        PostgreSQL would refuse to start; containers, where numbers repeat, know the problem well. Deleting the file
        would also delete its hint to the shared memory of backends that may survive, so we replace the number by
        our own: a number that is the new server's parent counts as stale, and the other checks stay in force.
        """
        pid_file = self._data / "postmaster.pid"
        try:
            first, rest = pid_file.read_text().split("\n", 1)
        except (OSError, ValueError):
            return
        if first.strip().lstrip("-").isdigit() and not is_ours(abs(int(first)), self._data):
            private_file(pid_file, f"{os.getpid()}\n{rest}")
            self._own(pid_file)

    def _make_socket_dir(self) -> Path:
        """A private directory with a path short and plain enough for a socket; the same one after a restart."""
        near = self._near_sockets
        # A comma or a quote would mean something to unix_socket_directories.
        if len(os.fsencode(near / _SOCKET)) <= _SOCKET_LIMIT and re.fullmatch(r"[\w./+-]+", str(near), re.ASCII):
            near.mkdir(mode=0o700, exist_ok=True)
            return near
        with contextlib.suppress(OSError):
            noted = Path(self._socket_note.read_text())
            found = noted.lstat()
            # It was ours and has a random name, but temporary directories get swept and names can be taken then.
            if found.st_mode == 0o040700 and found.st_uid in {os.geteuid(), self._launcher.owner}:
                return noted
        short = tempfile.gettempdir()
        if len(short) > _SOCKET_LIMIT - 50:
            short = "/tmp"  # noqa: S108 - only the parent of a private directory
        made = Path(tempfile.mkdtemp(prefix="streamworker-", dir=short))
        private_file(self._socket_note, str(made))
        return made

    def _own(self, path: Path) -> None:
        """As root: give a file or a tree to the user the launcher runs the server as."""
        owner = self._launcher.owner or 0
        if os.geteuid() != 0 or path.lstat().st_uid == owner:
            return
        os.chown(path, owner, owner)
        for directory, folders, files in os.walk(path):
            for name in folders + files:
                os.lchown(Path(directory) / name, owner, owner)


def _remove(unfinished: Path) -> None:
    """Delete what a killed initdb left, even while the last processes of it still write there."""
    deadline = time.monotonic() + 2
    while unfinished.exists() and time.monotonic() < deadline:
        shutil.rmtree(unfinished, ignore_errors=True)


# Below the range from which systems hand out ports to clients: there a restart seldom finds its port taken.
_PORTS = range(20_000, 32_000)

# save "": the append-only file holds everything and is synced at a clean stop; snapshots would only cost time.
# noeviction: eviction drops streams together with their groups. set-proc-title: `evict` reads the command line.
_CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
daemonize no
pidfile valkey.pid
set-proc-title no
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
stream-node-max-bytes 1024
"""


class Valkey(Child):
    """On 127.0.0.1, with an append-only file, behind a random password that never changes."""

    name = "Valkey"
    stop_signal = signal.SIGTERM  # the same as SHUTDOWN

    def __init__(self, layout: Layout, program: Path) -> None:
        super().__init__(layout.root / "valkey.log")
        self._program = program
        self._home = layout.valkey
        self._config = layout.valkey / "valkey.conf"
        self._port_file = layout.root / "port"
        self._password_file = layout.root / "password"
        self.port = 0
        self.password = ""

    def prepare(self) -> None:
        self._home.mkdir(mode=0o700, exist_ok=True)
        pid_file = self._home / "valkey.pid"
        evict(pid_file, self._config, self.stop_signal)
        with contextlib.suppress(FileNotFoundError):
            pid_file.unlink()
        with contextlib.suppress(OSError, ValueError):
            self.port = int(self._port_file.read_text())
        with contextlib.suppress(OSError):
            self.password = self._password_file.read_text()
        if not self.password:
            self.password = os.urandom(18).hex()
            private_file(self._password_file, self.password)

    def spawn(self) -> subprocess.Popen[bytes]:
        # The old port if it is free, so that clients that are still there find the server again.
        if not _is_free(self.port):
            self.port = next(port for port in random.sample(_PORTS, len(_PORTS)) if _is_free(port))
            private_file(self._port_file, str(self.port))
        # A file, because everybody can read a command line.
        private_file(self._config, _CONFIG.format(port=self.port, password=self.password))
        with open_log(self.log) as log:
            return Launcher().popen([str(self._program), str(self._config)], "TERM", log, self._home)

    def answers(self) -> bool:
        return redis_answers(self.port, self.password)


def _is_free(port: int) -> bool:
    if port == 0:
        return False
    with socket.socket() as listener:
        # As Valkey binds: connections of the last run that linger do not matter.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

"""Valkey, which serves as our Redis."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
from pathlib import Path

from streamworker.embedded.joining import redis_answers
from streamworker.embedded.layout import Layout, open_log, private_file
from streamworker.embedded.process import Child, Launcher, evict

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
        log = open_log(self.log)
        try:
            return Launcher().popen([str(self._program), str(self._config)], "TERM", log, self._home)
        finally:
            os.close(log)

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
